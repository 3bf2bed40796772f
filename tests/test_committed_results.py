"""The results that are kept: strictly readable, and every table is what its records say now.

After an intended change of the tables write them anew: `UPDATE_GOLDEN=1 pytest FILE`, this one.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import loop_table
import pytest

from bench.record import Record
from bench.record_file import read_records
from bench.save import save
from bench.scaling import scaling
from bench.spec import Suite, Task, expand
from bench.suites import SUITES, get_suite

RESULTS = Path(__file__).parent.parent / "results"
FILES = sorted(RESULTS.glob("*/*.jsonl"))
OF_SUITES = [path for path in FILES if path.stem in SUITES]
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
    pictures = [folder / "scaling.png"] * (path.stem == scaling.__name__)
    expected = [folder / path.name, folder / kept.name, *pictures]
    assert written == expected, "records of other hardware"
    if os.environ.get("UPDATE_GOLDEN"):
        shutil.copy(tmp_path / written[1], kept)
    assert kept.read_text(encoding="utf-8") == (tmp_path / written[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_record_is_kept_once(path):
    records = read_records(path)
    assert len({record.key for record in records}) == len(records)


def cells(tasks: Iterable[Task | Record]) -> dict[tuple[str, str], str]:
    """Labels by the digests of cell and protocol; seeds together, of which there may be several."""
    unseeded = (
        (replace(each.cell, train=replace(each.cell.train, seed=0)), each.protocol)
        for each in tasks
    )
    return {(cell.digest, protocol.digest): cell.label for cell, protocol in unseeded}


def suite_of(name: str, records: list[Record]) -> Suite:
    """As it is now, for the networks and processes of these records where it is made for some."""
    if name != scaling.__name__:
        return get_suite(name)
    found = [record.cell for record in records]
    return scaling(
        models=list(dict.fromkeys(cell.train.model.label for cell in found)),
        precisions=list(dict.fromkeys(cell.precision for cell in found)),
        counts=sorted({cell.num_processes for cell in found}),
    )


@pytest.mark.parametrize("path", OF_SUITES, ids=lambda path: path.stem)
def test_a_suite_s_records_are_of_the_cells_that_it_has_now(path):
    records = read_records(path)
    recorded, planned = cells(records), cells(expand(suite_of(path.stem, records)))
    stale = sorted(recorded[key] for key in recorded.keys() - planned.keys())
    absent = sorted(planned[key] for key in planned.keys() - recorded.keys())
    assert not stale and not absent, (
        f"a recipe, a default or the suite has changed since: record anew (bench run {path.stem}, "
        f"bench save RUN); no longer of the suite: {stale}, not recorded: {absent}"
    )


def test_nothing_lies_beside_records_and_their_tables():
    expected = {file for path in FILES for file in (path, path.with_suffix(".md"))}
    expected |= {path.with_suffix(".png") for path in FILES if path.stem == scaling.__name__}
    assert set(RESULTS.glob("*/*")) == expected | set(RESULTS.glob("*/checks"))


def test_the_table_of_checks_is_what_they_printed() -> None:
    found = [*RESULTS.glob("*/checks/loops.jsonl")]
    for path in found:
        kept, table = path.with_suffix(".md"), loop_table.table(loop_table.read(path))
        if os.environ.get("UPDATE_GOLDEN"):
            kept.write_text(table, encoding="utf-8")
        assert kept.read_text(encoding="utf-8") == table
    assert found


def test_the_index_names_every_hardware_and_suite():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert not [name for name in NAMES if name.replace(".jsonl", ".md") not in index]
