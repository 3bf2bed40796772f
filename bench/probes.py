"""The loop of a memory frontier: which batch a search probes next depends on what became of those
before, every one of them in fresh processes."""

import sys
from dataclasses import replace
from pathlib import Path

from bench.frontier import Search, next_batch, probe
from bench.job import Job
from bench.launchers import launch
from bench.present import present_environment
from bench.progress import SuiteProgress, outcome
from bench.record import Environment, Record, Status
from bench.runs import Launch, Present, Run, is_from_here, latest, measure, taken_up
from bench.spec import Task

ANSWERS: tuple[Status, ...] = ("ok", "oom")
"""The statuses that tell whether a batch fits; any other one ends its search."""


def execute(
    run: Run,
    *,
    launch: Launch = launch,
    present: Present = present_environment,
) -> list[Record]:
    """Do all searches of a memory frontier; the records of their probes, in the order of probing.

    Every record is on disk before the next process starts, and probes that have one from the same
    circumstances are used again. A timeout or a failure is not taken for out of memory: it ends its
    search.

    Raises:
        UserError: another process runs the run, or its folder cannot be written.
    """
    assert run.plan.search is not None, "the run of a memory frontier"
    with taken_up(run):
        return _Searches(run, run.plan.search, launch, present).all()


class _Searches:
    """The loop over a run's searches and their probes."""

    def __init__(self, run: Run, search: Search, launch: Launch, present: Present) -> None:
        self._run, self._search = run, search
        counts = sorted({task.cell.num_processes for task in run.plan.tasks})
        self._environments = {count: present(count) for count in counts}
        self._process = launch
        self._old = latest(run.records())
        self._done: list[Record] = []

    def all(self) -> list[Record]:
        tasks = self._run.plan.tasks
        with SuiteProgress(len(tasks), sys.stderr) as progress:
            for number, first in enumerate(tasks, 1):
                self._one(number, first, progress)
        return self._done

    def _one(self, number: int, first: Task, progress: SuiteProgress) -> None:
        fits: dict[int, bool] = {}
        while (batch := next_batch(fits, self._search)) is not None:
            record = self._probe(number, probe(first, batch), progress)
            self._done.append(record)
            if record.status not in ANSWERS:
                return
            fits[batch] = record.status == "ok"

    def _probe(self, number: int, task: Task, progress: SuiteProgress) -> Record:
        """The record of a probe, old or new."""
        progress.start(number, task.cell.label, None)
        kept = self._old.get(task.key)
        usable = kept and kept.status in (*ANSWERS, "unsupported")
        if kept and usable and is_from_here(kept, self._here(task)):
            progress.finish(f"kept {outcome(kept)}", None)
            return kept
        record = measure(self._run, len(self._done) + 1, task, self._launch)
        progress.finish(outcome(record), None)
        return record

    def _launch(self, job: Job, folder: Path) -> Record:
        """Measure; a process that ran out of memory before it said where it ran, ran here."""
        record = self._process(job, folder)
        return replace(record, environment=record.environment or self._here(job.task))

    def _here(self, task: Task) -> Environment:
        return self._environments[task.cell.num_processes]
