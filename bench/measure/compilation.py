"""What torch.compile costs before it pays."""

import statistics
from collections.abc import Sequence

from bench.record import Measurement


def compile_seconds(measurements: Sequence[Measurement]) -> Measurement:
    """What compiling cost: the first step's seconds less those of a step in the timed window."""
    found = {each.name: each for each in measurements}
    steps, first = found["train_throughput"], found["first_step"]
    cost = tuple(
        (max(0.0, began[0] - statistics.median(rank)),)
        for began, rank in zip(first.samples, steps.samples, strict=True)
    )
    return Measurement(name="compile_seconds", unit="s", better="lower", samples=cost)
