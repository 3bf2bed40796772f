"""Runs on disk: a folder each, which outlives any crash and can be taken up again.

`runs/<id>/` holds run.json (what was planned), records.jsonl (a line per finished process) and
`cells/<nn>-<slug>/` with what each process was told, wrote and printed.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from bench.frontier_search import FrontierSearch
from bench.record import Record
from bench.record_file import read_records
from bench.slurm_config import SlurmConfig
from bench.spec import Suite, Task, expand
from bench.tuning import Tuning
from cifar import files
from cifar.errors import UserError
from cifar.files import is_file, subfolders, user_path, write_atomic
from cifar.serialize import STRICT, from_json, to_json

RUN_FILE = "run.json"
RECORDS_FILE = "records.jsonl"
CELLS = "cells"
Kind = Literal["run", "frontier", "search"]
_KINDS: dict[Kind, str] = {
    "run": "a run of cells",
    "frontier": "a memory frontier",
    "search": "a search for a recipe",
}
REMEMBERED_RUNS = 10
"""Newest runs whose records serve to estimate durations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """The contents of run.json: what the run is to measure, and how it was asked for."""

    __pydantic_config__: ClassVar = STRICT

    suite: str
    created: str
    """UTC, ISO 8601."""
    argv: tuple[str, ...]
    tasks: tuple[Task, ...]
    """What to measure; of a memory frontier, the first probe of every search."""
    frontier: FrontierSearch | None = None
    """How a memory frontier is searched, by `bench frontier`."""
    tuning: Tuning | None = None
    """What `bench search` tries for a better recipe; the one task holds what all trials share."""
    devices: tuple[str, ...] = ()
    """The devices of this machine that it measures on side by side, as the user named them."""
    slurm: SlurmConfig | None = None
    """How its jobs are submitted to SLURM; None: it measures on this machine."""

    @property
    def kind(self) -> Kind:
        """Which command it is of: a run's tasks are all there is, of others where they start."""
        if self.frontier is not None:
            return "frontier"
        return "run" if self.tuning is None else "search"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run's folder and its plan; the folder's name is the run's id."""

    folder: Path
    plan: RunPlan

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def records_file(self) -> Path:
        """The file that every finished process adds a line to."""
        return self.folder / RECORDS_FILE

    def cell_folder(self, number: int, task: Task) -> Path:
        """Of a task that is measured as the `number`th one, counted from 1."""
        return self.folder / CELLS / f"{number:02d}-{task.slug}"

    def with_timeout(self, seconds: float | None) -> "Run":
        """This run with another time limit per process, or as it is if None; for this time only.

        Raises:
            ConfigError: a value out of range.
        """
        if seconds is None:
            return self
        tasks = tuple(
            replace(task, protocol=replace(task.protocol, timeout=seconds))
            for task in self.plan.tasks
        )
        return replace(self, plan=replace(self.plan, tasks=tasks))

    def records(self) -> list[Record]:
        """All records so far, in the order of the plan; those of one task oldest first.

        Others than a run's come in the order in which they were made.
        All are of this run, though its folder had another name when some were made.
        """
        stored = read_records(self.records_file) if self.records_file.exists() else []
        records = [replace(record, run_id=self.id) for record in stored]
        if self.plan.kind != "run":
            return records
        order = {task.key: number for number, task in enumerate(self.plan.tasks)}
        return sorted(records, key=lambda record: order.get(record.key, len(order)))


def require_kind(run: Run, kind: Kind) -> None:
    """Raise a UserError that names the right command for a run of another kind."""
    own = run.plan.kind
    if own != kind:
        raise UserError(f"run: {run.id!r}: is {_KINDS[own]}; give it to bench {own}")


def check_writable(runs_dir: Path) -> None:
    """Make sure that runs can be written.

    Raises:
        UserError: they cannot.
    """
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        probe = runs_dir / f".{secrets.token_hex(4)}.tmp"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise unwritable(runs_dir, error) from None


