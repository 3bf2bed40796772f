"""What metrics read: a cell's trainer, its protocol, and how a measurement gathers all ranks."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch

from bench.measure.monitor import Monitor
from bench.observe import Witness
from bench.protocol import Protocol
from bench.record import Label, Measurement
from cifar.distributed import gather
from cifar.trainer import Trainer

Better = Literal["higher", "lower", "none"]


class Subject:
    """A cell's trainer and protocol; the metrics leave it as it is.

    `taken` are the measurements so far; whoever takes more appends them.
    """

    def __init__(
        self, trainer: Trainer, protocol: Protocol, taken: Iterable[Measurement] = ()
    ) -> None:
        self.trainer = trainer
        self.protocol = protocol
        self.witness = Witness(trainer)
        self.taken = list(taken)
        self.invalid: list[str] = []
        """What disturbed the measuring; becomes the record's."""
        self.tell: Callable[[Sequence[Measurement]], None] = lambda _: None
        """Given what a long metric knows on its way; a collective call."""

    @contextlib.contextmanager
    def watched(self, where: str) -> Iterator[Monitor]:
        """Note what disturbs the measuring inside, with `where` it was; a collective call.

        What is yielded is to `look` while the device works off what was launched last.
        """
        with Monitor(self.device) as monitor:
            yield monitor
        _, reasons = monitor.report()
        self.invalid += [f"{where}: {reason}" for reason in reasons]

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.trainer.device

    def value(self, name: str) -> float:
        """The headline of the measurement of that name that a metric before has taken."""
        value = {each.name: each.value for each in self.taken}[name]
        assert value is not None, f"{name} was not measured"
        return value

    def measurement(
        self,
        name: str,
        unit: str,
        better: Better,
        mine: Sequence[float],
        **labels: Label,
    ) -> Measurement:
        """A measurement from this process's samples and the other processes'; a collective call."""
        return Measurement(
            name=name, unit=unit, better=better, labels=labels, samples=self.everywhere(mine)
        )

    def everywhere(self, mine: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """These values of every process by rank, as many from each; a collective call."""
        return gather(mine, self.device)


Metric = Callable[[Subject], Iterable[Measurement]]
