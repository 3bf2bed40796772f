"""The interval over processes holds what it should: arithmetic by hand, and real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interval_coverage
import pytest
from fake_worker import record_of
from interval_coverage import ROOT, covered, deal, exit_code, report, throughputs

from bench import runs
from bench.job import Job
from bench.protocol import Protocol
from bench.record import Measurement
from bench.record_file import append_record
from bench.spec import Plan, Suite, grid

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


@pytest.mark.parametrize(
    ("covered", "groups", "code"), [(34, 40, 0), (33, 40, 1), (68, 80, 0), (67, 80, 1), (0, 39, 0)]
)
def test_forty_groups_or_more_are_judged(covered: int, groups: int, code: int) -> None:
    assert exit_code(covered, groups) == code


@pytest.mark.parametrize(("covered", "code"), [(34, 0), (33, 1)])
def test_too_few_covering_groups_are_told_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, covered: int, code: int
) -> None:
    run = make_run(tmp_path, 6)
    monkeypatch.setattr(interval_coverage, "throughputs", lambda run: [1.0] * 240)
    monkeypatch.setattr(interval_coverage, "report", lambda *_: {"covered": covered})
    words = ["interval_coverage.py", "--run", run.id, "--runs-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--processes", "6"])
    assert interval_coverage.main() == code


def make_run(folder: Path, repeats: int) -> runs.Run:
    plan = Plan(protocol=Protocol(repeats=repeats), cells=grid(["resnet20-w4"], ["fp32"]))
    return runs.create(Suite(name="custom", description="", plans=(plan,)), folder)


def add(run: runs.Run, repeat: int, seconds: float, **fields: Any) -> None:
    rate = Measurement(
        name="train_throughput", unit="samples/s", better="higher",
        labels={"samples_per_step": 10}, samples=((seconds,),),
    )  # fmt: skip
    task = run.plan.tasks[repeat]
    append_record(run.records_file, record_of(Job(task=task), measurements=(rate,), **fields))


def test_what_was_measured_again_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    add(run, 0, 5.0, invalid=("a goat",))
    add(run, 1, 2.0, invalid=("a duck",))
    add(run, 2, 1.0, status="failed", reason="a bug")
    add(run, 0, 1.0)
    assert throughputs(run) == [10.0, 5.0]


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_of_which_processes_failed_is_to_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    make_run(tmp_path, 12)

    def call(command: list[str], **_: object) -> int:
        if code == 1:
            run = make_run(tmp_path, 12)
            for repeat in range(11):
                add(run, repeat, 1.0)
        return code

    monkeypatch.setattr(interval_coverage, "subprocess", SimpleNamespace(call=call))
    words = ["interval_coverage.py", "--runs-dir", str(tmp_path), "--groups", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--processes", "6"])
    with pytest.raises(SystemExit) as stopped:
        interval_coverage.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    if code == 1:
        assert "has 11 finished processes of 1 cell(s), needs 12 of 1; finish it with" in said
        assert f"bench run --resume {tmp_path}/" in said
    else:
        assert said == "", "bench run has told"


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
    values = throughputs(runs.find(found["run"], tmp_path / "runs"))
    assert found == {"run": found["run"]} | json.loads(json.dumps(report(values, 2, seed=0)))
    assert json.loads(run(*small, "--run", found["run"]).stdout) == found
    short = run("--groups", "3", "--processes", "6", "--run", found["run"])
    assert (short.returncode, short.stderr.count("\n")) == (2, 1)
    assert "has 12 finished processes of 1 cell(s), needs 18 of 1" in short.stderr
