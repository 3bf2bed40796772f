"""One function per metric; `METRICS` is the order in which a worker takes them.

A metric reads the subject, does its work and returns measurements that carry their unit and
direction, so nothing else has to know of a new one.
"""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, cast
from typing import Protocol as Shape

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bench.record import Label, Measurement
from bench.spec import Protocol
from cifar.distributed import barrier, gather, least
from cifar.trainer import Trainer

Better = Literal["higher", "lower", "none"]


class Subject:
    """A cell's trainer and protocol; metrics before it in `METRICS` have left it as it is."""

    def __init__(self, trainer: Trainer, protocol: Protocol) -> None:
        self.trainer = trainer
        self.protocol = protocol

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.trainer.device

    def measurement(
        self,
        name: str,
        unit: str,
        better: Better,
        mine: Sequence[float],
        **labels: Label,
    ) -> Measurement:
        """A measurement from this process's samples and the other processes'; a collective call."""
        samples = gather(mine, self.device)
        return Measurement(name=name, unit=unit, better=better, labels=labels, samples=samples)


def planned_steps(protocol: Protocol, batch_size: int) -> int:
    """Optimiser steps a worker takes: the training budget, or just warm-up and timed ones.

    The first step is never timed.
    """
    timed = max(1, protocol.warmup_steps) + protocol.timed_steps
    return protocol.train_samples // batch_size or timed


class Clock(Shape):
    """Marks moments in the device's work without waiting for it."""

    def mark(self) -> None:
        """This moment."""

    def seconds(self) -> list[float]:
        """Between neighbouring moments; waits for the device."""


class HostClock:
    """For devices that compute while the program waits, as a CPU does."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """This moment."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring moments."""
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


class CudaClock:
    """Events in the stream of a GPU."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """This moment in the stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between neighbouring events; waits for the last one."""
        self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def make_clock(device: torch.device) -> Clock:
    """The clock for a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_training(subject: Subject) -> Iterable[Measurement]:
    """Train for the budget; time the steps after the warm-up; peak memory of it all.

    Nothing is read from the device inside the timed window. A step's seconds include loading,
    augmenting and normalising its batch.
    """
    trainer, protocol = subject.trainer, subject.protocol
    _reset_peak_memory(subject.device)
    first_step = _first_step(subject)
    warmup = min(protocol.warmup_steps, trainer.total_steps - 1)
    while trainer.step < warmup:
        trainer.train_step()
    timed = min(protocol.timed_steps, trainer.total_steps - trainer.step)
    yield subject.measurement(
        "train_throughput",
        "samples/s",
        "higher",
        _timed_steps(subject, timed),
        samples_per_step=trainer.loader.global_batch_size,
    )
    trainer.check()
    while trainer.step < trainer.total_steps:
        trainer.train_step()
        if trainer.step % trainer.check_every == 0 or trainer.step == trainer.total_steps:
            trainer.check()
    yield subject.measurement("first_step", "s", "lower", [first_step])
    yield from _peak_memory(subject)


def _first_step(subject: Subject) -> float:
    """Seconds of the first step, with allocation, autotuning and, where asked, compilation."""
    synchronize(subject.device)
    start = time.perf_counter()
    subject.trainer.train_step()
    synchronize(subject.device)
    return time.perf_counter() - start


def _timed_steps(subject: Subject, count: int) -> list[float]:
    clock = make_clock(subject.device)
    synchronize(subject.device)
    barrier()
    clock.mark()
    for _ in range(count):
        subject.trainer.train_step()
        clock.mark()
    return clock.seconds()


def _peak_memory(subject: Subject) -> Iterable[Measurement]:
    if subject.device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(subject.device)
        reserved = torch.cuda.max_memory_reserved(subject.device)
        yield subject.measurement(
            "peak_memory_bytes", "bytes", "lower", [allocated], kind="allocated on the device"
        )
        yield subject.measurement("peak_memory_reserved_bytes", "bytes", "lower", [reserved])
        return
    yield subject.measurement(
        "peak_memory_bytes",
        "bytes",
        "lower",
        [_peak_resident()],
        kind="resident set while training",
    )


