"""The loop of a memory frontier: which batch a search probes next depends on what became of those
before, every one of them in fresh processes."""

import sys
from collections.abc import Callable
from functools import partial

from bench.devices import Present
from bench.execution import Launch, measure, taken_up
from bench.frontier_search import FrontierSearch, next_batch, probe
from bench.launchers import launch
from bench.present import present_environment
from bench.progress import SuiteProgress, outcome
from bench.record import Record, Status
from bench.repeats import UNCHANGED, Fingerprints, is_from_here
from bench.runs import Run, latest
from bench.spec import Task

ANSWERS: tuple[Status, ...] = ("ok", "oom")
"""The statuses that tell whether a batch fits; any other one ends its search."""


def execute(
    run: Run,
    *,
    launch: Launch = launch,
    present: Present = present_environment,
    fingerprints: Fingerprints = UNCHANGED,
) -> list[Record]:
    """Do all searches of a memory frontier; the records of their probes, in the order of probing.

    Every record is on disk before the next process starts, and probes that have one from the same
    circumstances are used again. A timeout or a failure is not taken for out of memory: it ends its
    search.

    Raises:
        UserError: another process runs the run, or its folder cannot be written.
    """
    with taken_up(run):
        return _Execution(run, _Known(run, present, fingerprints), launch).all()


def missing(
    run: Run, *, present: Present = present_environment, fingerprints: Fingerprints = UNCHANGED
) -> list[Task]:
    """The probe that every unfinished search goes on with; what comes after it depends on it."""
    search, known = _search(run), _Known(run, present, fingerprints)
    found = (_follow(first, search, known.record) for first in run.plan.tasks)
    return [task for task in found if task is not None]


def _follow(
    first: Task, search: FrontierSearch, record_of: Callable[[Task], Record | None]
) -> Task | None:
    """Do a search until `record_of` gives no record for a probe, which is returned; None: it ended.

    What is no answer ends it.
    """
    fits: dict[int, bool] = {}
    while (batch := next_batch(fits, search)) is not None:
        task = probe(first, batch)
        record = record_of(task)
        if record is None:
            return task
        if record.status not in ANSWERS:
            return None
        fits[batch] = record.status == "ok"
    return None


def _search(run: Run) -> FrontierSearch:
    assert run.plan.frontier is not None, "the run of a memory frontier"
    return run.plan.frontier


class _Known:
    """What the machine is like, and a run's records that can be used again on it."""

    def __init__(self, run: Run, present: Present, fingerprints: Fingerprints) -> None:
        counts = sorted({task.cell.num_processes for task in run.plan.tasks})
        self._environments = {count: present(count) for count in counts}
        self._fingerprints = fingerprints
        self._records = latest(run.records())

    def record(self, task: Task) -> Record | None:
        found = self._records.get(task.key)
        if found is None or found.status not in (*ANSWERS, "unsupported"):
            return None
        here = self._environments[task.cell.num_processes]
        return found if is_from_here(found, here, self._fingerprints) else None


class _Execution:
    """The loop over a run's searches and their probes."""

    def __init__(self, run: Run, known: _Known, launch: Launch) -> None:
        self._run, self._known, self._launch = run, known, launch
        self._done: list[Record] = []

    def all(self) -> list[Record]:
        tasks, search = self._run.plan.tasks, _search(self._run)
        with SuiteProgress(len(tasks), sys.stderr) as progress:
            for number, first in enumerate(tasks, 1):
                _follow(first, search, partial(self._probe, number, progress))
        return self._done

    def _probe(self, number: int, progress: SuiteProgress, task: Task) -> Record:
        """The record of a probe, old or new."""
        progress.start(number, task.cell.label, None)
        kept = self._known.record(task)
        record = kept or measure(self._run, len(self._done) + 1, task, self._launch)
        progress.finish(f"kept {outcome(record)}" if kept else outcome(record), None)
        self._done.append(record)
        return record
