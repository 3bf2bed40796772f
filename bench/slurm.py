"""The jobs of a run on SLURM: submitted, found again, and collected as they end. No torch."""

import math
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from bench.attempt import Attempt, read_attempt, read_result, write_attempt, write_result
from bench.cluster import Slurm, SubmissionError
from bench.devices import Present
from bench.execution import IsCurrent
from bench.job import CELL_FILE, RECORD_FILE, Job
from bench.job_runner import PROGRAM
from bench.launchers import failure
from bench.pool import Ended
from bench.present import present_environment
from bench.record import Environment, Record, Status
from bench.record_file import parse_record
from bench.runs import Run
from bench.slurm_config import SlurmConfig
from bench.spec import Task
from bench.unfinished import explained, is_unfinished
from cifar.errors import UserError
from cifar.files import write_atomic
from cifar.serialize import to_json

POLL_SECONDS = 2.0
"""Between two looks for records."""
ASK_SECONDS = 30.0
"""Between two questions to SLURM, which answers all users of the cluster."""
SETTLE_SECONDS = 30.0
"""After a job has left the queue, for its record to show on this machine and for accounting."""
COMPLETED_SETTLE_SECONDS = 150.0
"""The same of one that has completed, which leaves a record: clients of NFS look at a folder anew
after 60 s by default (acdirmax in nfs(5)), and so does the node that has written it."""
FOLDER = "slurm"
"""In a run's folder: batch scripts and logs of its jobs."""
_STATES: Mapping[str, Status] = {"TIMEOUT": "timeout", "OUT_OF_MEMORY": "oom"}
_LOG_BYTES = 4096


@dataclass(kw_only=True, slots=True)
class _Submitted:
    """A job that has not been collected."""

    job: Job
    folder: Path
    attempt: Attempt
    left: float | None = None
    """When it was first seen to have left the queue."""
    state: str = ""
    """How accounting says that it has ended, once that was asked."""


