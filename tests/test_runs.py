"""Runs on disk: folders, locks, the loop over the tasks, resuming, and saving results."""

import errno
import io
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from fake_worker import environment, record_of

from bench import execution, present, runs
from bench.job import Job
from bench.options import runs_folder
from bench.preflight import check
from bench.progress import SuiteProgress, outcome
from bench.protocol import Protocol
from bench.record import DataFacts, Record
from bench.record_file import append_record, read_records
from bench.rows import rows
from bench.runs import Run
from bench.save import save, uncommitted
from bench.spec import Plan, Suite, Task, expand, grid
from cifar.errors import CifarError, ConfigError, OutputError, UserError
from cifar.serialize import to_json


def make_suite(models: tuple[str, ...] = ("resnet20", "resnet18"), repeats: int = 1) -> Suite:
    plan = Plan(protocol=Protocol(repeats=repeats), cells=grid(models, ["fp32"]))
    return Suite(name="quick", description="two", plans=(plan,))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runs.create(make_suite(), tmp_path / "runs", ["quick"])


class FakeLaunch:
    """Gives records of the statuses in turn (an exception is raised), and keeps the jobs."""

    def __init__(self, *statuses: str | BaseException) -> None:
        self._statuses = list(statuses)
        self.jobs: list[Job] = []
        self.folders: list[Path] = []

    def __call__(self, job: Job, folder: Path, **_: object) -> Record:
        self.jobs.append(job)
        self.folders.append(folder)
        status = self._statuses.pop(0) if self._statuses else "ok"
        if isinstance(status, BaseException):
            raise status
        reason = "" if status == "ok" else f"why {status}"
        return record_of(
            job, status=status, reason=reason, run_id=job.run_id, suite=job.suite, duration_s=30.0
        )

    @property
    def models(self) -> list[str]:
        return [job.task.cell.train.model.label for job in self.jobs]


def present_of(**fields):
    return lambda num_processes, **_: environment(**fields)


# --- Folders ---


