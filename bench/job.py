"""What a worker is told: the contents of `cell.json`."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from bench.spec import Task
from cifar.config import require
from cifar.serialize import STRICT

CELL_FILE = "cell.json"
RECORD_FILE = "record.json"
LAUNCHED = "BENCH_LAUNCHED"
"""Environment variable: when the processes were started, in seconds of `time.monotonic`, a clock
that all processes of a machine share."""
SIDE_BY_SIDE = "BENCH_SIDE_BY_SIDE"
"""Environment variable: how many devices of this machine the run measures on at the same time, see
`bench.devices`; 1 if it is not set."""

DEVICE = "BENCH_DEVICE"
"""Environment variable: the kind of device that was named for these processes, `cuda` or `cpu`; not
set where none was named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What a worker does wrong on purpose, so that `bench selfcheck` can see whether it shows.

    `sleep` and `matmul` add about `seconds` to every training step; `wrong-dtype` runs the model
    under bf16 autocast, whatever was asked.

    Raises:
        ConfigError: seconds that do not fit the kind.
    """

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["sleep", "matmul", "wrong-dtype"]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "wrong-dtype":
            require(self.seconds == 0, "fault seconds", self.seconds, "a wrong dtype takes none")
        else:
            good = 0 < self.seconds < math.inf
            require(good, "fault seconds", self.seconds, "give a positive number")

    @property
    def label(self) -> str:
        """For people: `sleep:0.05`, `wrong-dtype`."""
        return f"{self.kind}:{self.seconds:g}" if self.seconds else self.kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One task of one run: the worker reads it from `cell.json` and writes `record.json`."""

    __pydantic_config__: ClassVar = STRICT

    task: Task
    suite: str = ""
    run_id: str = ""
    fault: Fault | None = None
