"""Training metrics and health, accumulated on the device and read at intervals.

Reading a number from a GPU waits for all work before it; so nothing is read in a step.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cifar.distributed import reduce_max, reduce_sum
from cifar.pulse import PULSE
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
    longest run of skipped fp16 steps; `signal`: the highest signal number any process received;
    `pace`: the slowest one's seconds per step.
    """

    bad_step: int | None
    skipped_in_a_row: int
    signal: int
    pace: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MeterState:
    """A meter's counters over all processes, as a checkpoint holds them.

    `sums`: loss, correct predictions and samples of the present epoch; `skips`: skipped fp16 steps
    in total, in a row just now, and in the longest row.
    """

    __pydantic_config__: ClassVar = STRICT

    sums: tuple[float, float, float]
    skips: tuple[int, int, int]


_NONE = (0.0, 0.0, 0.0)
"""Loss, correct predictions and samples of no micro-batch."""
_HELD = 64
"""Micro-batches that are held at most before they are summed up on the device."""


class Meter:
    """Sums over the present epoch, and what went wrong since the start.

    A step only holds its loss, predictions and targets on the device: on a net with short steps
    every operation is felt. They are counted there `_HELD` micro-batches at a time, and summed up
    on the host when read, in the steps' order, so that it does not matter how often they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, predictions, targets
        self._losses: list[Tensor] = []  # of the counted ones, `[N]`
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._unread: list[tuple[int, int]] = []  # step and samples of all of these
        self._sums = _NONE
        self._first_bad = math.inf
        self._skips = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, step: int) -> None:
        """Count one micro-batch: its mean loss, logits `[B, K]` and targets `[B]` or `[B, K]`."""
        self._unread.append((step, len(logits)))
        # The predictions are a copy of what a CUDA graph may write anew in the next step.
        self._held.append((loss, logits.argmax(1), targets))
        if len(self._held) == _HELD:
            self._count()

    def _count(self) -> None:
        """Count on the device what is held."""
        if not self._held:
            return
        losses, predictions, targets = zip(*self._held, strict=True)
        labels = [each if each.ndim == 1 else each.argmax(1) for each in targets]
        self._correct += (torch.cat(predictions) == torch.cat(labels)).sum()
        self._losses.append(torch.stack(losses))
        self._held = []

    @torch.no_grad()
    def _read(self) -> None:
        """Sum up what was counted; waits for the device."""
        self._count()
        if not self._unread:
            return
        loss_sum, correct_sum, samples = self._sums
        with PULSE.waiting():
            losses = torch.cat(self._losses).tolist()
            correct = float(self._correct)
        for (step, count), loss in zip(self._unread, losses, strict=True):
            loss_sum += loss * count
            samples += count
            if not math.isfinite(loss):
                self._first_bad = min(self._first_bad, step)
        self._sums = loss_sum, correct_sum + correct, samples
        self._correct.zero_()
        self._losses, self._unread = [], []

    def add_skip(self, skipped: Tensor) -> None:
        """Count one fp16 step, `skipped` a boolean on the device: total, in a row, longest row."""
        self._skips[0] += skipped
        self._skips[1] = (self._skips[1] + 1) * skipped
        self._skips[2] = torch.maximum(self._skips[1], self._skips[2])

    def health(self, signal: int, pace: float = 0.0) -> Health:
        """Read the state that all processes share; a collective call."""
        self._read()
        with PULSE.waiting():
            mine = self._on_device(-self._first_bad, float(self._skips[2]), float(signal), pace)
            bad, skips, worst_signal, slowest = reduce_max(mine).tolist()
        return Health(
            bad_step=None if bad == -math.inf else int(-bad),
            skipped_in_a_row=int(skips),
            signal=int(worst_signal),
            pace=slowest,
        )

    def train_metrics(self) -> TrainMetrics:
        """The present epoch's metrics; a collective call."""
        loss, correct, samples = self._all_sums()
        return TrainMetrics(
            samples=int(samples), loss=loss / max(1, samples), top1=correct / max(1, samples)
        )

    def slowest(self, seconds: float) -> float:
        """The most seconds that any process gives; a collective call."""
        with PULSE.waiting():
            return float(reduce_max(self._on_device(seconds)))

    def _all_sums(self) -> tuple[float, float, float]:
        self._read()
        with PULSE.waiting():
            loss, correct, samples = reduce_sum(self._on_device(*self._sums)).tolist()
        return loss, correct, samples

    def _on_device(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    @property
    def skipped_steps(self) -> int:
        """fp16 steps skipped since the start."""
        return int(self._skips[0])

    def reset(self) -> None:
        """Start a new epoch."""
        self._read()
        self._sums = _NONE

    def state(self) -> MeterState:
        """The counters over all processes, for a checkpoint; a collective call."""
        with PULSE.waiting():
            total, in_a_row, longest = self._skips.tolist()
        return MeterState(sums=self._all_sums(), skips=(total, in_a_row, longest))

    def load(self, state: MeterState, *, first: bool) -> None:
        """Take up a checkpoint's counters; the sums go to the first process alone.

        Of rows of skipped steps the present one counts: a longer one that training went on from has
        ended.
        """
        self._read()
        self._sums = state.sums if first else _NONE
        total, in_a_row, _longest = state.skips
        self._skips.copy_(torch.tensor((total, in_a_row, in_a_row)))
