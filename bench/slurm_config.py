"""How the jobs of a run are submitted to SLURM: `bench run --slurm`. No torch."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import tyro

from bench.option_types import CommaList
from bench.spec import Task
from cifar.config import require
from cifar.serialize import STRICT

arg = tyro.conf.arg

SPARE_MINUTES = 10
"""Of a job beyond its cell's time limit, for the start of its node and the end of its processes."""
MOST_MINUTES = 60 * 24 * 365


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """Options of --slurm: every repeat of a cell is a job of one node.

    Raises:
        ConfigError: a number out of range, an option without a name.
    """

    __pydantic_config__: ClassVar = STRICT

    partition: Annotated[str | None, arg(name="slurm-partition", metavar="NAME")] = None
    """Partition of the jobs; the cluster's default when not given."""
    account: Annotated[str | None, arg(name="slurm-account", metavar="NAME")] = None
    """Account that pays for them."""
    minutes: Annotated[int | None, arg(name="slurm-time", metavar="MINUTES")] = None
    """Time limit of a job; ten minutes more than the cell's own --timeout when not given."""
    gpus: Annotated[int | None, arg(name="slurm-gpus", metavar="N")] = None
    """GPUs of a job; one per process when not given, 0 for CPUs."""
    cpus: Annotated[int | None, arg(name="slurm-cpus", metavar="N")] = None
    """CPU cores for each process of a cell; the cluster's default, often one, when not given."""
    setup: Annotated[str | None, arg(name="slurm-setup", metavar="COMMANDS")] = None
    """Shell commands that a job begins with, e.g. 'module load cuda'."""
    options: Annotated[CommaList, arg(name="slurm-options", metavar="NAME=VALUE[,...]")] = ()
    """Further options of sbatch, e.g. constraint=h200,qos=low,requeue."""
    jobs: Annotated[int, arg(name="slurm-jobs", metavar="N")] = 100
    """Jobs that are in SLURM's queue at a time, at most."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("slurm-time", self.minutes, 1, MOST_MINUTES),
            ("slurm-gpus", self.gpus, 0, 1024),
            ("slurm-cpus", self.cpus, 1, 65_536),
            ("slurm-jobs", self.jobs, 1, 100_000),
        ):
            good = value is None or least <= value <= most
            require(good, name, value, f"give {least} to {most}")
        unnamed = [each for each in self.options if not each.partition("=")[0].strip("-")]
        require(not unnamed, "slurm-options", ",".join(self.options), "write NAME=VALUE or NAME")

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are not at their default, by name."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}

    def require_none(self) -> None:
        """Raise a ConfigError that names the first option that is given."""
        for name, value in self.changes.items():
            option = "slurm-time" if name == "minutes" else f"slurm-{name}"
            given = ",".join(value) if isinstance(value, tuple) else value
            require(False, option, given, "is an option of --slurm; give that too")

    def check(self, task: Task) -> None:
        """Raise a ConfigError if a job would have fewer GPUs than its cell has processes."""
        count = task.cell.num_processes
        remedy = f"{task.cell.label} has {count} processes; give as many, or 0 for CPUs"
        require(
            self.gpus in (None, 0) or (self.gpus or 0) >= count, "slurm-gpus", self.gpus, remedy
        )

    def parameters(self, task: Task) -> dict[str, Any]:
        """What sbatch is told of a task's job, as submitit names it."""
        count = task.cell.num_processes
        gpus = count if self.gpus is None else self.gpus
        minutes = self.minutes or math.ceil(task.protocol.timeout / 60) + SPARE_MINUTES
        words = (each.lstrip("-").partition("=") for each in self.options)
        known = {
            "nodes": 1,
            "time": min(minutes, MOST_MINUTES),
            "partition": self.partition,
            "account": self.account,
            "gpus_per_node": gpus or None,
            "cpus_per_task": None if self.cpus is None else self.cpus * count,
            "setup": [self.setup] if self.setup else None,
            "additional_parameters": {
                name: value if equals else True for name, equals, value in words
            }
            or None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def described(self, task: Task) -> str:
        """The same for people."""
        words = (f"{name}={value}" for name, value in self.parameters(task).items())
        return f"SLURM job of {' '.join(words)}"
