"""The loop of a search: which trial is started next depends on what became of those before, every
one of them in fresh processes, and as many at the same time as there are devices for."""

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from bench.console import plural
from bench.devices import Present
from bench.execution import measure, taken_up
from bench.job import RECORD_FILE
from bench.launchers import environment_for, launch
from bench.pool import LaunchInPlace
from bench.present import present_environment
from bench.progress import SuiteProgress
from bench.record import Environment, Record
from bench.record_file import parse_record
from bench.repeats import UNCHANGED, Fingerprints
from bench.runs import Run
from bench.sampler import verdict
from bench.spec import Task
from bench.trial_plan import TrialPlan, known_records, tuning_of
from bench.tuning import Trial, Tuning, curve_of, told_by
from bench.unfinished import is_unfinished
from cifar.config import require
from cifar.progress import format_duration

Variables = Mapping[str, str]


def execute(
    run: Run,
    *,
    launch: LaunchInPlace = launch,
    present: Present = present_environment,
    fingerprints: Fingerprints = UNCHANGED,
    parallel: int | None = None,
) -> list[Record]:
    """Do what is left of a search; the records of its trials, by their number.

    Every record is on disk before its place is given to another trial, and trials that have one
    from the same circumstances are not run again, unless they failed or timed out. `parallel`
    trials run at the same time, if None as many as the search asks for.

    Raises:
        ConfigError: there are fewer GPUs than that.
        UserError: another process runs the run, or its folder cannot be written.
    """
    processes = run.plan.tasks[0].cell.num_processes
    with taken_up(run):
        here = present(processes)
        taken = places(tuning_of(run), parallel, processes, here, os.environ)
        return _Execution(run, launch, known_records(run, here, fingerprints), taken).all()


def missing(
    run: Run, *, present: Present = present_environment, fingerprints: Fingerprints = UNCHANGED
) -> tuple[list[Task], int]:
    """The trial that the search goes on with, none if it is over; and how many are left."""
    here = present(run.plan.tasks[0].cell.num_processes)
    plan = TrialPlan(run, known_records(run, here, fingerprints))
    left, following = plan.left, plan.next(())
    return ([] if following is None else [following], left)


def places(
    tuning: Tuning,
    parallel: int | None,
    processes: int,
    here: Environment,
    environ: Mapping[str, str],
) -> list[Variables]:
    """The variables of each of the trials that run at the same time: its GPUs and share of cores.

    Trials have so many `processes`; `parallel` of them at the same time, or as many as the search
    asks for if None.

    Raises:
        ConfigError: there are fewer GPUs than that.
    """
    require(parallel is None or parallel >= 1, "parallel", parallel, "give 1 or more")
    asked = tuning.parallel if parallel is None else parallel
    most = max(1, here.gpu_count // processes)
    count = asked or most
    require(
        not here.gpu_count or count <= most,
        "parallel",
        count,
        f"this machine's GPUs ({here.gpu_count}) are enough for {most} with {processes} process"
        f"{'es' * (processes > 1)} each; give at most that",
    )
    if count == 1:
        return [{}]
    threads = environment_for(processes * count, environ)["OMP_NUM_THREADS"]
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else list(map(str, range(here.gpu_count)))
    return [
        {"OMP_NUM_THREADS": threads}
        | (
            {
                "CUDA_VISIBLE_DEVICES": ",".join(gpus[place * processes :][:processes]).replace(
                    " ", ""
                )
            }
            if here.gpu_count
            else {}
        )
        for place in range(count)
    ]


class _Execution:
    """The loop over trials; a thread waits for each, and this one alone proposes and prints."""

    def __init__(
        self, run: Run, launch: LaunchInPlace, known: dict[int, Record], taken: list[Variables]
    ) -> None:
        self._run, self._launch, self._places = run, launch, taken
        self._plan = TrialPlan(run, known)
        self._records = dict(known)
        self._seconds: list[float] = []
        self._stopping = threading.Event()

    def all(self) -> list[Record]:
        if kept := len(self._plan.answered):
            print(f"kept {plural(kept, 'trial')}", file=sys.stderr)
        with (
            SuiteProgress(self._plan.tuning.trials, sys.stderr) as progress,
            ThreadPoolExecutor(len(self._places)) as pool,
        ):
            try:
                self._loop(pool, progress)
            finally:
                self._stopping.set()  # whatever still runs is ended before the pool is left
        return [self._records[number] for number in sorted(self._records)]

    def _loop(self, pool: ThreadPoolExecutor, progress: SuiteProgress) -> None:
        free = list(self._places)
        running: dict[Future[Record], tuple[Task, Variables]] = {}
        while True:
            while free and (task := self._next(running)) is not None:
                place = free.pop(0)
                running[pool.submit(self._one, task, place)] = task, place
                if len(self._places) == 1:
                    self._start(progress, task)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, place = running.pop(future)
                free.append(place)
                self._finish(progress, task, future.result())

    def _next(self, running: Mapping[Future[Record], tuple[Task, Variables]]) -> Task | None:
        return self._plan.next([task.cell.train for task, _ in running.values()])

    def _one(self, task: Task, place: Variables) -> Record:
        """Train a trial; its record is on disk when this returns."""
        watch = Watcher(self._stopping, partial(self._verdict, task))
        launch = partial(self._launch, variables=place, watch=watch)
        return measure(self._run, task.repeat + 1, task, launch)

    def _verdict(self, task: Task, curve: Sequence[float]) -> str:
        trials, epochs = list(self._plan.trials.values()), task.cell.train.recipe.epochs
        return verdict(self._plan.tuning, trials, curve, epochs)

    def _start(self, progress: SuiteProgress, task: Task) -> None:
        label = self._plan.label(task.cell.train)
        progress.start(task.repeat + 1, label, self._seconds_left())

    def _finish(self, progress: SuiteProgress, task: Task, record: Record) -> None:
        self._plan.add(record)
        self._records[record.repeat] = record
        self._seconds.append(record.duration_s)
        if len(self._places) > 1:  # lines of trials that run side by side would mix
            self._start(progress, task)
        progress.finish(told(told_by(record), record.duration_s), self._seconds_left())

    def _seconds_left(self) -> float | None:
        """If the trials to come take as long as those so far; None: there were none."""
        if not self._seconds:
            return None
        return self._plan.left * sum(self._seconds) / len(self._seconds) / len(self._places)


class Watcher:
    """Looks at a trial's record while it runs; ends the trial if others are better, or all stop."""

    def __init__(self, stopping: threading.Event, judge: Callable[[Sequence[float]], str]) -> None:
        self._stopping, self._judge = stopping, judge
        self._written = 0
        self._epochs = 0

    def __call__(self, folder: Path) -> str:
        """Why to end the trial, after the first epoch for which there is a reason; else "".

        Raises:
            CancelledError: the search stops.
        """
        if self._stopping.is_set():
            raise CancelledError
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
    if trial.top1 is not None:
        return f"top-1 {trial.top1:.2%} {duration}"
    if trial.state == "pruned":
        return f"{trial.reason} ({duration})"
    return f"{trial.state} {duration}: {trial.reason}"
