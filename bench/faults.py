"""Faults that a worker is told to have, so that the measurement can be measured.

They enter through the trainer's own seams: a cost through its `Update`, a wrong number format
through the module's `forward`. The code that measures knows nothing of them.
"""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bench.job import Fault
from bench.measure.clock import seconds_of, synchronize
from bench.measure.subject import Subject
from bench.record import Measurement
from cifar.trainer import Trainer
from cifar.updates import descend

REPEATS = 5
"""How often a cost is measured by itself before the cell is measured, and again afterwards."""
MATRIX_SIZE = {"cpu": 512, "cuda": 4096}
"""Rows and columns: a few milliseconds a product, so that a small number makes up any cost."""


class InjectedFault:
    """A fault at work in one process; `install` comes first."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._factors: list[Tensor] = []
        self._products = 0

    def update(self, trainer: Trainer, forward_backward: Callable[[], None]) -> None:
        """An optimiser step and the cost.

        The device is waited for before and after, as work that overlaps with a step's own does not
        add its full time to it.
        """
        descend(trainer, forward_backward)
        if self.fault.seconds:
            synchronize(trainer.device)
            self._pay()
            synchronize(trainer.device)

    def install(self, trainer: Trainer) -> None:
        """Get ready: a wrong format holds from now on in training."""
        if self.fault.kind == "wrong-dtype":
            autocast = torch.autocast(trainer.device.type, torch.bfloat16)
            trainer.module.forward = autocast(trainer.module.forward)
        elif self.fault.kind == "matmul":
            self._calibrate(trainer.device)

    def _calibrate(self, device: torch.device) -> None:
        """Find how many products take about the seconds asked for."""
        size, generator = MATRIX_SIZE[device.type], torch.Generator(device).manual_seed(0)
        self._factors = [
            torch.randn(size, size, device=device, generator=generator) for _ in range(2)
        ]
        self._products = 1
        fastest = min(seconds_of(self._pay, device) for _ in range(2 * REPEATS))
        self._products = max(1, round(self.fault.seconds / fastest))

    def measure(self, subject: Subject) -> Iterable[Measurement]:
        """What the fault costs by itself in this process: `fault_seconds`, `[REPEATS]` in "s"."""
        name, labels = "fault_seconds", {"fault": self.fault.label}
        if not self.fault.seconds:
            reason = "the fault changes what is computed; it adds no work that could be timed"
            yield Measurement(
                name=name,
                unit="s",
                better="none",
                status="absent",
                reason=reason,
                labels={**labels},
            )
            return
        seconds = [seconds_of(self._pay, subject.device) for _ in range(REPEATS)]
        yield subject.measurement(name, "s", "none", seconds, **labels)

    def _pay(self) -> None:
        if self.fault.kind == "sleep":
            time.sleep(self.fault.seconds)
            return
        left, right = self._factors
        for _ in range(self._products):
            torch.mm(left, right)
