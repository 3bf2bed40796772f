"""Measuring what a run has planned: once each, on disk at once, and taken up again."""

import contextlib
import errno
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from bench.devices import Machine, Present
from bench.estimate import estimate_seconds
from bench.job import RECORD_FILE, Fault, Job
from bench.launchers import launch
from bench.pool import Ended, LaunchInPlace, Pool, Slots, entered
from bench.present import present_environment
from bench.processes import end_leftovers
from bench.progress import SuiteProgress, outcome
from bench.record import Record
from bench.record_file import append_record, parse_record
from bench.repeats import UNCHANGED, Fingerprints, Key, Standing, interleaved, is_of_images
from bench.runs import CELLS, Run, latest, locked
from bench.spec import Task
from bench.unfinished import is_unfinished
from cifar.errors import OutputError, UserError

WHOLE_MACHINE = Machine()
"""One cell at a time."""

Launch = Callable[[Job, Path], Record]
"""(job, folder for what its processes write) -> its record."""
IsCurrent = Callable[[Record], bool]
"""Whether a record that says what it ran on was taken in the circumstances of now."""


@contextlib.contextmanager
def taken_up(run: Run, *, here: bool = True) -> Iterator[None]:
    """While entered, this process alone measures for a run.

    If it does so on this machine, `here`, what is left of the run's processes is ended, and what
    they had finished is kept.

    Raises:
        UserError: another process does, or the folder cannot be written.
        OutputError: it no longer can, or no process can be started any more.
    """
    with locked(run):
        if here:
            end_leftovers(run.folder)
        try:
            if here:
                _keep_finished(run)
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in (errno.ENOMEM, errno.EAGAIN):  # of a process to be started
                what, remedy = "has no room for another process", "end others"
            else:
                what, remedy = "cannot be written any more", "make room there"
            raise OutputError(
                f"run: {str(run.folder)!r}: {what} ({reason}); {remedy}, then go on with --resume"
            ) from None


def _keep_finished(run: Run) -> None:
    """Append records that workers have finished after the program that started them was killed."""
    known = {(each.key, each.environment.started) for each in run.records() if each.environment}
    for path in sorted(run.folder.glob(f"{CELLS}/*/{RECORD_FILE}")):
        with contextlib.suppress(UserError, ValueError):  # it is measured again
            record = parse_record(path.read_text("utf-8"), source=RECORD_FILE)
            if record.environment is None or is_unfinished(record):
                continue
            if (record.key, record.environment.started) not in known:
                append_record(run.records_file, record)
                print(f"note: kept what {record.cell.label} had measured", file=sys.stderr)


def release(run: Run) -> None:
    """End what a start of the run that was killed has left here, which holds its devices.

    Raises:
        UserError: another process runs this run, or its folder cannot be written.
    """
    with taken_up(run):
        pass


def execute(
    run: Run,
    *,
    launch: LaunchInPlace = launch,
    present: Present = present_environment,
    past: Sequence[Record] = (),
    fingerprints: Fingerprints = UNCHANGED,
    machine: Machine = WHOLE_MACHINE,
) -> list[Record]:
    """Measure on this machine what has no record that can be used again; see `execute_in`.

    `present` tells what a worker of so many processes runs on now, and is asked only if there are
    records.

    Raises:
        UserError: another process runs this run, or its folder cannot be written.
        OutputError: it no longer can.
    """
    with taken_up(run):
        standing = _standing(run, _is_from_here(run, present, machine), fingerprints)
        return _Execution(run, Slots(machine, launch), standing, past).all()


def execute_in(
    pool: Pool,
    run: Run,
    *,
    is_current: IsCurrent,
    past: Sequence[Record] = (),
    fingerprints: Fingerprints = UNCHANGED,
) -> list[Record]:
    """Measure elsewhere what has no record that can be used again, in the plan's order.

    There is one record per task, but none of a task that nobody needs as its cell is known well
    enough (`Protocol.target_interval`). Tasks are started in the order of
    `bench.repeats.interleaved`. Every record is on disk before another process takes its place.
    `past` records serve to estimate durations; `fingerprints` tell which images there are now.

    Raises:
        UserError: another process runs this run, or its folder cannot be written.
        OutputError: it no longer can.
    """
    with taken_up(run, here=False):
        return _Execution(run, pool, _standing(run, is_current, fingerprints), past).all()


def measure(
    run: Run,
    number: int,
    task: Task,
    launch: Launch,
    fault: Fault | None = None,
) -> Record:
    """Measure a task as the run's `number`th; its record is on disk when this returns.

    Raises:
        OSError: the run's folder cannot be written.
    """
    record = launch(job_of(run, task, fault), run.cell_folder(number, task))
    append_record(run.records_file, record)
    return record


def missing(
    run: Run,
    *,
    present: Present = present_environment,
    fingerprints: Fingerprints = UNCHANGED,
    machine: Machine = WHOLE_MACHINE,
) -> list[Task]:
    """The tasks that `execute` would measure, in its order; fewer if it comes to know enough."""
    return missing_of(
        run, is_current=_is_from_here(run, present, machine), fingerprints=fingerprints
    )


