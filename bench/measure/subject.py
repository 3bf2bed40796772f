"""What metrics read: a cell's trainer, its protocol, and how a measurement gathers all ranks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from bench.observe import Witness
from bench.record import Label, Measurement
from bench.spec import Protocol
from cifar.distributed import gather
from cifar.trainer import Trainer

Better = Literal["higher", "lower", "none"]


class Subject:
    """A cell's trainer and protocol; metrics before it in `METRICS` have left it as it is."""

    def __init__(self, trainer: Trainer, protocol: Protocol) -> None:
        self.trainer = trainer
        self.protocol = protocol
        self.witness = Witness(trainer)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.trainer.device

    def measurement(
        self,
        name: str,
        unit: str,
        better: Better,
        mine: Sequence[float],
        **labels: Label,
    ) -> Measurement:
        """A measurement from this process's samples and the other processes'; a collective call."""
        samples = gather(mine, self.device)
        return Measurement(name=name, unit=unit, better=better, labels=labels, samples=samples)


Metric = Callable[[Subject], Iterable[Measurement]]
