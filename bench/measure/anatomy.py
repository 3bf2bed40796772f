"""What a training step is made of: marks around what the trainer calls, and steps without sync."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench.measure.clock import Clock, make_clock, seconds_of, synchronize
from bench.measure.subject import Subject
from bench.measure.training import check_if_due, filling_steps
from bench.record import Measurement
from cifar.distributed import barrier, least, reduce_sum
from cifar.trainer import Trainer
from cifar.training_state import set_aside

OTHER = "other"
"""What no part covers: learning rate, training metrics, weight averaging, checks of the run."""
PARTS = ("data", "forward", "backward", "optimizer", OTHER)

Pairs = list[tuple[dict[str, float], dict[str, float]]]
"""Seconds by part of two steps that were taken one after the other, in either order."""
Step = Callable[[Trainer], "Timeline"]
"""Takes a step, or a round of them, and notes its moments."""


class Timeline:
    """The moments of one step, and which part each of them ends."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: list[str] = []

    def begin(self) -> None:
        """The step begins."""
        self._clock.mark()

    def end(self, part: str) -> None:
        """What was done since the moment before belongs to `part`."""
        self._clock.mark()
        self._ended.append(part)

    def seconds(self) -> dict[str, float]:
        """Seconds of each of `PARTS`, which add up to the whole step; waits for the device."""
        spans: dict[str, list[float]] = {part: [] for part in PARTS}
        for part, value in zip(self._ended, self._clock.seconds(), strict=True):
            spans[part].append(value)
        return {part: math.fsum(values) for part, values in spans.items()}


def measure_anatomy(subject: Subject) -> Iterable[Measurement]:
    """Seconds of a step by part, their overhead, the share of the data, and communication.

    Data is loading, augmenting and normalising; forward the model, a teacher and the loss; the
    optimiser includes zeroing gradients and the loss scaler. Micro-batches add up. Nothing is
    waited for between the parts: on a GPU they are spans of its stream, idle time included, and
    backward has that communication in it which it does not hide. On a CPU the checks of the run
    that are due are part of a step, as they are of one that is timed for the throughput. Steps with
    marks and without take turns.
    """
    alone = bool(why_inseparable(subject))
    with set_aside(subject.trainer), subject.watched("anatomy") as monitor:
        marked = _pairs(subject, _marked_step, _plain_step, monitor.look)
        exchanged = [] if alone else _pairs(subject, *_SYNCED_AND_NOT, monitor.look)
    for part in PARTS:
        values = [step[part] for step, _ in marked]
        yield subject.measurement(f"step_{part}", "s", "lower", values)
    yield _communication(subject, exchanged)
    overhead = [_whole(step) / _whole(plain) - 1 for step, plain in marked]
    yield subject.measurement("anatomy_overhead", "fraction", "lower", overhead)
    share = [step["data"] / _whole(step) for step, _ in marked]
    yield subject.measurement("pipeline_share", "fraction", "lower", share)


def why_inseparable(subject: Subject) -> str:
    """Why communication cannot be told from the rest of a step; "" where it can."""
    trainer = subject.trainer
    if trainer.place.count == 1:
        return "one process has none to communicate with"
    if trainer.engine.shares_out:
        return f"{trainer.strategy} cannot take a step without exchanging what it has shared out"
    return ""


def _whole(seconds: dict[str, float]) -> float:
    return math.fsum(seconds.values())


def _communication(subject: Subject, pairs: Pairs) -> Measurement:
    """What averaging adds to a step: of gradients, or after a round of local steps of all state.

    Noise may make a single difference negative. BatchNorm over all processes exchanges its
    statistics in either kind of step, so that is not in it.
    """
    name = "step_communication"
    if reason := why_inseparable(subject):
        return Measurement(name=name, unit="s", better="lower", status="absent", reason=reason)
    steps = subject.trainer.config.parallel.local_steps
    added = [(_whole(synced) - _whole(unsynced)) / steps for synced, unsynced in pairs]
    return subject.measurement(name, "s", "lower", added)


def _pairs(subject: Subject, one: Step, other: Step, at_the_end: Callable[[], None]) -> Pairs:
    """Take two kinds of step in turns, the order of every pair reversed.

    The first pair warms up, the second tells how many fill the protocol's seconds. `at_the_end` is
    called before the device is waited for.
    """
    trainer = subject.trainer

    def pair(index: int) -> tuple[Timeline, Timeline]:
        if index % 2:
            first = one(trainer)
            return first, other(trainer)
        first = other(trainer)
        return one(trainer), first

    pair(0)
    pace = seconds_of(lambda: pair(1), subject.device) / 2
    count = least(filling_steps(subject.protocol, pace), subject.device)
    barrier()
    pairs = [pair(index) for index in range(count)]
    at_the_end()
    return [(left.seconds(), right.seconds()) for left, right in pairs]


def _plain_step(trainer: Trainer) -> Timeline:
    """A step as it is timed for the throughput, with a mark before and after it."""
    timeline = Timeline(make_clock(trainer.device))
    _time(trainer, timeline)
    return timeline


def _marked_step(trainer: Trainer) -> Timeline:
    timeline = Timeline(make_clock(trainer.device))
    with contextlib.ExitStack() as stack:
        for owner, name, part in (
            (trainer, "batches_of", "data"),
            (trainer, "compute_loss", "forward"),
            (trainer, "backward", "backward"),
            (trainer.optimizer, "zero_grad", "optimizer"),
            (trainer, "optimizer_step", "optimizer"),
        ):
            stack.enter_context(_marked(owner, name, part, timeline))
        _time(trainer, timeline)
    return timeline


def _synced_round(trainer: Trainer) -> Timeline:
    align(trainer)
    return _round(trainer)


def _unsynced_round(trainer: Trainer) -> Timeline:
    align(trainer)
    with trainer.alone():
        return _round(trainer)


def _round(trainer: Trainer) -> Timeline:
    """As many steps as lie between two averages: one, but with local steps."""
    timeline = Timeline(make_clock(trainer.device))
    _time(trainer, timeline, steps=trainer.config.parallel.local_steps)
    return timeline


_SYNCED_AND_NOT = (_synced_round, _unsynced_round)


def align(trainer: Trainer) -> None:
    """Let all processes begin together, or one step would pay for the others' lag in the last.

    Their programs too: one that runs ahead of its GPU would have the step's kernels queued by then,
    and so measure the GPU alone where the slowest measures its program.
    """
    reduce_sum(torch.zeros((), device=trainer.device))
    synchronize(trainer.device)


def _time(trainer: Trainer, timeline: Timeline, steps: int = 1) -> None:
    timeline.begin()
    for _ in range(steps):
        trainer.train_step()
        if trainer.device.type == "cpu":
            check_if_due(trainer)
        timeline.end(OTHER)


@contextlib.contextmanager
def _marked(owner: object, name: str, part: str, timeline: Timeline) -> Iterator[None]:
    """Within the block, mark before and after every call of `owner.name`."""
    function = getattr(owner, name)
    own = name in vars(owner)

    def marked(*args: Any, **options: Any) -> Any:
        timeline.end(OTHER)
        result = function(*args, **options)
        timeline.end(part)
        return result

    setattr(owner, name, marked)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)
