"""Training throughput: a stable warm-up, then a window of steps in which nothing is read."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from bench.job import LAUNCHED
from bench.measure.clock import make_clock, seconds_of, synchronize
from bench.measure.energy import EnergyMeter, find_counter
from bench.measure.memory import measure_peak
from bench.measure.monitor import Monitor
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement
from bench.spec import CAPTURE_STEPS, FEWEST_STEPS, OBSERVED_STEPS, least_warm_up, warm_up_span
from cifar.config import TrainConfig
from cifar.device_memory import reset_peak_memory
from cifar.distributed import barrier, least
from cifar.trainer import Trainer
from cifar.training_state import set_aside

UNBOUNDED_STEPS = 1_000_000
"""Planned for speed alone, which ends with the timed window; the learning rate stays near 0."""
WARM_TOLERANCE = 0.05
"""How far the medians of two neighbouring spans of the warm-up may differ, as a fraction."""
PACE_STEPS = 5
"""Steps of a GPU that are waited for together, as those of a window are, to tell its pace."""
MOST_FILLING = 2_000
"""Steps or batches to which a further window than that of the training is extended to fill its
seconds: a record keeps the seconds of each."""


def planned_steps(protocol: Protocol, batch_size: int) -> int:
    """Optimiser steps that a worker's trainer is made for."""
    return protocol.train_samples // batch_size or UNBOUNDED_STEPS


def measure_training(subject: Subject) -> Iterable[Measurement]:
    """Warm up, time a window of steps, then train what is left of the budget.

    The steps next to the window are observed, see `bench.observe`; nothing is read from a GPU
    inside it, and a CPU's run is checked as often as in training. A step's seconds include loading,
    augmenting and normalising its batch. The first
    step holds allocation and compilation, and on a CPU the loading of libraries and the choice of
    kernels; on a GPU `_wake_up` has done both for what runs eagerly. The seconds of the whole
    training begin with the first step, whatever it holds, and leave out start-up and evaluation.
    """
    trainer, on_gpu = subject.trainer, subject.device.type == "cuda"
    assert trainer.total_steps >= FEWEST_STEPS, "see bench.spec.expand"
    energy = _energy_meter(subject)
    if on_gpu and not subject.protocol.training_alone:
        _wake_up(subject)
    energy.watch_idle()
    was_reset = reset_peak_memory(subject.device)
    started = time.monotonic()
    first_step = seconds_of_a_step(subject)
    warm, settled = _warm_up(subject, first_step)
    pace = _pace(subject, warm)
    if on_gpu and not _replays_graphs(trainer.config):
        reset_peak_memory(subject.device)  # trying kernels out took more in the first step
    subject.witness.before_window()
    count = _window_steps(subject, pace)
    began = time.monotonic()
    with Monitor(subject.device) as monitor, energy:
        seconds = _timed_steps(subject, count, monitor.look)
    subject.witness.after_window(count)
    batch = trainer.loader.global_batch_size
    yield subject.measurement(
        "train_throughput", "samples/s", "higher", seconds, samples_per_step=batch
    )
    trainer.check()
    if subject.protocol.train_samples:
        _train_the_rest(subject)
        synchronize(subject.device)
        took = time.monotonic() - started
        yield subject.measurement("training_seconds", "s", "lower", [took])
    yield subject.measurement("first_step", "s", "lower", [first_step])
    yield _time_to_first_timed_step(subject, began - energy.idle_seconds)
    yield from _told_of_warm_up(subject, warm, settled)
    yield energy.measurement(count * batch)
    disturbances, reasons = monitor.report()
    subject.invalid += reasons
    yield from disturbances
    trials = _replays_graphs(trainer.config)
    yield from measure_peak(subject, was_reset=was_reset, with_trials=trials)


def _told_of_warm_up(subject: Subject, seconds: list[float], settled: bool) -> list[Measurement]:
    """Its steps, if it took any; one that did not settle makes the record invalid."""
    if not settled:
        subject.invalid.append(f"warm-up: step time had not settled after {len(seconds)} steps")
    if not seconds:
        return []
    return [subject.measurement("warmup_step", "s", "none", seconds, settled=settled)]


def _time_to_first_timed_step(subject: Subject, began: float) -> Measurement:
    """Seconds from the start of the launcher's command to the timed window, which then `began`.

    Start-up, reading the images, compiling and the warm-up are in it; the seconds for which idle
    power was watched are not.
    """
    name, launched = "time_to_first_timed_step", os.environ.get(LAUNCHED)
    if launched is None:
        reason = f"no launcher set {LAUNCHED}"
        return Measurement(name=name, unit="s", better="lower", status="absent", reason=reason)
    return subject.measurement(name, "s", "lower", [began - float(launched)])


def _replays_graphs(config: TrainConfig) -> bool:
    """Whether its steps replay CUDA graphs, whose memory is only counted while they are recorded.

    The mark then stands since before the first step, which may have taken more to try kernels out.
    """
    return config.compile and config.compile_mode != "default"


def _energy_meter(subject: Subject) -> EnergyMeter:
    first = subject.trainer.accelerator.is_local_main_process
    return EnergyMeter(subject.device, find_counter(subject.device, counts_machine=first))


def _wake_up(subject: Subject) -> None:
    """Take an eager step and undo it: kernels load and clocks rise before idle power is watched.

    The first step then holds compilation, but not the loading of the libraries. It takes memory of
    its own: the copies that undo it and, in a compiled cell, eager activations.
    """
    trainer = subject.trainer
    with set_aside(trainer):
        model, trainer.model = trainer.model, trainer.wrapped
        try:
            trainer.train_step()
        finally:
            trainer.model = model


