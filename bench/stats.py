"""Statistics of plain numbers: rates, percentiles, spread, intervals. Knows nothing of records.

Samples of a measurement come as one sequence per rank (outer) of one value per step (inner).
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

Ranks = Sequence[Sequence[float]]


def throughput(step_seconds_by_rank: Ranks, samples_per_step: float) -> float:
    """Global samples per second: all steps' samples over the sum of the steps' durations.

    A step lasts as long as its slowest rank takes, because gradients are averaged over all ranks
    before any of them can go on. `samples_per_step` counts the samples of all ranks together.

    Raises:
        ValueError: no steps, ranks of different lengths, or a time that is not positive.
    """
    steps = list(zip(*step_seconds_by_rank, strict=True))
    slowest = [max(times) for times in steps]
    if not slowest or min(min(times) for times in steps) <= 0:
        raise ValueError("throughput: needs one step or more, each of positive duration")
    return len(slowest) * samples_per_step / math.fsum(slowest)


def headline(samples_by_rank: Ranks, better: Literal["higher", "lower", "none"]) -> float:
    """The median of each rank's samples, then the worst rank's (the largest if neither is better).

    Raises:
        ValueError: no rank, or a rank without samples.
    """
    medians = [statistics.median(samples) for samples in samples_by_rank]
    return float(min(medians) if better == "higher" else max(medians))


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation between order statistics at rank p (n - 1).

    Definition 7 of Hyndman and Fan 1996 (https://doi.org/10.2307/2684934), numpy's default.

    Raises:
        ValueError: no values, or `percent` outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(
            f"percentile: {percent} of {len(values)} values: needs 0..100 of 1 or more"
        )
    ordered = sorted(values)
    position = percent / 100 * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def iqr(values: Sequence[float]) -> float:
    """Interquartile range: 75th minus 25th percentile."""
    return percentile(values, 75) - percentile(values, 25)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1 in the denominator; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def straggler_ratio(step_seconds_by_rank: Ranks) -> float:
    """How much longer steps last than with ranks all at the average pace; 1.0: no straggler.

    The sum over steps of the slowest rank's time, over the sum of the mean of all ranks' times.
    """
    steps = list(zip(*step_seconds_by_rank, strict=True))
    return math.fsum(map(max, steps)) / math.fsum(map(statistics.fmean, steps))


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic, the same for the same seed.

    One value per process: steps of one process are not independent of each other, so resampling
    them would give an interval that is far too narrow.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.

    Raises:
        ValueError: fewer than two values, or a confidence outside 0..1.
    """
    if len(values) < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap: {len(values)} values at confidence {confidence}: "
            "needs 2 or more and 0 < confidence < 1"
        )
    generator = random.Random(seed)
    estimates = [statistic(generator.choices(values, k=len(values))) for _ in range(resamples)]
    tail = 50 * (1 - confidence)
    return percentile(estimates, tail), percentile(estimates, 100 - tail)


def median_interval(
    values: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The median, and the order statistics that bound the population's with that confidence.

    Exact for any distribution (the sign test inverted), so wide for few values: 6 give (smallest,
    largest) at 97 %. Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.

    Raises:
        ValueError: too few values for that confidence; 95 % needs 6.
    """
    ordered, n = sorted(values), len(values)
    rank, outside = 0, 0.0
    while True:
        outside += 2 * math.comb(n, rank) / 2**n
        if outside > 1 - confidence:
            break
        rank += 1
    if rank == 0:
        raise ValueError(f"median interval: {n} values are too few at confidence {confidence}")
    return statistics.median(ordered), ordered[rank - 1], ordered[n - rank]