def create(
    suite: Suite,
    runs_dir: Path,
    argv: Sequence[str] = (),
    *,
    frontier: FrontierSearch | None = None,
    tuning: Tuning | None = None,
    devices: tuple[str, ...] = (),
    slurm: SlurmConfig | None = None,
) -> Run:
    """Make a new run's folder; its id is UTC time, suite and a random part.

    Raises:
        UserError: the folder cannot be written, or the suite has no or bad cells.
    """
    now = datetime.now(UTC)
    plan = RunPlan(
        suite=suite.name,
        created=now.isoformat(timespec="seconds"),
        argv=tuple(argv),
        tasks=expand(suite),
        frontier=frontier,
        tuning=tuning,
        devices=devices,
        slurm=slurm,
    )
    folder = runs_dir / f"{now:%Y%m%d-%H%M%S}-{suite.name}-{secrets.token_hex(2)}"
    try:
        folder.mkdir(parents=True)
        write_atomic(folder / RUN_FILE, to_json(plan, indent=2) + "\n")
    except OSError as error:
        raise unwritable(runs_dir, error) from None
    return Run(folder=folder, plan=plan)


def unwritable(runs_dir: Path, error: OSError) -> UserError:
    """What to tell of a folder that cannot be written."""
    return UserError(
        f"runs-dir: {str(runs_dir)!r}: cannot be written ({error.strerror}); give another folder"
    )


def find(name: str, runs_dir: Path) -> Run:
    """The run of that id or path.

    Raises:
        UserError: there is none, or its run.json cannot be read.
    """
    path = user_path(name, "run")
    for folder in (runs_dir / path, path):
        if is_file(folder / RUN_FILE, "run"):
            try:
                text = (folder / RUN_FILE).read_bytes()
            except OSError as error:
                raise UserError(
                    f"run: {str(folder / RUN_FILE)!r}: {error.strerror}; give another run"
                ) from None
            plan = from_json(RunPlan, _in_our_words(text), source=str(folder / RUN_FILE))
            return Run(folder=folder.resolve(), plan=plan)
    raise UserError(f"run: {name!r}: no such run in {str(runs_dir)!r}; give its id or its folder")


def _in_our_words(text: bytes) -> bytes:
    """A plan that names its frontier `search` as one of ours, any other as it is."""
    try:
        fields = json.loads(text)
    except ValueError:  # what reads it says what is wrong
        return text
    if not isinstance(fields, dict) or "search" not in fields:
        return text
    if isinstance(tuning := fields.get("tuning"), dict):
        tuning.pop("parallel", None)  # it told how many trials ran side by side
    fields["frontier"] = fields.pop("search")
    return json.dumps(fields).encode()


def run_names(runs_dir: Path) -> list[str]:
    """The ids of all runs that can be read, oldest first.

    Raises:
        UserError: the folder itself cannot be read.
    """
    names = subfolders(runs_dir, "runs-dir")
    return [name for name in names if os.access(runs_dir / name / RUN_FILE, os.R_OK)]


def newest(runs_dir: Path, *, but: Container[str] = ()) -> Run:
    """The run that was made last, of those that are of other suites than `but`.

    Raises:
        UserError: there is none, or its run.json cannot be read.
    """
    for name in reversed(run_names(runs_dir)):
        run = find(name, runs_dir)
        if run.plan.suite not in but:
            return run
    raise UserError(f"run: no run in {str(runs_dir)!r}; start one with bench run")


def history(runs_dir: Path) -> list[Record]:
    """The valid records of the newest runs; a run that cannot be read teaches nothing."""
    records: list[Record] = []
    for name in run_names(runs_dir)[-REMEMBERED_RUNS:]:
        with contextlib.suppress(UserError, OSError):
            records += [record for record in find(name, runs_dir).records() if record.valid]
    return records


def latest(records: Iterable[Record]) -> dict[tuple[str, str, int], Record]:
    """The last record of every key."""
    return {record.key: record for record in records}


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """While entered, no other process may write this run.

    Raises:
        UserError: another process does, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(run.folder))
        except BlockingIOError:
            raise UserError(
                f"run: {run.id!r}: is being run by another process; wait for it"
            ) from None
        except OSError as error:
            raise unwritable(run.folder, error) from None
        yield