def seconds_of_a_step(subject: Subject) -> float:
    """Seconds of one step, waited for."""
    return seconds_of(subject.trainer.train_step, subject.device)


def _seconds_of_a_recorded_step(subject: Subject) -> float:
    """The same, seen by the witness where later steps replay a CUDA graph that shows nothing."""
    if not _replays_graphs(subject.trainer.config):
        return seconds_of_a_step(subject)
    with subject.witness.recording():
        return seconds_of_a_step(subject)


def _warm_up(subject: Subject, first_step: float) -> tuple[list[float], bool]:
    """Step until the time of a step has settled on every rank, or the cap; seconds, and which.

    The first step counts where it took no longer than others. Where a training budget is short, the
    window gets what the least warm-up leaves of it. A compiled cell is not asked before its
    `CAPTURE_STEPS`.
    """
    trainer, protocol = subject.trainer, subject.protocol
    least_steps = least_warm_up(trainer.config, protocol)
    left = trainer.total_steps - trainer.step - OBSERVED_STEPS
    room = max(left - protocol.timed_steps, min(least_steps, left - 1))
    cap = max(0, min(max(protocol.max_warmup_steps, least_steps), room))
    captured = min(cap, CAPTURE_STEPS) if trainer.config.compile else 0
    seconds = [_seconds_of_a_recorded_step(subject) for _ in range(captured)]
    while True:
        settled = settled_everywhere(subject, [first_step, *seconds])
        if settled or len(seconds) >= cap:
            return seconds, settled
        seconds.append(seconds_of_a_step(subject))


def settled_everywhere(subject: Subject, seconds: Sequence[float]) -> bool:
    """Whether the warm-up may end; a collective call."""
    span = warm_up_span(subject.protocol.warmup_steps, seconds[-1])
    return bool(least(has_settled(seconds, span), subject.device))


def has_settled(seconds: Sequence[float], span: int) -> bool:
    """Whether the medians of the last `span` step times and of those before agree."""
    if span == 0:
        return True
    if len(seconds) < 2 * span:
        return False
    before = statistics.median(seconds[-2 * span : -span])
    return abs(statistics.median(seconds[-span:]) / before - 1) <= WARM_TOLERANCE


def _pace(subject: Subject, warm: Sequence[float]) -> float | None:
    """Seconds that a step of the window will take; None if nothing tells.

    The program runs ahead of a GPU, so a step that is waited for takes longer than one of a window:
    further steps are taken there, waited for together, if the budget leaves room for them.
    """
    trainer, protocol = subject.trainer, subject.protocol
    left = trainer.total_steps - trainer.step - OBSERVED_STEPS - protocol.timed_steps
    wanted = protocol.timed_seconds or protocol.min_timed_seconds
    if subject.device.type == "cuda" and wanted and left >= PACE_STEPS:
        return pace_of_steps(subject)
    return statistics.median(warm[-protocol.warmup_steps :]) if warm else None


def pace_of_steps(subject: Subject) -> float:
    """Seconds of a step, on a GPU of several that are waited for together."""
    count = PACE_STEPS if subject.device.type == "cuda" else 1

    def steps() -> None:
        for _ in range(count):
            subject.trainer.train_step()

    return seconds_of(steps, subject.device) / count


def _window_steps(subject: Subject, pace: float | None) -> int:
    """Steps to time, one at least: see `fitting_steps`; whole rounds of local steps.

    One step of the budget is kept for the observation after the window.
    """
    trainer = subject.trainer
    steps = fitting_steps(subject.protocol, pace)
    left = trainer.total_steps - trainer.step - 1
    return min(trainer.rounds.whole(least(steps, subject.device)), left)


def fitting_steps(protocol: Protocol, pace: float | None) -> int:
    """Steps of a window at a `pace` in seconds per step, None if it is not known.

    As many as take `timed_seconds`, else `timed_steps` and more if they would take less than
    `min_timed_seconds`.
    """
    if pace is None:
        return protocol.timed_steps
    if protocol.timed_seconds is not None:
        return math.ceil(protocol.timed_seconds / pace)
    return max(protocol.timed_steps, math.ceil(protocol.min_timed_seconds / pace))


def filling_steps(protocol: Protocol, pace: float) -> int:
    """Steps of a further window, at a `pace` in seconds per step.

    `timed_steps`, and more if they would take less than `min_timed_seconds`, up to `MOST_FILLING`.
    """
    fitting = math.ceil(protocol.min_timed_seconds / pace)
    return max(protocol.timed_steps, min(fitting, MOST_FILLING))


def _timed_steps(subject: Subject, count: int, at_the_end: Callable[[], None]) -> list[float]:
    """Seconds of each step; `at_the_end` is called before the device is waited for."""
    clock = make_clock(subject.device)
    synchronize(subject.device)
    barrier()
    clock.mark()
    trainer, on_gpu = subject.trainer, subject.device.type == "cuda"
    for _ in range(count):
        trainer.train_step()
        if not on_gpu:  # where it would wait for the device
            check_if_due(trainer)
        clock.mark()
    at_the_end()
    return clock.seconds()


def check_if_due(trainer: Trainer) -> None:
    """Check the run as often as in training; a collective call."""
    if trainer.step % trainer.check_every == 0:
        trainer.check()


def _train_the_rest(subject: Subject) -> None:
    trainer = subject.trainer
    while trainer.step < trainer.total_steps:
        trainer.train_step()
        check_if_due(trainer)
    if trainer.step % trainer.check_every:  # else it was due just now
        trainer.check()
