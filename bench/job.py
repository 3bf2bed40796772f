"""What a worker is told: the contents of `cell.json`."""

from dataclasses import dataclass
from typing import ClassVar

from bench.spec import Task
from cifar.serialize import STRICT

CELL_FILE = "cell.json"
RECORD_FILE = "record.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One task of one run: the worker reads it from `cell.json` and writes `record.json`."""

    __pydantic_config__: ClassVar = STRICT

    task: Task
    suite: str = ""
    run_id: str = ""
