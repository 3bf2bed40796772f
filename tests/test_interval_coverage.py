"""The interval over processes holds what it should: arithmetic by hand, and real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interval_coverage import ROOT, covered, deal, report

SCRIPT = Path(__file__).with_name("interval_coverage.py")


def test_a_deal_gives_every_value_to_one_group() -> None:
    values = [float(value) for value in range(21)]
    groups = deal(values, 3, seed=1)
    assert [len(group) for group in groups] == [7, 7, 7]
    assert sorted(value for group in groups for value in group) == values
    assert groups == deal(values, 3, seed=1) != deal(values, 3, seed=2)
    assert [len(group) for group in deal(values, 4, seed=1)] == [5, 5, 5, 5]


def test_covered_groups_are_counted() -> None:
    # The interval of 1..7 is [1.73, 6.27], see test_stats.
    group = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    higher = [value + 1 for value in group]
    assert [covered([group, higher], median) for median in (1.7, 1.8, 4.0, 7.0, 7.3)] == [
        0, 1, 2, 1, 0,
    ]  # fmt: skip


def test_a_report_of_values_by_hand() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] * 2
    found = report(values, 1, seed=0)
    assert found["processes"] == found["processes_per_group"] == 14
    assert found["grand_median_images_per_s"] == 4.0
    assert found["covered"] == found["covered_share_of_further_deals"] == 1


@pytest.mark.slow
def test_the_script_measures_and_takes_up_an_earlier_run(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--runs-dir", str(tmp_path / "runs"), *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    small = ["--groups", "2", "--processes", "6"]
    done = run(*small, "--batch-size=8", "--timed-steps=5", "--warmup-steps=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["processes"], found["groups"], found["processes_per_group"]) == (12, 2, 6)
    assert 0 <= found["covered"] <= 2
    assert json.loads(run(*small, "--run", found["run"]).stdout) == found
    short = run("--groups", "3", "--processes", "6", "--run", found["run"])
    assert (short.returncode, short.stderr.count("\n")) == (2, 1)
    assert "has 12 finished processes of 1 cell(s), needs 18 of 1" in short.stderr
