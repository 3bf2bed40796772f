"""Fresh processes per cell: their order, when there are enough of them, and what happens then."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_bench import present
from fake_worker import record_of

from bench import execution, runs
from bench.job import Job
from bench.protocol import Protocol
from bench.record import Measurement, Record
from bench.repeats import Repeats
from bench.rows import rows
from bench.run_command import measure
from bench.runs import Run
from bench.spec import Plan, Suite, Task, grid
from bench.unfinished import explained, unfinished

CLOSE = [100.0, 101.0, 99.0, 100.0, 101.0, 99.0, 100.0, 100.0, 100.0]
"""Their interval reaches 1 % from the median at most, with any six or more of them."""
WIDE = [100.0, 150.0, 60.0, 120.0, 80.0, 140.0, 70.0, 130.0, 90.0]


def make_run(folder: Path, *models: str, target: float | None = 0.01, repeats: int = 9) -> Run:
    protocol = Protocol(repeats=repeats, target_interval=target)
    plan = Plan(protocol=protocol, cells=grid(models, ["fp32"]))
    return runs.create(Suite(name="custom", description="", plans=(plan,)), folder)


def record_at(task: Task, rate: float, **fields: object) -> Record:
    found = Measurement(
        name="train_throughput", unit="samples/s", better="higher",
        labels={"samples_per_step": 100}, samples=((100 / rate,),),
    )  # fmt: skip
    return record_of(Job(task=task), measurements=(found,), **fields)


class FakeLaunch:
    """Gives every repeat of a model its rate; a status in place of it breaks."""

    def __init__(self, **rates: Sequence[float | str]) -> None:
        self._rates = rates
        self.started: list[tuple[str, int]] = []

    def __call__(self, job: Job, folder: Path, **_: object) -> Record:
        task = job.task
        model = task.cell.train.model.label
        self.started.append((model, task.repeat))
        rate = self._rates[model][task.repeat]
        if isinstance(rate, str):
            return record_of(job, status=rate, reason="why", measurements=(), run_id=job.run_id)
        return record_at(task, rate, run_id=job.run_id)

    def repeats(self, model: str) -> list[int]:
        return [repeat for name, repeat in self.started if name == model]


def execute(run: Run, launch: Callable[[Job, Path], Record]) -> list[Record]:
    return execution.execute(run, launch=launch, present=present)


def test_what_is_known_is_started_no_more_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet20", "resnet18")
    launch = FakeLaunch(resnet20=CLOSE, resnet18=WIDE)
    records = execute(run, launch)
    assert launch.repeats("resnet20") == list(range(6))
    assert launch.repeats("resnet18") == list(range(9))
    assert run.records() == records
    assert [row["runs"] for row in rows(records)] == [6, 9]


def test_without_a_target_every_repeat_is_started(tmp_path: Path) -> None:
    launch = FakeLaunch(resnet20=CLOSE)
    execute(make_run(tmp_path, "resnet20", target=None), launch)
    assert launch.repeats("resnet20") == list(range(9))


def test_a_failed_process_does_not_count(tmp_path: Path) -> None:
    launch = FakeLaunch(resnet20=["failed", *CLOSE])
    records = execute(make_run(tmp_path, "resnet20"), launch)
    assert launch.repeats("resnet20") == list(range(7))
    assert [record.status for record in records] == ["failed"] + ["ok"] * 6


def test_resuming_starts_nothing_that_is_not_needed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet20", "resnet18")
    records = execute(run, FakeLaunch(resnet20=CLOSE, resnet18=WIDE))
    again = FakeLaunch()
    assert execution.missing(run, present=present) == []
    assert execute(run, again) == records
    assert again.started == []


def test_resuming_starts_what_is_not_known_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet20")

    def interrupted(job: Job, folder: Path, **_: object) -> Record:
        if job.task.repeat == 4:
            raise KeyboardInterrupt
        return record_at(job.task, CLOSE[job.task.repeat])

    with pytest.raises(KeyboardInterrupt):
        execute(run, interrupted)
    assert [task.repeat for task in execution.missing(run, present=present)] == [4, 5, 6, 7, 8]
    again = FakeLaunch(resnet20=CLOSE)
    assert len(execute(run, again)) == 6
    assert again.repeats("resnet20") == [4, 5]


def test_resuming_tries_again_what_broke_though_the_cell_is_known(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet20")
    execute(run, FakeLaunch(resnet20=["oom", *CLOSE]))
    again = FakeLaunch(resnet20=CLOSE)
    records = execute(run, again)
    assert again.repeats("resnet20") == [0]
    assert {record.status for record in records} == {"ok"}


def test_resuming_tries_again_what_broke_after_its_training_though_the_cell_is_known(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, "resnet20")
    launch = FakeLaunch(resnet20=CLOSE)

    def partly(job: Job, folder: Path, **_: object) -> Record:
        record = launch(job, folder)
        broken = explained(unfinished(record, ["flops"]), "oom", "no room")
        return broken if job.task.repeat == 0 else record

    assert len(execute(run, partly)) == 6, "its throughput counts"
    again = FakeLaunch(resnet20=CLOSE)
    records = execute(run, again)
    assert again.repeats("resnet20") == [0]
    assert all(record.finished for record in records)


def test_totals_and_exit_code_count_what_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "resnet20")
    launch = FakeLaunch(resnet20=CLOSE)
    measured = functools.partial(execution.execute, launch=launch, present=present)
    monkeypatch.setattr(execution, "execute", measured)
    assert measure(run, [], {}) == 0
    output = capsys.readouterr()
    assert "6 cells in 0 s (3 more were not needed); records" in output.out
    lines = output.err.splitlines()
    assert len(lines) == 9
    assert lines[5].endswith(" ... ok 99 images/s 1 s")
    assert lines[6] == "[7/9] resnet20 fp32 b64 repeat 6 ... not needed, known to within 1.0%"


def test_the_order_is_shuffled_and_folders_and_records_stay_in_the_plan_s(tmp_path: Path) -> None:
    models = ("resnet20", "resnet32", "resnet44", "resnet56")
    run = make_run(tmp_path, *models, target=None, repeats=7)
    launch = FakeLaunch(**dict.fromkeys(models, CLOSE))
    folders = []

    def spy(job: Job, folder: Path, **_: object) -> Record:
        folders.append(folder)
        return launch(job, folder)

    records = execute(run, spy)
    turns = [tuple(model for model, _ in launch.started[at : at + 4]) for at in range(0, 28, 4)]
    assert all(sorted(turn) == sorted(models) for turn in turns)
    assert len(set(turns)) > 1
    assert [record.key for record in records] == [task.key for task in run.plan.tasks]
    assert run.records() == records
    assert sorted(folders) == sorted(
        run.cell_folder(number, task) for number, task in enumerate(run.plan.tasks, 1)
    )
    assert [row["model"] for row in rows(run.records())] == list(models)


def test_disturbed_processes_are_counted_as_in_tables_and_failed_ones_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, "resnet20")
    tasks = run.plan.tasks
    records = [record_at(task, rate) for task, rate in zip(tasks, CLOSE)][:6]
    assert Repeats(records).known_within(tasks[6]) == pytest.approx(0.01)
    disturbed = [*records[:5], replace(records[5], invalid=("CPU load",))]
    assert Repeats(disturbed).known_within(tasks[6]) == pytest.approx(0.01)
    failed = [*records[:5], replace(records[5], status="failed", reason="no", measurements=())]
    assert Repeats(failed).known_within(tasks[6]) is None
    stricter = replace(tasks[6], protocol=replace(tasks[6].protocol, target_interval=0.001))
    assert Repeats(records).known_within(stricter) is None
