"""How the largest batch that fits is searched: which batches are probed, in which order, and how.

A probe is a task like any other, in fresh processes, and its record the truth. What is out of
memory is a result: no batch is ever shrunk by itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from bench.protocol import Protocol
from bench.spec import Task
from cifar.config import require
from cifar.serialize import STRICT

LEAST_GRANULE = 8
"""Batches are multiples of this; tensor cores want multiples of 8."""
RESOLUTION = 1 / 16
"""How close the answer is, as a fraction of it, unless asked otherwise."""
START = 64
"""The first batch that is probed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierSearch:
    """Which batches may be probed, and how close to the frontier a search ends.

    Raises:
        ConfigError: a value out of range.
    """

    __pydantic_config__: ClassVar = STRICT

    start: int
    """The first batch, a multiple of `granule`."""
    largest: int
    """The largest batch that may be probed, a multiple of `granule`."""
    granule: int = LEAST_GRANULE
    """All batches are multiples of it."""
    resolution: float = RESOLUTION
    """The search ends once the smallest batch that does not fit is larger than the largest that
    does by no more than this fraction of it, or by one granule."""

    def __post_init__(self) -> None:
        require(0 < self.resolution < 1, "resolution", self.resolution, "give one in (0, 1)")
        require(
            self.largest >= self.granule,
            "largest",
            self.largest,
            f"give at least {self.granule}; batches are its multiples",
        )


def plan_search(
    parts: int,
    *,
    images: int,
    start: int | None = None,
    largest: int | None = None,
    resolution: float = RESOLUTION,
) -> FrontierSearch:
    """The search over batches that are split into `parts`: processes x accumulation steps.

    `start` (if None `START`, or less where that is too many) and `largest` (if None all `images`
    of the training split) are rounded down to multiples of the granule, the least one of both 8 and
    `parts`.

    Raises:
        ConfigError: a value out of range.
    """
    granule = math.lcm(LEAST_GRANULE, parts)
    remedy = f"give at least {granule}; batches are its multiples"
    require(largest is None or largest >= granule, "largest", largest, remedy)
    most = min(images, images if largest is None else largest) // granule * granule
    first = min(START, most) if start is None else start
    require(1 <= first <= most, "start", first, f"give 1 to {most}, the largest batch to probe")
    first = max(granule, first // granule * granule)
    return FrontierSearch(start=first, largest=most, granule=granule, resolution=resolution)


def next_batch(fits: Mapping[int, bool], search: FrontierSearch) -> int | None:
    """The batch to probe next, given which of the earlier ones fit; None when the search is over.

    Doubling from the start (halving if it does not fit), then bisection. Should a batch fit above
    one that does not, the search goes on from the largest that fits.
    """
    granule = search.granule
    if not fits:
        return search.start
    low = max((batch for batch, fit in fits.items() if fit), default=0)
    high = min((batch for batch, fit in fits.items() if not fit and batch > low), default=None)
    if high is None:
        return min(2 * low, search.largest) if low < search.largest else None
    if low == 0:
        return max(granule, high // 2 // granule * granule) if high > granule else None
    if high - low <= max(granule, search.resolution * low):
        return None
    return (low + high) // 2 // granule * granule


def probe_protocol(timeout: float | None = None) -> Protocol:
    """How a probe is measured: five steps (seven compiled) and no more, within `timeout` seconds.

    Whatever else were measured, steps that are undone or eager ones of a compiled cell, would need
    memory that training does not.
    """
    protocol = Protocol(
        warmup_steps=0,
        timed_steps=2,
        min_timed_seconds=0.0,
        inference_batch_sizes=(),
        training_alone=True,
    )
    return protocol if timeout is None else replace(protocol, timeout=timeout)


def probe(first: Task, batch: int) -> Task:
    """The task that probes a global batch size in the search that starts with `first`."""
    train = first.cell.train
    recipe = replace(train.recipe, global_batch_size=batch)
    return replace(first, cell=replace(first.cell, train=replace(train, recipe=recipe)))
