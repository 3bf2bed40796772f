"""What torch.compile costs before it pays: cold and warm seconds, and the steps to break even."""

import math
import statistics
from collections.abc import Iterable, Sequence

import torch

from bench.measure.subject import Subject
from bench.measure.training import pace_of_steps, seconds_of_a_step
from bench.record import Measurement
from bench.spec import CAPTURE_STEPS
from cifar.compilation import compiled as compile_again
from cifar.training_state import set_aside

PAIRS = 5
"""Turns of eager and of compiled steps."""


def measure_compilation(subject: Subject) -> Iterable[Measurement]:
    """Of a compiled cell: seconds of compiling cold and warm, and when it has paid.

    Cold is with an empty cache on disk, which the launcher sees to; warm compiles the same again in
    this process from that cache. Both are the `excess` of the first steps.
    """
    trainer = subject.trainer
    if not trainer.config.compile:
        return
    with set_aside(trainer), subject.watched("compilation"):
        compiled, eager = _take_turns(subject)
        torch._dynamo.reset()
        mode = trainer.config.compile_mode
        trainer.model = compile_again(trainer.wrapped, mode)
        again = [seconds_of_a_step(subject) for _ in range(1 + CAPTURE_STEPS)]
    typical = statistics.median(compiled)
    first = first_steps(subject.taken, trainer.place.index)
    cold = subject.measurement("compile_seconds", "s", "lower", [excess(first, typical)])
    yield cold
    warm = excess(again, typical)
    yield subject.measurement("compiled_step", "s", "lower", compiled)
    yield subject.measurement("eager_step", "s", "lower", eager)
    yield break_even(cold, subject.everywhere(compiled), subject.everywhere(eager))
    yield subject.measurement("warm_compile_seconds", "s", "lower", [warm])


def _take_turns(subject: Subject) -> tuple[list[float], list[float]]:
    """Seconds of compiled and of eager steps, which take turns; the first pair does not count."""
    trainer = subject.trainer
    compiled, eager = trainer.model, trainer.wrapped
    seconds: list[tuple[float, float]] = []
    for _ in range(PAIRS + 1):
        trainer.model = eager
        of_eager = pace_of_steps(subject)
        trainer.model = compiled
        seconds.append((pace_of_steps(subject), of_eager))
    return [pair[0] for pair in seconds[1:]], [pair[1] for pair in seconds[1:]]


def first_steps(taken: Sequence[Measurement], rank: int) -> list[float]:
    """Seconds of a rank's first step and of the `CAPTURE_STEPS` after it, each waited for."""
    found = {each.name: each for each in taken}
    began, warm = found["first_step"], found.get("warmup_step")
    return [*began.samples[rank], *(warm.samples[rank][:CAPTURE_STEPS] if warm else ())]


def excess(first: Sequence[float], typical: float) -> float:
    """Seconds by which steps took longer than a typical one."""
    return math.fsum(max(0.0, seconds - typical) for seconds in first)


def break_even(
    cold: Measurement, compiled: Sequence[Sequence[float]], eager: Sequence[Sequence[float]]
) -> Measurement:
    """Steps after which compiling has saved what it cost; absent if it saves nothing.

    The slowest rank counts: of compiling, and of either kind of step.
    """
    saved = max(map(statistics.median, eager)) - max(map(statistics.median, compiled))
    name = "compile_break_even"
    if saved <= 0:
        return Measurement(
            name=name,
            unit="1",
            better="lower",
            status="absent",
            reason=f"a compiled step takes {-saved:.3g} s longer than an eager one",
        )
    steps = math.ceil(max(rank[0] for rank in cold.samples) / saved)
    return Measurement(name=name, unit="1", better="lower", samples=((float(steps),),))
