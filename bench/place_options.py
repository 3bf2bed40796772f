"""The options of `bench run` that say where cells are measured, and what follows from them."""

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from bench.option_types import CommaList, Flag
from bench.runs import RunPlan
from bench.slurm_config import SlurmConfig
from cifar.config import require


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """Where the cells are measured; one at a time on this machine when nothing is given.

    Raises:
        ConfigError: options of SLURM without --slurm, or devices with it.
    """

    devices: CommaList = ()
    """Measure side by side, one process per device: GPUs by number or UUID, e.g. 0,1,2,3, or groups
    of cores, e.g. cpu:0-3,cpu:4-7."""
    slurm: Flag = False
    """Submit every repeat of a cell as a job to SLURM, and collect the records; the run's folder
    must be on a file system that the nodes share."""
    config: Annotated[SlurmConfig, tyro.conf.arg(name="SLURM")] = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        remedy = "not with --slurm, which gives jobs their devices; leave out one of them"
        require(not (self.slurm and self.devices), "devices", ",".join(self.devices), remedy)

    def planned(self) -> tuple[tuple[str, ...], SlurmConfig | None]:
        """Devices and SLURM's options of a new run."""
        if not self.slurm:
            self.config.require_none()
        return self.devices, self.config if self.slurm else None

    def resumed(self, plan: RunPlan) -> tuple[tuple[str, ...], SlurmConfig | None]:
        """The same of a run that goes on: its own, but for what is given.

        Raises:
            ConfigError: what is given is not for a run of that kind.
        """
        if plan.slurm is None:
            remedy = "the run to resume was started without; leave it out, or start a new run"
            require(not self.slurm, "slurm", self.slurm, remedy)
            devices, _ = self.planned()
            return devices or plan.devices, None
        remedy = "the run to resume is on SLURM; leave it out, or start a new run"
        require(not self.devices, "devices", ",".join(self.devices), remedy)
        return (), replace(plan.slurm, **self.config.changes)