def test_a_run_is_found_again_by_id_path_and_age(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "runs"
    assert run.id.split("-")[2] == "quick"
    assert runs.find(run.id, root) == run
    assert runs.find(str(run.folder), tmp_path / "elsewhere") == run
    assert runs.newest(root) == run
    assert run.plan.argv == ("quick",)
    assert [task.cell.train.model.label for task in run.plan.tasks] == ["resnet20", "resnet18"]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    folders = {runs.create(make_suite(), tmp_path).folder for _ in range(5)}
    assert len(folders) == 5


def test_a_missing_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run: 'nope': no such run in '.*'; give its id"):
        runs.find("nope", tmp_path)
    with pytest.raises(UserError, match=r"run: no run in '.*'; start one with bench run"):
        runs.newest(tmp_path)


def test_a_home_folder_is_found(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs_folder("~/runs") == tmp_path / "runs"
    assert runs.find(f"~/runs/{run.id}", tmp_path / "elsewhere") == run


def test_a_run_that_may_not_be_read_is_passed_over(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    readable = runs.create(make_suite(), run.folder.parent)
    monkeypatch.setattr(os, "access", lambda path, _: path.parent == readable.folder)
    assert runs.run_names(run.folder.parent) == [readable.id]


def test_a_damaged_plan_names_the_file(run: Run) -> None:
    (run.folder / "run.json").write_text('{"suite": "quick", "color": 1}')
    with pytest.raises(ConfigError, match=r"run\.json"):
        runs.find(run.id, run.folder.parent)


def test_a_run_has_one_path_however_it_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(run.folder.parent)
    (run.folder / "cells").mkdir()
    monkeypatch.chdir(run.folder / "cells")
    for name, folder in ((run.id, tmp_path / "link"), ("..", tmp_path)):
        found = runs.find(name, folder)
        assert (found.folder, found.id) == (run.folder.resolve(), run.id)


def test_a_run_with_numbers_out_of_all_measure_teaches_nothing(run: Run) -> None:
    text = to_json(record_of(Job(task=run.plan.tasks[0])))
    odd = text.replace('"samples": [[', '"samples": [[1e308, ')
    (run.folder / "records.jsonl").write_text(odd + "\n")
    with pytest.raises(UserError, match="must be finite"):
        run.records()
    assert runs.history(run.folder.parent) == []


def test_a_disk_that_fills_up_meanwhile_stops_a_run_with_what_it_has(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, room = execution.append_record, [True]

    def full(path: Path, record: Record) -> None:
        if not room:
            raise OSError(errno.EFBIG, "File too large")
        room.pop()
        append(path, record)

    monkeypatch.setattr(execution, "append_record", full)
    with pytest.raises(
        OutputError, match=r"run: .* any more \(File too large\); make room"
    ) as info:
        execution.execute(run, launch=FakeLaunch("ok", "ok"), present=present_of())
    assert info.value.exit_code == 1
    assert [record.status for record in run.records()] == ["ok"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for make in (runs.check_writable, lambda folder: runs.create(make_suite(), folder)):
        with pytest.raises(UserError, match=r"runs-dir: '.*file/runs': cannot be written"):
            make(tmp_path / "file" / "runs")


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    runs.check_writable(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


# --- The loop ---


def test_every_task_gives_a_record_on_disk_at_once(run: Run) -> None:
    launch = FakeLaunch("failed", "ok")
    seen = []

    def spy(job: Job, folder: Path, **_: object) -> Record:
        seen.append(len(run.records()))
        return launch(job, folder)

    records = execution.execute(run, launch=spy, present=present_of())
    assert seen == [0, 1]
    assert [record.status for record in records] == ["failed", "ok"]
    assert run.records() == records
    assert [job.run_id for job in launch.jobs] == [run.id] * 2
    names = [folder.name for folder in launch.folders]
    assert [name[:11] for name in names] == ["01-resnet20", "02-resnet18"]
    assert all(name.endswith("-r0") for name in names)


def test_an_interrupted_run_keeps_its_records_and_goes_on(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        execution.execute(run, launch=FakeLaunch("ok", KeyboardInterrupt()), present=present_of())
    assert [record.status for record in run.records()] == ["ok"]
    launch = FakeLaunch()
    records = execution.execute(run, launch=launch, present=present_of())
    assert launch.models == ["resnet18"]
    assert [record.cell.train.model.label for record in records] == ["resnet20", "resnet18"]


@pytest.mark.parametrize(
    ("status", "again"),
    [("ok", 0), ("unsupported", 0), ("failed", 1), ("oom", 1), ("timeout", 1)],
)
def test_what_did_not_finish_is_tried_again(run: Run, status: str, again: int) -> None:
    execution.execute(run, launch=FakeLaunch(status, "ok"), present=present_of())
    launch = FakeLaunch()
    records = execution.execute(run, launch=launch, present=present_of())
    assert launch.models == ["resnet20"] * again
    assert [record.status for record in records] == ["ok" if again else status, "ok"]
    assert len(run.records()) == 2 + again
    assert list(runs.latest(run.records()).values()) == records


def test_a_moved_run_goes_on_as_one_run(run: Run) -> None:
    execution.execute(run, launch=FakeLaunch("timeout", "ok"), present=present_of())
    moved = replace(run, folder=run.folder.rename(run.folder.with_name("moved")))
    execution.execute(moved, launch=FakeLaunch(), present=present_of())
    assert {record.run_id for record in moved.records()} == {"moved"}
    assert [(row["status"], row["runs"]) for row in rows(moved.records())] == [("ok", 1)] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"code_digest": "other"},
        {"torch": "2.99"},
        {"cpu_model": "Other CPU"},
        {"worker_env": {"OMP_NUM_THREADS": "9"}},
        {"threads": 9},
    ],
)
def test_a_record_from_other_circumstances_is_measured_anew(run: Run, change: dict) -> None:
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    launch = FakeLaunch()
    execution.execute(run, launch=launch, present=present_of(**change))
    assert launch.models == ["resnet20", "resnet18"]


def images(fingerprint: str, source: str = "shapes") -> DataFacts:
    return DataFacts(
        name=source, fingerprint=fingerprint, train_samples=10, test_samples=2, classes=10
    )


def test_a_record_of_other_images_is_measured_anew(run: Run) -> None:
    first, second = run.plan.tasks
    append_record(run.records_file, record_of(Job(task=first), data=images("old")))
    early = record_of(Job(task=second), status="unsupported", reason="no such unit", data=None)
    append_record(run.records_file, early)

    def missing(now: str) -> list[Task]:
        fingerprints = {first.cell.train.data: now}
        return execution.missing(run, present=present_of(), fingerprints=fingerprints)

    assert execution.missing(run, present=present_of()) == missing("old") == []
    assert missing("new") == [first], "the other one read no images"
    launch = FakeLaunch()
    execution.execute(
        run, launch=launch, present=present_of(), fingerprints={first.cell.train.data: "new"}
    )
    assert launch.models == ["resnet20"]


def test_time_memory_and_commit_do_not_matter(run: Run) -> None:
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    launch = FakeLaunch()
    same = {"started": "2030-01-01T00:00:00+00:00", "memory_bytes": 5, "git_sha": "abc"}
    execution.execute(run, launch=launch, present=present_of(**same))
    assert launch.models == []


def test_a_torn_last_line_is_measured_again(run: Run) -> None:
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    run.records_file.write_text(run.records_file.read_text()[:-40])
    launch = FakeLaunch()
    with pytest.warns(match="the last line is incomplete"):
        execution.execute(run, launch=launch, present=present_of())
    assert launch.models == ["resnet18"]
    assert len(run.records()) == 2


def test_repeats_come_after_each_other(tmp_path: Path) -> None:
    run = runs.create(make_suite(repeats=2), tmp_path)
    launch = FakeLaunch()
    records = execution.execute(run, launch=launch, present=present_of())
    assert [sorted(launch.models[start : start + 2]) for start in (0, 2)] == [
        ["resnet18", "resnet20"]
    ] * 2
    assert [record.repeat for record in records] == [0, 0, 1, 1]
    assert len(set(launch.folders)) == 4


def test_two_processes_cannot_do_the_same_run(run: Run) -> None:
    with runs.locked(run), pytest.raises(UserError, match=rf"run: '{run.id}': is being run by"):
        execution.execute(run, launch=FakeLaunch(), present=present_of())
    assert len(execution.execute(run, launch=FakeLaunch(), present=present_of())) == 2


def test_the_past_is_the_newest_readable_runs(tmp_path: Path) -> None:
    good, bad = (runs.create(make_suite(), tmp_path) for _ in range(2))
    records = execution.execute(good, launch=FakeLaunch(), present=present_of())
    bad.records_file.write_text("{}\n{}\n")
    assert runs.history(tmp_path) == records
    assert runs.history(tmp_path / "none") == []


# --- The present environment ---


def test_the_present_environment_is_asked_of_a_process(tmp_path: Path, monkeypatch) -> None:
    expected = environment(threads=3)
    text = f"import os\nassert os.environ['OMP_NUM_THREADS']\nprint({to_json(expected)!r})\n"
    (tmp_path / "here.py").write_text(text)
    (tmp_path / "broken.py").write_text("raise ValueError('no idea')")
    (tmp_path / "accelerated.py").write_text(
        "import os\nraise ValueError([name for name in os.environ if 'ACCELERATE' in name])"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(present, "MODULE", "accelerated")
    with pytest.raises(CifarError, match=r"ValueError: \[\]$"):
        present.present_environment(1)
    monkeypatch.setattr(present, "MODULE", "here")
    assert present.present_environment(1) == expected
    monkeypatch.setattr(present, "MODULE", "broken")
    with pytest.raises(CifarError, match=r"^environment: cannot be read: ValueError: no idea$"):
        present.present_environment(1)


@pytest.mark.parametrize(
    ("code", "error", "kind", "told"),
    [
        (2, "warning\ncifar: model: 'timm:x': no", ConfigError, r"^model: 'timm:x': no$"),
        (1, "ValueError: no idea", CifarError, r"^ValueError: no idea$"),
        (-9, "", CifarError, r"^exit code -9$"),
    ],
)
def test_a_library_s_network_is_asked_for_in_a_process(
    code: int, error: str, kind: type, told: str, monkeypatch
) -> None:
    commands = []

    def run(command, **options):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(present.subprocess, "run", run)
    cells = grid(["timm:x-r64", "resnet20", "timm:x-r64"], ["fp32"], batch_sizes=(8, 16))
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=cells),))
    with pytest.raises(kind, match=told):
        check(expand(suite))
    (command,) = commands
    assert command == ["-m", "cifar", "summary", "timm:x", "--image-size", "32", "--resize", "64"]


# --- Progress ---


def test_a_log_gets_one_line_per_cell(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    execution.execute(run, launch=FakeLaunch("ok", "failed"), present=present_of())
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("[1/2] resnet20 fp32 b64 ... ok 256 images/s 30 s, about ")
    assert first.endswith(" left")
    assert second == "[2/2] resnet18 fp32 b64 ... failed 30 s: why failed"


def test_kept_records_are_shown_as_such(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    capsys.readouterr()
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    lines = capsys.readouterr().err.splitlines()
    assert [" ... kept ok 256 images/s" in line for line in lines] == [True, True]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_display_and_a_line_that_stays(run: Run) -> None:
    stream = Terminal()
    job = Job(task=run.plan.tasks[0])
    with SuiteProgress(2, stream) as progress:
        progress.start(1, "resnet20 [x]", 90.0)
        progress.finish(outcome(record_of(job, status="failed", reason="a [bad] thing")), 60.0)
    text = stream.getvalue()
    assert "[1/2] resnet20 [x] ... failed 1 s: a [bad] thing, about 1 min 00 s left" in text
    assert "about 1 min 30 s left" in text


def test_a_terminal_shows_what_runs_side_by_side() -> None:
    stream = Terminal()
    with SuiteProgress(3, stream, side_by_side=True) as progress:
        progress.start(1, "resnet20 on 0", 90.0)
        progress.start(2, "resnet18 on 1", 60.0)
        assert "[2/3] resnet18 on 1 ... and 1 beside" in stream.getvalue()
        progress.finish("ok", 40.0, 1)
        progress.start(3, "resnet34", 40.0, begins=False)
        progress.finish("kept ok", 40.0, 3)
        progress.finish("ok", None, 2)
    ends = [
        line for line in stream.getvalue().splitlines() if " ... " in line and "beside" not in line
    ]
    assert any("[1/3] resnet20 on 0 ... ok, about 40 s left" in line for line in ends)
    assert any("[3/3] resnet34 ... kept ok, about 40 s left" in line for line in ends)
    assert any("[2/3] resnet18 on 1 ... ok" in line for line in ends)


def test_an_outcome_without_a_rate_still_says_how_long(run: Run) -> None:
    record = record_of(Job(task=run.plan.tasks[0]), measurements=(), reason="exit code 1")
    assert outcome(record) == "ok 1 s (exit code 1)"


def test_an_outcome_tells_what_disturbed_the_cell(run: Run) -> None:
    record = record_of(Job(task=run.plan.tasks[0]), invalid=("a goat", "a duck"))
    assert outcome(record) == "ok 256 images/s 1 s (disturbed: a goat; a duck)"
    later = replace(record, reason="exit code 1")
    assert outcome(later) == "ok 256 images/s 1 s (exit code 1; disturbed: a goat; a duck)"


def test_a_disturbed_cell_is_measured_again(run: Run) -> None:
    first, second = run.plan.tasks
    append_record(run.records_file, record_of(Job(task=first), invalid=("a goat",)))
    append_record(run.records_file, record_of(Job(task=second)))
    assert execution.missing(run, present=present_of()) == [first]
    launch = FakeLaunch()
    records = execution.execute(run, launch=launch, present=present_of())
    assert [job.task for job in launch.jobs] == [first]
    assert all(record.valid for record in records)
    assert execution.missing(run, present=present_of()) == []


# --- Results ---


def test_saving_adds_and_replaces_by_key(tmp_path: Path, run: Run) -> None:
    results = tmp_path / "results"
    execution.execute(run, launch=FakeLaunch("failed", "ok"), present=present_of())
    files = save(run, results)
    assert files == [results / "fake-2c" / "quick.jsonl", results / "fake-2c" / "quick.md"]
    assert [record.status for record in read_records(files[0])] == ["failed", "ok"]
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    other = runs.create(make_suite(("resnet34",)), tmp_path / "runs")
    execution.execute(other, launch=FakeLaunch(), present=present_of())
    for each in (run, other, other):
        save(each, results)
    stored = read_records(files[0])
    assert [record.cell.train.model.label for record in stored] == [
        "resnet20", "resnet18", "resnet34",
    ]  # fmt: skip
    assert {record.status for record in stored} == {"ok"}
    text = files[1].read_text()
    assert text.startswith("# quick\n\n## fake-2c\n")
    assert all(f"| {model} |" in text for model in ("resnet20", "resnet18", "resnet34"))
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["quick.jsonl", "quick.md"]


def test_a_saved_run_replaces_all_repeats_of_its_cells(tmp_path: Path) -> None:
    for repeats in (3, 2):
        run = runs.create(make_suite(("resnet20",), repeats=repeats), tmp_path / "runs")
        execution.execute(run, launch=FakeLaunch(), present=present_of())
        files = save(run, tmp_path / "results")
    assert [record.repeat for record in read_records(files[0])] == [0, 1]
    assert {record.run_id for record in read_records(files[0])} == {run.id}


def test_saved_records_of_other_images_stay(tmp_path: Path, run: Run) -> None:
    results, (first, second) = tmp_path / "results", run.plan.tasks

    def stored(*records: Record) -> list[tuple[str, str, str | None]]:
        """What the results hold once a run of these records is saved."""
        other = runs.create(make_suite(), tmp_path / "runs")
        for record in records:
            append_record(other.records_file, replace(record, run_id=other.id))
        return [
            (record.cell.train.model.label, record.status, record.data and record.data.fingerprint)
            for record in read_records(save(other, results)[0])
        ]

    old, new = (record_of(Job(task=first), data=images(name)) for name in ("old", "new"))
    early = record_of(Job(task=first), status="unsupported", reason="why", data=None)
    beside = record_of(Job(task=second), data=images("old"))
    assert len(stored(old, beside)) == 2
    kept = [("resnet20", "ok", "old"), ("resnet18", "ok", "old"), ("resnet20", "ok", "new")]
    assert stored(new) == kept
    assert stored(new) == kept, "its own place"
    assert stored(early) == [kept[1], ("resnet20", "unsupported", None)], "of unknown images"
    assert stored(old) == [kept[1], kept[0]]


BROKEN = ("failed", "oom", "timeout")


@pytest.mark.parametrize("status", BROKEN)
@pytest.mark.parametrize("seen", [None, "same"])
def test_a_broken_cell_leaves_what_is_stored_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str, seen: str | None
) -> None:
    results, suite = tmp_path / "results", make_suite()
    good, anew = (runs.create(suite, tmp_path / "runs") for _ in range(2))
    first, second = (Job(task=task) for task in good.plan.tasks)
    for job in (first, second):
        append_record(good.records_file, record_of(job, run_id=good.id, data=images("same")))
    facts = images(seen) if seen else None
    broken = record_of(first, run_id=anew.id, status=status, reason="no\nluck", data=facts)
    append_record(anew.records_file, broken)
    append_record(anew.records_file, record_of(second, run_id=anew.id, data=images("same")))
    save(good, results)
    assert capsys.readouterr().out == ""
    stored = read_records(save(anew, results)[0])
    assert [(each.cell.train.model.label, each.status, each.run_id) for each in stored] == [
        ("resnet20", "ok", good.id), ("resnet18", "ok", anew.id),
    ]  # fmt: skip
    line = f"note: resnet20 fp32 b64: {status} (no luck); the results keep what they had of it\n"
    assert capsys.readouterr().out == line


def test_a_broken_record_is_stored_beside_a_finished_repeat_or_where_there_is_nothing_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, suite = tmp_path / "results", make_suite(("resnet20",), repeats=2)

    def stored(*statuses: str, data: DataFacts | None = None) -> list[str]:
        run = runs.create(suite, tmp_path / "runs")
        for task, status in zip(run.plan.tasks, statuses, strict=True):
            reason = "" if status == "ok" else "why"
            record = record_of(Job(task=task), status=status, reason=reason, data=data)
            append_record(run.records_file, record)
        return [record.status for record in read_records(save(run, results)[0])]

    assert stored("timeout", "oom") == ["timeout", "oom"]
    assert stored("failed", "oom") == ["failed", "oom"]
    assert stored("ok", "timeout") == ["ok", "timeout"]
    assert stored("timeout", "ok") == ["timeout", "ok"]
    assert capsys.readouterr().out == ""
    assert stored("failed", "failed") == ["timeout", "ok"]
    assert capsys.readouterr().out.count("note: ") == 1


def test_a_broken_record_of_other_images_is_stored_beside_the_good_ones(tmp_path: Path) -> None:
    suite = make_suite(("resnet20",))
    for status, fingerprint in (("ok", "old"), ("timeout", "new")):
        run = runs.create(suite, tmp_path / "runs")
        job = Job(task=run.plan.tasks[0])
        record = record_of(job, status=status, reason="why", data=images(fingerprint))
        append_record(run.records_file, record)
        path = save(run, tmp_path / "results")[0]
    assert [record.status for record in read_records(path)] == ["ok", "timeout"]


def test_what_is_out_of_memory_is_a_result_of_a_memory_frontier(tmp_path: Path) -> None:
    suite = replace(make_suite(("resnet20",)), name="frontier")
    for status in ("ok", "oom"):
        run = runs.create(suite, tmp_path / "runs")
        job = Job(task=run.plan.tasks[0], suite="frontier")
        record = record_of(job, suite="frontier", status=status, reason="why", run_id=run.id)
        append_record(run.records_file, record)
        path = save(run, tmp_path / "results")[0]
    assert [record.status for record in read_records(path)] == ["oom"]


def test_a_record_that_died_early_goes_with_its_run(tmp_path: Path, run: Run) -> None:
    good, early = (record_of(Job(task=task), run_id=run.id) for task in run.plan.tasks)
    append_record(run.records_file, good)
    append_record(run.records_file, replace(early, status="oom", reason="x", environment=None))
    (jsonl, markdown) = save(run, tmp_path / "results")
    assert [record.environment is None for record in read_records(jsonl)] == [False, True]
    assert "oom: x" in markdown.read_text()


def test_a_run_without_finished_records_is_not_saved(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"has no finished record to save"):
        save(run, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_results_that_cannot_be_written_are_refused(tmp_path: Path, run: Run) -> None:
    execution.execute(run, launch=FakeLaunch(), present=present_of())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"results-dir: '.*file': cannot be written"):
        save(run, tmp_path / "file")


def test_records_without_a_clean_commit_are_noted(run: Run) -> None:
    job = Job(task=run.plan.tasks[0])
    clean = environment(git_sha="abc", git_dirty=False, git_reason="")
    assert uncommitted([record_of(job, environment=clean)]) == ""
    dirty = record_of(job, environment=replace(clean, git_dirty=True))
    assert "uncommitted changes" in uncommitted([dirty])
    assert "no git commit" in uncommitted([dirty, record_of(job)])


def test_the_plan_on_disk_is_plain_json(run: Run) -> None:
    plan = json.loads((run.folder / "run.json").read_text())
    assert plan["suite"] == "quick"
    assert plan["tasks"][0]["cell"]["train"]["model"]["name"] == "resnet20"
    assert os.access(run.folder, os.W_OK)
