"""A task's job on a cluster, as files in the task's folder: what was submitted, what came of it.

`attempt.json` names the job and a token; the job writes `result-<token>.json`, which is a record
and nothing else: no pickle is ever written or read. So a job that is not the newest is told apart,
and a suite that was killed finds its jobs again. No torch.
"""

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bench.record import Record
from bench.record_file import parse_record
from cifar.errors import UserError
from cifar.files import write_atomic
from cifar.serialize import STRICT, from_json, to_json

ATTEMPT_FILE = "attempt.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One submission of a task."""

    __pydantic_config__: ClassVar = STRICT

    token: str = field(default_factory=lambda: secrets.token_hex(4))
    job_id: str = ""
    """The cluster's; empty: it has not said it yet."""


def result_file(folder: Path, token: str) -> Path:
    """Where the record of an attempt is."""
    return folder / f"result-{token}.json"


def write_attempt(folder: Path, attempt: Attempt) -> None:
    """Make an attempt the newest of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ATTEMPT_FILE, to_json(attempt) + "\n")


def read_attempt(folder: Path) -> Attempt | None:
    """The newest attempt of a task; None: there was none, or nobody can read what it was."""
    try:
        return from_json(Attempt, (folder / ATTEMPT_FILE).read_bytes(), source=ATTEMPT_FILE)
    except (OSError, UserError):
        return None


def write_result(folder: Path, token: str, record: Record, *, replaces: bool = True) -> None:
    """Say what came of an attempt; raises as `cifar.files.write_atomic`."""
    write_atomic(result_file(folder, token), to_json(record) + "\n", replaces=replaces)


def read_result(folder: Path, token: str) -> Record | None:
    """What came of an attempt; None: nothing yet.

    Raises:
        ValueError: it is no record.
    """
    path = result_file(folder, token)
    with suppress(OSError):
        list(folder.iterdir())  # or a network file system goes on saying that it is not there
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    return parse_record(text, source=path.name)
