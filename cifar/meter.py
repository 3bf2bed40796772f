"""Training metrics and health, accumulated on the device and read at intervals.

Reading a number from a GPU waits for all work before it; so nothing is read in a step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cifar.distributed import reduce_max, reduce_sum
from cifar.serialize import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetrics:
    """Of the samples since the last reset, over all processes: count, mean loss, top-1 fraction."""

    samples: int
    loss: float
    top1: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What all processes agree on at a reading.

    `bad_step`: the first step whose loss was not finite, None if none; `skipped_in_a_row`: the
    longest run of skipped fp16 steps; `signal`: the highest signal number any process received.
    """

    bad_step: int | None
    skipped_in_a_row: int
    signal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeterState:
    """A meter's counters over all processes, as a checkpoint holds them.

    `sums`: loss, correct predictions and samples of the present epoch; `skips`: skipped fp16 steps
    in total, in a row just now, and in the longest row.
    """

    __pydantic_config__: ClassVar = STRICT

    sums: tuple[float, float, float]
    skips: tuple[int, int, int]


class Meter:
    """Sums over the present epoch, and what went wrong since the start."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._first_bad = torch.full((), torch.inf, dtype=torch.float64, device=device)
        self._skips = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, step: int) -> None:
        """Count one micro-batch: its mean loss, logits `[B, K]` and targets `[B]` or `[B, K]`."""
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        count = len(logits)
        correct = (logits.argmax(1) == labels).sum()
        # new_full and masked_fill_ run on the device; a copied number would wait for it.
        self._sums += torch.stack(
            (loss.double() * count, correct.double(), self._sums.new_full((), count))
        )
        bad = self._first_bad.new_full((), step).masked_fill_(loss.isfinite(), torch.inf)
        torch.minimum(self._first_bad, bad, out=self._first_bad)

    def add_skip(self, skipped: Tensor) -> None:
        """Count one fp16 step, `skipped` a boolean on the device: total, in a row, longest row."""
        self._skips[0] += skipped
        self._skips[1] = (self._skips[1] + 1) * skipped
        self._skips[2] = torch.maximum(self._skips[1], self._skips[2])

    def health(self, signal: int) -> Health:
        """Read the state that all processes share; a collective call."""
        mine = torch.stack(
            (-self._first_bad, self._skips[2].double(), self._skips.new_tensor(signal).double())
        )
        bad, skips, worst_signal = reduce_max(mine).tolist()
        return Health(
            bad_step=None if bad == -torch.inf else int(-bad),
            skipped_in_a_row=int(skips),
            signal=int(worst_signal),
        )

    def train_metrics(self) -> TrainMetrics:
        """The present epoch's metrics; a collective call."""
        loss, correct, samples = reduce_sum(self._sums.clone()).tolist()
        return TrainMetrics(
            samples=int(samples), loss=loss / max(1, samples), top1=correct / max(1, samples)
        )

    @property
    def skipped_steps(self) -> int:
        """fp16 steps skipped since the start."""
        return int(self._skips[0])

    def reset(self) -> None:
        """Start a new epoch."""
        self._sums.zero_()

    def state(self) -> MeterState:
        """The counters over all processes, for a checkpoint; a collective call."""
        loss, correct, samples = reduce_sum(self._sums.clone()).tolist()
        total, in_a_row, longest = self._skips.tolist()
        return MeterState(sums=(loss, correct, samples), skips=(total, in_a_row, longest))

    def load(self, state: MeterState, *, first: bool) -> None:
        """Take up a checkpoint's counters; the sums go to the first process alone."""
        if first:
            self._sums.copy_(torch.tensor(state.sums, dtype=torch.float64))
        self._skips.copy_(torch.tensor(state.skips))