class SlurmJobs:
    """Every task is a job: of a run that goes on, one that was submitted before is taken up.

    Left before all have ended, it leaves them in the queue.
    """

    side_by_side = True

    def __init__(self, run: Run, config: SlurmConfig, cluster: Slurm) -> None:
        self._config, self._cluster = config, cluster
        self._collected = [replace(record, run_id="") for record in run.records()]
        self._jobs: list[_Submitted] = []
        self._asked = -math.inf
        self._answer: Collection[str] | None = None
        self._told = False

    def start(self, job: Job, folder: Path) -> str | None:
        """Take up a task's job, or submit one if there is room; see `bench.pool.Pool.start`.

        Raises:
            UserError: SLURM has refused it, and none of the run's runs or waits.
        """
        attempt = self._found(job, folder)
        if attempt is None:
            if len(self._jobs) >= self._config.jobs:
                return None
            attempt = self._submitted(job, folder)
        if attempt is None:
            return None
        self._jobs.append(_Submitted(job=job, folder=folder, attempt=attempt))
        return f"SLURM as job {attempt.job_id}"

    def wait(self) -> Sequence[Ended]:
        """See `bench.pool.Pool.wait`."""
        while not (found := self.ended()):
            self._ask()
            time.sleep(POLL_SECONDS)
        return found

    def ended(self) -> Sequence[Ended]:
        """Jobs that have left a record; those that cannot leave one any more are given one."""
        records = [(each, self._record(each)) for each in self._jobs]
        self._jobs = [each for each, record in records if record is None]
        return [Ended(each.job, record) for each, record in records if record is not None]

    def share(self, task: Task) -> None:
        """See `bench.pool.Pool.share`: nobody knows when SLURM starts a job."""

    def __enter__(self) -> "SlurmJobs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def _found(self, job: Job, folder: Path) -> Attempt | None:
        """The attempt at a task that still runs, waits, or has ended and was not collected.

        One whose job was cancelled is none: whoever did that and goes on wants another.
        """
        attempt = read_attempt(folder)
        if attempt is None or not attempt.job_id:
            return None
        result = _result(job, folder, attempt)
        if result is not None:
            return None if replace(result, run_id="") in self._collected else attempt
        queued = self._queued()
        if queued is not None and attempt.job_id not in queued:
            return None if self._cluster.state(attempt.job_id).startswith("CANCELLED") else attempt
        return attempt

    def _submitted(self, job: Job, folder: Path) -> Attempt | None:
        """A new job's; None if SLURM takes no more until others have ended."""
        attempt = Attempt()
        write_attempt(folder, attempt)  # a job whose id gets lost must not measure
        (folder / RECORD_FILE).unlink(missing_ok=True)
        write_atomic(folder / CELL_FILE, to_json(job, indent=2) + "\n")
        command = [sys.executable, "-m", PROGRAM, str(folder), attempt.token]
        try:
            job_id = self._cluster.submit(command, self._config.parameters(job.task))
        except SubmissionError as error:
            if self._jobs:
                return None
            raise UserError(
                f"slurm: {shlex.quote(job.task.cell.label)}: {error}; correct the --slurm-... "
                "options, or go on later with --resume"
            ) from None
        attempt = replace(attempt, job_id=job_id)
        write_attempt(folder, attempt)
        return attempt

    def _queued(self) -> Collection[str] | None:
        """The jobs in the queue, as SLURM said no longer than `ASK_SECONDS` ago."""
        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._answer = self._cluster.queued()  # which may take longer than that
            self._asked = time.monotonic()
        return self._answer

    def _ask(self) -> None:
        """Note which jobs have left the queue, whenever there is a new answer."""
        before, queued = self._asked, self._queued()
        if self._asked == before:
            return
        if queued is None:
            if not self._told:
                print("note: squeue does not answer; no job that dies is noticed", file=sys.stderr)
            self._told = True
            return
        for each in self._jobs:
            if each.attempt.job_id in queued:
                each.left, each.state = None, ""
            elif each.left is None:
                each.left = self._asked

    def _record(self, each: _Submitted) -> Record | None:
        """What has come of a job; None: nothing yet."""
        record = _result(each.job, each.folder, each.attempt)
        if record is not None or each.left is None:
            return record
        waited = time.monotonic() - each.left
        if waited < SETTLE_SECONDS:
            return None
        each.state = each.state or self._cluster.state(each.attempt.job_id)
        if each.state.startswith("COMPLETED") and waited < COMPLETED_SETTLE_SECONDS:
            return None
        record = self._of_dead(each)
        try:
            write_result(each.folder, each.attempt.token, record, replaces=False)
        except FileExistsError:  # it has come after all
            return _result(each.job, each.folder, each.attempt)
        return record

    def _of_dead(self, each: _Submitted) -> Record:
        """Of a job that has ended without a record."""
        job_id, state = each.attempt.job_id, each.state
        status = _STATES.get(state.split()[0], "failed")
        said = _last_line(self._cluster.log(job_id))
        why = f"SLURM job {job_id}: {state.lower()}" + (f": {said}" if said else "")
        record = _of(each.job, _judged(each.job, each.folder, status, why))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return replace(record, started=record.started or now)


def current(present: Present = present_environment) -> IsCurrent:
    """Whether a record is of the code and the packages that are here, on whatever node it is."""
    known: list[Environment] = []

    def is_current(record: Record) -> bool:
        known.extend(() if known else [present(1)])
        (here,), then = known, record.environment
        return (
            then is not None
            and then.code_digest == here.code_digest
            and then.packages == here.packages
        )

    return is_current


def _result(job: Job, folder: Path, attempt: Attempt) -> Record | None:
    """The record that an attempt has left; None: none yet."""
    try:
        record = read_result(folder, attempt.token)
    except ValueError as error:
        return _of(job, failure(job, "failed", f"unreadable: {' '.join(str(error).split())}"))
    if record is not None and record.key != job.task.key:
        why = f"the result is of another cell: {record.cell.label}"
        return _of(job, failure(job, "failed", why))
    return record


def _of(job: Job, record: Record) -> Record:
    return replace(record, suite=job.suite, run_id=job.run_id)


def _judged(job: Job, folder: Path, status: Status, why: str) -> Record:
    """What a job's processes wrote before it ended, and why it did."""
    with suppress(OSError, ValueError):
        record = parse_record((folder / RECORD_FILE).read_text("utf-8"), source=RECORD_FILE)
        if record.key == job.task.key:
            late = not is_unfinished(record)
            end = (record.status, f"{why}, after the record was written") if late else (status, why)
            return explained(record, *end)
    return failure(job, status, why)


def _last_line(path: Path) -> str:
    """Of a log; empty if there is none."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
    return ""
