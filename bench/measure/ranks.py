"""How fast each of several processes is by itself: who holds up the others."""

from collections.abc import Callable, Iterable

from bench.measure.anatomy import align, why_inseparable
from bench.measure.clock import Clock, make_clock, seconds_of
from bench.measure.subject import Subject
from bench.measure.training import filling_steps
from bench.record import Measurement
from bench.stats import straggler_ratio
from cifar.distributed import least
from cifar.training_state import set_aside


def measure_ranks(subject: Subject) -> Iterable[Measurement]:
    """Seconds of every rank's steps when it waits for no other, and the straggler ratio of them.

    The ranks work at the same time, as in training, and begin every step together; but gradients
    are not averaged and nothing is checked, so that each takes its own time. In the steps of the
    throughput all take as long as the slowest. The first two steps warm up. One process has no
    others, and tells nothing.
    """
    if subject.trainer.place.count == 1:
        return
    if reason := _never_alone(subject):
        for name, unit in (("rank_step", "s"), ("straggler_ratio", "1")):
            yield Measurement(name=name, unit=unit, better="lower", status="absent", reason=reason)
        return
    with set_aside(subject.trainer), subject.watched("ranks") as monitor:
        mine = _steps_alone(subject, monitor.look)
    found = subject.measurement("rank_step", "s", "lower", mine)
    yield found
    ratio = straggler_ratio(found.samples)
    yield Measurement(name="straggler_ratio", unit="1", better="lower", samples=((ratio,),))


def _never_alone(subject: Subject) -> str:
    """Why a step cannot be taken without the other processes; empty if it can."""
    if subject.trainer.config.parallel.sync_batch_norm:
        return "BatchNorm over all processes waits for them in every layer"
    return why_inseparable(subject)


def _steps_alone(subject: Subject, at_the_end: Callable[[], None]) -> list[float]:
    """Seconds of each step; as many as fill the protocol's seconds at the pace of one before.

    `at_the_end` is called before the device is waited for.
    """
    pace = seconds_of(lambda: _step_alone(subject), subject.device)
    count = least(filling_steps(subject.protocol, pace), subject.device)
    clocks = [_step_alone(subject) for _ in range(1 + count)]
    at_the_end()
    return [clock.seconds()[0] for clock in clocks[1:]]


def _step_alone(subject: Subject) -> Clock:
    """A step between two marks."""
    trainer, clock = subject.trainer, make_clock(subject.device)
    align(trainer)
    clock.mark()
    with trainer.alone():
        trainer.train_step()
    clock.mark()
    return clock
