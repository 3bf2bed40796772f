"""Timing batches of inference: one after the other, each waited for, and many in a row."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure.backends import Run
from bench.measure.clock import make_clock, synchronize
from bench.measure.subject import Subject
from bench.measure.training import MOST_FILLING, has_settled
from bench.spec import warm_up_span
from cifar.distributed import barrier, least

FEWEST_BATCHES = 3
"""Timed one by one however long they take."""
BUSY_BATCHES = 10
"""In a row on a GPU, at least: the first one is launched while the device waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """What batches of one size took in this process, in seconds; as many on every process."""

    each: list[float]
    """Every batch that was waited for."""
    row: float | None
    """Of `in_row` batches between which nothing was waited for, together; None: not asked for."""
    in_row: int


def time_batches(run: Run, images: Tensor, subject: Subject, where: str) -> Timed:
    """Warm up, then time; what disturbed it is noted, with `where` it was. A collective call."""
    warm, settled = _warm_up(run, images, subject)
    barrier()
    if not settled:
        subject.invalid.append(f"{where}: warm-up: batch time had not settled after {warm} batches")
    with subject.watched(where) as monitor:
        each = _one_by_one(run, images, subject)
        in_row = _fitting(each, subject)
        row = _in_a_row(run, images, in_row, subject.device, monitor.look) if in_row else None
    return Timed(each=each[: least(len(each), subject.device)], row=row, in_row=in_row)


def _warm_up(run: Run, images: Tensor, subject: Subject) -> tuple[int, bool]:
    """Run batches until their time has settled on every rank, or the cap; how many, and which."""
    protocol, device = subject.protocol, subject.device
    seconds: list[float] = []
    while True:
        seconds.append(_seconds_of(run, images, device))
        span = warm_up_span(protocol.inference_warmup, seconds[-1])
        settled = bool(least(has_settled(seconds, span), device))
        long = math.fsum(seconds) > protocol.inference_seconds
        if settled or least(long or len(seconds) >= protocol.max_warmup_steps, device):
            return len(seconds), settled


def _one_by_one(run: Run, images: Tensor, subject: Subject) -> list[float]:
    """Seconds of each batch, until there are enough of them or time is up."""
    protocol = subject.protocol
    seconds: list[float] = []
    began = time.perf_counter()
    while True:
        seconds.append(_seconds_of(run, images, subject.device))
        took, count = time.perf_counter() - began, len(seconds)
        if took > protocol.inference_seconds and count >= FEWEST_BATCHES:
            return seconds
        filled = took >= protocol.min_timed_seconds or count >= MOST_FILLING
        if filled and count >= protocol.inference_iterations:
            return seconds


def _seconds_of(run: Run, images: Tensor, device: torch.device) -> float:
    """Seconds of one batch, waited for."""
    start = time.perf_counter()
    run(images)
    synchronize(device)
    return time.perf_counter() - start


def _fitting(each: Sequence[float], subject: Subject) -> int:
    """Batches in a row that take `throughput_seconds`, as many on every rank; a collective call.

    A CPU computes nothing while the program is elsewhere, so there one will do.
    """
    wanted = subject.protocol.throughput_seconds
    if not wanted:
        return 0
    fewest = BUSY_BATCHES if subject.device.type == "cuda" else 1
    fitting = math.ceil(wanted / statistics.median(each))
    return least(max(fewest, fitting), subject.device)


def _in_a_row(
    run: Run, images: Tensor, count: int, device: torch.device, at_the_end: Callable[[], None]
) -> float:
    """Seconds of so many batches, of which only the last is waited for, after `at_the_end`."""
    clock = make_clock(device)
    synchronize(device)
    barrier()
    clock.mark()
    for _ in range(count):
        run(images)
    clock.mark()
    at_the_end()
    (seconds,) = clock.seconds()
    return seconds
