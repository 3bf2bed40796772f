"""Measuring what a run has planned: once each, on disk before the next, and taken up again."""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.estimate import estimate_seconds
from bench.job import Fault, Job
from bench.launchers import launch
from bench.present import present_environment
from bench.processes import end_leftovers
from bench.progress import SuiteProgress, outcome
from bench.record import Environment, Record
from bench.record_file import append_record
from bench.repeats import UNCHANGED, Fingerprints, Standing, interleaved, is_from_here
from bench.runs import Run, latest, locked
from bench.spec import Task
from cifar.errors import OutputError

Launch = Callable[[Job, Path], Record]
"""(job, folder for what its processes write) -> its record."""
Present = Callable[[int], Environment]
"""Number of processes -> what a worker of so many runs on now."""


@contextlib.contextmanager
def taken_up(run: Run) -> Iterator[None]:
    """While entered, this process alone measures for a run, whose leftover processes are ended.

    Raises:
        UserError: another process does, or the folder cannot be written.
        OutputError: it no longer can.
    """
    with locked(run):
        end_leftovers(run.folder)
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(
                f"run: {str(run.folder)!r}: cannot be written any more ({reason}); make room "
                "there, then go on with --resume"
            ) from None


def execute(
    run: Run,
    *,
    launch: Launch = launch,
    present: Present = present_environment,
    past: Sequence[Record] = (),
    fingerprints: Fingerprints = UNCHANGED,
) -> list[Record]:
    """Measure what has no record that can be used again; returns the records in the plan's order.

    There is one per task, but none of a task that nobody needs as its cell is known well enough
    (`Protocol.target_interval`). Tasks are measured in the order of `bench.repeats.interleaved`.
    Every record is on disk before the next process starts. `past` records serve to estimate
    durations; `present` tells what a worker of so many processes runs on now, and is asked only
    if there are records; `fingerprints` tell which images there are now.

    Raises:
        UserError: another process runs this run, or its folder cannot be written.
        OutputError: it no longer can.
    """
    with taken_up(run):
        return _Execution(run, launch, _standing(run, present, fingerprints), past).all()


def measure(
    run: Run, number: int, task: Task, launch: Launch, fault: Fault | None = None
) -> Record:
    """Measure a task as the run's `number`th; its record is on disk when this returns.

    Raises:
        OSError: the run's folder cannot be written.
    """
    job = Job(task=task, suite=run.plan.suite, run_id=run.id, fault=fault)
    record = launch(job, run.cell_folder(number, task))
    append_record(run.records_file, record)
    return record


def missing(
    run: Run, *, present: Present = present_environment, fingerprints: Fingerprints = UNCHANGED
) -> list[Task]:
    """The tasks that `execute` would measure, in its order; fewer if it comes to know enough."""
    standing = _standing(run, present, fingerprints)
    return [task for task in interleaved(run.plan.tasks) if standing.needs(task)]


class _Execution:
    """The loop over a run's tasks."""

    def __init__(
        self, run: Run, launch: Launch, standing: Standing, past: Sequence[Record]
    ) -> None:
        self._run = run
        self._launch = launch
        self._standing = standing
        self._known = [*past, *run.records()]
        self._order = interleaved(run.plan.tasks)

    def all(self) -> list[Record]:
        found: dict[tuple[str, str, int], Record] = {}
        with SuiteProgress(len(self._order), sys.stderr) as progress:
            for position, task in enumerate(self._order):
                if record := self._one(position, progress):
                    found[task.key] = record
        return [found[task.key] for task in self._run.plan.tasks if task.key in found]

    def _one(self, position: int, progress: SuiteProgress) -> Record | None:
        task = self._order[position]
        label = task.cell.label + (f" repeat {task.repeat}" if task.repeat else "")
        progress.start(position + 1, label, self._seconds_from(position))
        if kept := self._standing.kept.get(task.key):
            progress.finish(f"kept {outcome(kept)}", self._seconds_from(position + 1))
            return kept
        if (within := self._standing.known_within(task)) is not None:
            text = f"not needed, known to within {within:.1%}"
            progress.finish(text, self._seconds_from(position + 1))
            return None
        number = self._run.plan.tasks.index(task) + 1
        record = measure(self._run, number, task, self._launch)
        self._known.append(record)
        self._standing.add(record)
        progress.finish(outcome(record), self._seconds_from(position + 1))
        return record

    def _seconds_from(self, position: int) -> float:
        """Expected seconds for the task at `position` and those after it."""
        needed = (task for task in self._order[position:] if self._standing.needs(task))
        counts = Counter((task.cell, task.protocol) for task in needed)
        return sum(
            count * estimate_seconds(*which, history=self._known) for which, count in counts.items()
        )


def _standing(run: Run, present: Present, fingerprints: Fingerprints) -> Standing:
    """What the run has, and what of it can be used again here and now; nothing disturbed can."""
    old = latest(run.records())
    counts = {record.cell.num_processes for record in old.values() if record.environment}
    environments = {count: present(count) for count in sorted(counts)}
    kept = {
        key: record
        for key, record in old.items()
        if record.environment
        and record.finished
        and record.valid
        and is_from_here(record, environments[record.cell.num_processes], fingerprints)
    }
    return Standing(old, kept)
