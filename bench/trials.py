"""The loop of a search: which trial is started next depends on what became of those before, every
one of them in fresh processes, and as many at the same time as there are devices for."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.console import plural
from bench.devices import Machine, Present
from bench.execution import WHOLE_MACHINE, job_of, taken_up
from bench.job import RECORD_FILE, Job
from bench.launchers import launch
from bench.pool import Ended, LaunchInPlace, Slots, entered
from bench.present import present_environment
from bench.progress import SuiteProgress
from bench.record import Environment, Record
from bench.record_file import append_record, parse_record
from bench.repeats import UNCHANGED, Fingerprints
from bench.runs import Run
from bench.sampler import verdict
from bench.spec import Task
from bench.trial_plan import TrialPlan, known_records
from bench.tuning import Trial, curve_of, told_by
from bench.unfinished import is_unfinished
from cifar.config import TrainConfig
from cifar.progress import format_duration


def execute(
    run: Run,
    *,
    launch: LaunchInPlace = launch,
    present: Present = present_environment,
    fingerprints: Fingerprints = UNCHANGED,
    machine: Machine = WHOLE_MACHINE,
) -> list[Record]:
    """Do what is left of a search; the records of its trials, by their number.

    Every record is on disk before its place is given to another trial, and trials that have one
    from the same circumstances are not run again, unless they failed or timed out.

    Raises:
        UserError: another process runs the run, or its folder cannot be written.
    """
    with taken_up(run):
        known = known_records(run, _here(run, present, machine), fingerprints)
        return _Execution(run, machine, launch, known).all()


def missing(
    run: Run,
    *,
    present: Present = present_environment,
    fingerprints: Fingerprints = UNCHANGED,
    machine: Machine = WHOLE_MACHINE,
) -> tuple[list[Task], int]:
    """The trial that the search goes on with, none if it is over; and how many are left."""
    plan = TrialPlan(run, known_records(run, _here(run, present, machine), fingerprints))
    left, following = plan.left, plan.next(())
    return ([] if following is None else [following], left)


def _here(run: Run, present: Present, machine: Machine) -> Environment:
    processes = run.plan.tasks[0].cell.num_processes
    return machine.first_place(processes).environment(present, processes)


class _Execution:
    """The loop over trials; a thread waits for each, and this one alone proposes and prints."""

    def __init__(
        self, run: Run, machine: Machine, launch: LaunchInPlace, known: dict[int, Record]
    ) -> None:
        self._run = run
        (self._base,) = run.plan.tasks
        self._plan = TrialPlan(run, known)
        self._pool = Slots(machine, launch, self._watcher)
        self._records = dict(known)
        self._running: dict[int, TrainConfig] = {}
        self._seconds: list[float] = []
        trials, beside = self._plan.tuning.trials, self._pool.side_by_side
        self._progress = SuiteProgress(trials, sys.stderr, side_by_side=beside)

    def all(self) -> list[Record]:
        """Everything that is left; if that is cut short, what had ended by then is kept."""
        if kept := len(self._plan.answered):
            print(f"kept {plural(kept, 'trial')}", file=sys.stderr)
        with self._progress, entered(self._pool, self._keep):
            self._loop()
        return [self._records[number] for number in sorted(self._records)]

    def _loop(self) -> None:
        while True:
            while self._pool.has_room(self._base) and (task := self._next()) is not None:
                self._start(task)
            if not self._running:
                return
            self._keep(self._pool.wait())

    def _next(self) -> Task | None:
        return self._plan.next([*self._running.values()])

    def _start(self, task: Task) -> None:
        number, train = task.repeat + 1, task.cell.train
        folder = self._run.cell_folder(number, task)
        place = self._pool.start(job_of(self._run, task), folder)
        self._running[task.repeat] = train
        label = self._plan.label(train) + (f" on {place}" if place else "")
        self._progress.start(number, label, self._seconds_left())

    def _keep(self, ended: Sequence[Ended]) -> None:
        """Write down what has come of trials."""
        for _, record in ended:
            append_record(self._run.records_file, record)
            self._plan.add(record)
            self._records[record.repeat] = record
            self._running.pop(record.repeat, None)
            self._seconds.append(record.duration_s)
            became = told(told_by(record), record.duration_s)
            self._progress.finish(became, self._seconds_left(), record.repeat + 1)

    def _watcher(self, job: Job) -> "Watcher":
        """Ends a trial that is worse than others."""
        return Watcher(partial(self._verdict, job.task.cell.train.recipe.epochs))

    def _verdict(self, epochs: int, curve: Sequence[float]) -> str:
        return verdict(self._plan.tuning, list(self._plan.trials.values()), curve, epochs)

    def _seconds_left(self) -> float | None:
        """If those that run and are to come take as long as those so far; None: there were none."""
        if not self._seconds:
            return None
        each = sum(self._seconds) / len(self._seconds)
        left = self._plan.left + len(self._running)
        return left * each * self._pool.share(self._base)


class Watcher:
    """Looks at a trial's record while it runs; ends the trial if others are better."""

    def __init__(self, judge: Callable[[Sequence[float]], str]) -> None:
        self._judge = judge
        self._written = 0
        self._epochs = 0

    def __call__(self, folder: Path) -> str:
        """Why to end the trial, after the first epoch for which there is a reason; else ""."""
        curve = self._curve(folder / RECORD_FILE)
        before, self._epochs = self._epochs, max(self._epochs, len(curve))
        whys = (self._judge(curve[:count]) for count in range(before + 1, len(curve) + 1))
        return next(filter(None, whys), "")

    def _curve(self, path: Path) -> Sequence[float]:
        """What the record tells that a worker keeps on its way; empty if it is an old one."""
        if not path.exists() or path.stat().st_mtime_ns == self._written:
            return ()
        self._written = path.stat().st_mtime_ns
        record = parse_record(path.read_text("utf-8"), source=RECORD_FILE)
        return curve_of(record) if is_unfinished(record) else ()


def told(trial: Trial, seconds: float) -> str:
    """What became of a trial: `top-1 83.12% 35 s`, `failed 8 s: ValueError: ...`."""
    duration = format_duration(seconds)
    if trial.state == "finished" and trial.top1 is not None:
        return f"top-1 {trial.top1:.2%} {duration}"
    if trial.state == "pruned":
        return f"{trial.reason} ({duration})"
    return f"{trial.state} {duration}: {trial.reason}"