def _reset_peak_memory(device: torch.device) -> None:
    """Start the high-water mark anew, so that loading the data does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not on this system, or forbidden: the mark then stands
            Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    """The high-water mark of this process's resident set in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_accuracy(subject: Subject) -> Iterable[Measurement]:
    """Top-1, top-5 and loss of the last weights on the whole test split, after the budget."""
    trainer = subject.trainer
    if not subject.protocol.train_samples:
        reason = "not trained: the protocol's training budget is 0 samples"
        yield Measurement(
            name="top1", unit="fraction", better="higher", status="absent", reason=reason
        )
        return
    result = trainer.evaluate()
    labels: dict[str, Label] = {
        "split": "test",
        "weights": "last",
        "samples": result.samples,
        "trained_samples": trainer.samples_seen,
    }
    for name, unit, better, value in (
        ("top1", "fraction", "higher", result.top1),
        ("top5", "fraction", "higher", result.top5),
        ("test_loss", "nats", "lower", result.loss),
    ):
        yield Measurement(
            name=name, unit=unit, better=cast(Better, better), labels=labels, samples=((value,),)
        )


def measure_size(subject: Subject) -> Iterable[Measurement]:
    """Parameters, and the bytes of the weights alone as a safetensors file."""
    trainer = subject.trainer
    count = sum(parameter.numel() for parameter in trainer.module.parameters())
    weights = {name: tensor.cpu().contiguous() for name, tensor in trainer.eval_weights().items()}
    for name, unit, value in (
        ("param_count", "1", count),
        ("checkpoint_bytes", "bytes", len(save(weights))),
    ):
        yield Measurement(name=name, unit=unit, better="lower", samples=((float(value),),))


@torch.inference_mode()
def measure_inference(subject: Subject) -> Iterable[Measurement]:
    """Seconds per sample from images on the device to finished logits, at each batch size.

    Every batch is waited for, so at batch 1 this is the latency of images that come one at a time
    (DAWNBench). The number of processes does not matter: each one measures on its own device.
    """
    trainer, protocol = subject.trainer, subject.protocol
    trainer.module.eval()
    for size in protocol.inference_batch_sizes:
        model = _inference_model(trainer)
        images = _test_images(trainer, size)
        seconds = _time_batches(model, images, subject)
        yield subject.measurement(
            "inference_latency",
            "s/sample",
            "lower",
            [value / size for value in seconds],
            batch_size=size,
        )


def _inference_model(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """The weights as they are trained, without the wrapper that training on many devices needs."""
    if not trainer.config.compile:
        return trainer.module
    compiled = torch.compile(trainer.module, mode=trainer.config.compile_mode, dynamic=False)
    return cast(nn.Module, compiled)


def _test_images(trainer: Trainer, size: int) -> Tensor:
    """`size` normalised test images, `[size, C, H, W]`; repeated if there are fewer."""
    samples = torch.arange(size, device=trainer.device) % len(trainer.test_images)
    return trainer.test_images.batch(samples).images


def _time_batches(
    model: Callable[[Tensor], Tensor], images: Tensor, subject: Subject
) -> list[float]:
    protocol, device = subject.protocol, subject.device
    for _ in range(max(1, protocol.inference_warmup)):
        model(images)
    synchronize(device)
    barrier()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < protocol.inference_iterations:
        start = time.perf_counter()
        model(images)
        synchronize(device)
        end = time.perf_counter()
        seconds.append(end - start)
        if end - began > protocol.inference_seconds and len(seconds) >= 3:
            break
    return seconds[: least(len(seconds), device)]


def compile_seconds(measurements: Sequence[Measurement]) -> Measurement:
    """What compiling cost: the first step's seconds less those of a step in the timed window."""
    found = {each.name: each for each in measurements}
    steps, first = found["train_throughput"], found["first_step"]
    cost = tuple(
        (max(0.0, began[0] - statistics.median(rank)),)
        for began, rank in zip(first.samples, steps.samples, strict=True)
    )
    return Measurement(name="compile_seconds", unit="s", better="lower", samples=cost)


Metric = Callable[[Subject], Iterable[Measurement]]

METRICS: tuple[Metric, ...] = (
    measure_training,
    measure_accuracy,
    measure_size,
    measure_inference,
)
