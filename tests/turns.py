"""Contestants that take turns in one process, and the ratio of two of them."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

from bench.stats import median_interval

Taken = dict[str, list[float]]
Interval = tuple[float, float, float]


def take_turns(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    enough: Callable[[Taken], bool] = lambda _: False,
) -> Taken:
    """What every contestant returned, by round; each round in another random order."""
    taken: Taken = {name: [] for name in contestants}
    generator = random.Random(0)
    for _ in range(rounds):
        order = list(contestants)
        generator.shuffle(order)
        for name in order:
            taken[name].append(contestants[name]())
        if enough(taken):
            break
    return taken


def middle(values: Sequence[float]) -> Interval:
    """The median and its 95 % interval."""
    return statistics.median(values), *median_interval(values)


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Median over rounds of `above` / `below`, and its 95 % interval."""
    return middle([a / b for a, b in zip(above, below, strict=True)])


def is_known(interval: Interval, within: float) -> bool:
    """Whether an interval reaches no further than this to either side of its median."""
    median, low, high = interval
    return max(median - low, high - median) <= within