def missing_of(
    run: Run, *, is_current: IsCurrent, fingerprints: Fingerprints = UNCHANGED
) -> list[Task]:
    """The same of `execute_in`."""
    standing = _standing(run, is_current, fingerprints)
    return [task for task in interleaved(run.plan.tasks) if standing.needs(task)]


def job_of(run: Run, task: Task, fault: Fault | None = None) -> Job:
    """A task of a run, as its worker reads it."""
    return Job(task=task, suite=run.plan.suite, run_id=run.id, fault=fault)


class _Execution:
    """The loop over a run's tasks."""

    def __init__(self, run: Run, pool: Pool, standing: Standing, past: Sequence[Record]) -> None:
        self._run, self._pool, self._standing = run, pool, standing
        self._known = [*past, *run.records()]
        order = interleaved(run.plan.tasks)
        self._numbers = {task.key: number for number, task in enumerate(order, 1)}
        self._folders = {task.key: number for number, task in enumerate(run.plan.tasks, 1)}
        self._waiting = deque(order)
        self._running: dict[Key, Task] = {}
        self._found: dict[Key, Record] = {}
        self._progress = SuiteProgress(len(order), sys.stderr, side_by_side=pool.side_by_side)

    def all(self) -> list[Record]:
        """Everything that is needed; if that is cut short, what had ended by then is kept."""
        with self._progress, entered(self._pool, self._keep):
            self._loop()
        found = (self._found.get(task.key) for task in self._run.plan.tasks)
        return [record for record in found if record is not None]

    def _loop(self) -> None:
        while True:
            while self._waiting and self._is_settled(self._waiting[0]):
                self._waiting.popleft()
            if not self._running:
                return
            self._keep(self._pool.wait())

    def _is_settled(self, task: Task) -> bool:
        """Start a task if it is needed and there is room for it; False: there is none yet."""
        if kept := self._standing.kept.get(task.key):
            self._found[task.key] = kept
            self._tell(task, f"kept {outcome(kept)}")
        elif (within := self._standing.known_within(task)) is not None:
            self._tell(task, f"not needed, known to within {within:.1%}")
        else:
            folder = self._run.cell_folder(self._folders[task.key], task)
            place = self._pool.start(job_of(self._run, task), folder)
            if place is None:
                return False
            self._running[task.key] = task
            left = self._seconds_left(islice(self._waiting, 1, None))
            self._progress.start(self._numbers[task.key], _label(task, place), left)
        return True

    def _tell(self, task: Task, text: str) -> None:
        """Of the first of those that wait, which is not started."""
        left = self._seconds_left(islice(self._waiting, 1, None))
        self._progress.start(self._numbers[task.key], _label(task), left, begins=False)
        self._progress.finish(text, left, self._numbers[task.key])

    def _keep(self, ended: Sequence[Ended]) -> None:
        """Write down what has come of jobs."""
        for job, record in ended:
            append_record(self._run.records_file, record)
            key = job.task.key
            self._running.pop(key, None)
            self._known.append(record)
            self._found[key] = record
            self._standing.add(record)
            left = self._seconds_left(self._waiting)
            self._progress.finish(outcome(record), left, self._numbers[key])

    def _seconds_left(self, waiting: Iterable[Task]) -> float | None:
        """Expected seconds for what runs, from its start, and what waits; None: nobody knows."""
        needed = (task for task in waiting if self._standing.needs(task))
        counts = Counter(
            (task.cell, task.protocol, self._pool.share(task))
            for task in chain(self._running.values(), needed)
        )
        total = 0.0
        for (cell, protocol, share), count in counts.items():
            if share is None:
                return None
            total += share * count * estimate_seconds(cell, protocol, history=self._known)
        return total


def _label(task: Task, place: str = "") -> str:
    repeat = f" repeat {task.repeat}" if task.repeat else ""
    return f"{task.cell.label}{repeat}" + (f" on {place}" if place else "")


def _is_from_here(run: Run, present: Present, machine: Machine) -> IsCurrent:
    """Whether a record was taken in what a worker would run in on this machine now."""
    counts = {record.cell.num_processes for record in run.records() if record.environment}
    known = {
        count: machine.first_place(count).environment(present, count) for count in sorted(counts)
    }

    def is_current(record: Record) -> bool:
        assert record.environment is not None
        return record.environment.key() == known[record.cell.num_processes].key()

    return is_current


def _standing(run: Run, is_current: IsCurrent, fingerprints: Fingerprints) -> Standing:
    """What the run has, and what of it can be used again; nothing disturbed can."""
    old = latest(run.records())
    kept = {
        key: record
        for key, record in old.items()
        if record.environment
        and record.finished
        and record.valid
        and is_of_images(record, fingerprints)
        and is_current(record)
    }
    return Standing(old, kept)
