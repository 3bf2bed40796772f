"""The results that are kept: strictly readable, and every table is what its records say now.

After an intended change of the tables write them anew: `UPDATE_GOLDEN=1 pytest FILE`, this one.
"""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.record_file import read_records
from bench.save import save

RESULTS = Path(__file__).parent.parent / "results"
FILES = sorted(RESULTS.glob("*/*.jsonl"))
NAMES = [path.relative_to(RESULTS).as_posix() for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_table_is_what_its_records_say(path, tmp_path):
    records = read_records(path)
    assert records
    run = SimpleNamespace(
        id="committed", plan=SimpleNamespace(suite=path.stem), records=lambda: records
    )
    written = [file.relative_to(tmp_path) for file in save(run, tmp_path)]
    kept = path.with_suffix(".md")
    folder = Path(path.parent.name)
    assert written == [folder / path.name, folder / kept.name], "records of other hardware"
    if os.environ.get("UPDATE_GOLDEN"):
        shutil.copy(tmp_path / written[1], kept)
    assert kept.read_text(encoding="utf-8") == (tmp_path / written[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_record_is_kept_once(path):
    records = read_records(path)
    assert len({record.key for record in records}) == len(records)


def test_nothing_lies_beside_records_and_their_tables():
    expected = {file for path in FILES for file in (path, path.with_suffix(".md"))}
    assert set(RESULTS.glob("*/*")) == expected


def test_the_index_names_every_hardware_and_suite():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert not [name for name in NAMES if name.replace(".jsonl", ".md") not in index]
