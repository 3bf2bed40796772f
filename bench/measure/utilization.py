"""What a step costs in FLOPs, and how much of the peak measured on this device training uses."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from bench.measure.clock import make_clock, synchronize, timed
from bench.measure.subject import Subject
from bench.record import Label, Measurement
from cifar.config import PRECISIONS, ModelConfig
from cifar.cost import forward_flops, train_flops
from cifar.distributed import barrier, least
from cifar.models.meta import counted_flops

CASE_SECONDS = 0.25
"""Aimed at for the repetitions of one case."""
PEAK_SECONDS = 1.5
"""For all cases of a peak: one that would take longer at the rate found so far is not tried."""
MIN_REPETITIONS, MAX_REPETITIONS = 3, 100
UNKEPT_REPETITIONS = 2
"""One that picks the kernels, and one whose time tells how many fit."""
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""The smallest first: a device that emulates its precision gets no further."""
IMAGES = {"cpu": 16, "cuda": 1024}
"""Batch of the convolutions."""
CHANNELS_AND_SIDES = ((64, 32), (128, 16), (256, 8))
"""Channels of a 3x3 convolution and the side of its images, as in ResNet-18's first stages."""


def measure_flops(subject: Subject) -> Iterable[Measurement]:
    """FLOPs of one training image, forward and in both directions, by formula.

    Convolutions and linear layers alone count, and attention in libraries' networks, at two FLOPs
    per multiply-add, see `cifar.cost` and `cifar.models.meta`; augmentation, normalisation,
    resizing, activations and the optimiser do not. They are the model's, not a process's: one value
    however many ranks there are. In training a teacher's forward pass counts as well. SAM goes both
    ways twice.
    """
    trainer = subject.trainer
    height, width = trainer.dataset.train.images.shape[2:]
    forward, both = _model_flops(trainer.model_config, (height, width))
    if trainer.teacher is not None:
        both += _model_flops(trainer.teacher.model_config, (height, width))[0]
    passes = trainer.config.recipe.passes
    for name, flops in (("forward_flops", forward), ("train_flops", passes * both)):
        yield Measurement(name=name, unit="FLOP/sample", better="lower", samples=((float(flops),),))


def _model_flops(model: ModelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Of an image of this height and width, forward and in both directions."""
    if model.library:
        return counted_flops(model, size)
    return forward_flops(model, size), train_flops(model, size)


def measure_utilization(subject: Subject) -> Iterable[Measurement]:
    """Peaks of this device in the cell's precision, and the fraction of them that training uses.

    `peak_flops` is the rate of a matrix product (`kind` "matmul") and of a 3x3 convolution in the
    cell's memory format ("convolution"), the best of several shapes by the slowest rank's median;
    all ranks compute at once, so processes that share cores share their peak. Samples are FLOP/s
    of single repetitions. For `model_flops_utilization` see the function of that name.
    """
    peaks: list[tuple[float, Measurement]] = []
    with subject.watched("utilization") as monitor:
        for cases in (_matrix_products(subject), _convolutions(subject)):
            peaks.append(_best(subject, cases, monitor.look))
    yield from (each for _, each in peaks)
    peak, best = max(peaks, key=lambda pair: pair[0])
    fraction = model_flops_utilization(
        subject.value("train_flops"),
        subject.value("train_throughput"),
        peak,
        subject.trainer.place.count,
    )
    yield _utilization(fraction, {"peak_flops": peak, "peak_kind": best.labels["kind"]})


def _utilization(fraction: float, labels: dict[str, Label]) -> Measurement:
    """More than all there is was not the peak of what the training runs on."""
    name, unit = "model_flops_utilization", "fraction"
    if fraction > 1:
        reason = f"{fraction:.3g} of the measured peak: it is no peak"
        return Measurement(
            name=name, unit=unit, better="higher", labels=labels, status="failed", reason=reason
        )
    return Measurement(name=name, unit=unit, better="higher", labels=labels, samples=((fraction,),))


def model_flops_utilization(
    flops_per_sample: float, samples_per_second: float, peak: float, num_processes: int
) -> float:
    """The model's FLOPs done per second over those that `num_processes` devices could do.

    `samples_per_second` counts all processes, `peak` is one process's FLOP/s: the slowest one's,
    for every process gets an equal share of a batch and waits for it. FLOPs done twice, as in
    recomputing activations, do not count: Chowdhery et al. 2022, appendix B
    (https://arxiv.org/abs/2204.02311).
    """
    return flops_per_sample * samples_per_second / (num_processes * peak)


class Case(NamedTuple):
    """Work of a known cost."""

    labels: dict[str, Label]
    flops: int
    work: Callable[[], Tensor]


def _matrix_products(subject: Subject) -> Iterator[Case]:
    """Products of square matrices, one size after the other."""
    for size in MATRIX_SIZES[subject.device.type]:
        a, b = _random(subject, size, size), _random(subject, size, size)
        work = partial(torch.mm, a, b, out=torch.empty_like(a))
        yield Case({"kind": "matmul", "size": size}, 2 * size**3, work)


def _convolutions(subject: Subject) -> Iterator[Case]:
    """3x3 convolutions of stride 1 with as many output as input channels."""
    nhwc = subject.trainer.config.channels_last
    layout = torch.channels_last if nhwc else torch.contiguous_format
    count = IMAGES[subject.device.type]
    for channels, side in CHANNELS_AND_SIDES:
        images = _random(subject, count, channels, side, side).to(memory_format=layout)
        weight = _random(subject, channels, channels, 3, 3).to(memory_format=layout)
        flops = 2 * count * (channels * side * 3) ** 2
        labels: dict[str, Label] = {
            "kind": "convolution",
            "channels": channels,
            "side": side,
            "images": count,
        }
        yield Case(labels, flops, partial(F.conv2d, images, weight, padding=1))


def _random(subject: Subject, *shape: int) -> Tensor:
    """Normal values, since a GPU multiplies zeros at less power and higher clocks.

    In the format of the kernels that the training runs: fp32 where they emulate the precision.
    """
    trainer = subject.trainer
    assert trainer.config.precision is not None
    autocast = None if trainer.emulated else PRECISIONS[trainer.config.precision].autocast
    dtype = getattr(torch, autocast) if autocast else torch.float32
    return torch.randn(shape, device=trainer.device, dtype=dtype)


@torch.inference_mode()
def _best(
    subject: Subject, cases: Iterator[Case], look: Callable[[], None]
) -> tuple[float, Measurement]:
    """The case of the highest rate, and that rate in FLOP/s; a collective call.

    `look` is called while the device works off the repetitions of each.
    """
    began = time.perf_counter()
    found: list[tuple[float, Measurement]] = []
    for case in cases:
        if found and not _fits(
            subject, case, max(pair[0] for pair in found), time.perf_counter() - began
        ):
            break
        rates = [case.flops / seconds for seconds in _seconds(subject, case.work, look)]
        each = subject.measurement("peak_flops", "FLOP/s", "higher", rates, **case.labels)
        assert each.value is not None
        found.append((each.value, each))
    return max(found, key=lambda pair: pair[0])


def _fits(subject: Subject, case: Case, rate: float, elapsed: float) -> bool:
    """Whether every rank has the time for a case at `rate` FLOP/s; a collective call."""
    seconds = (MIN_REPETITIONS + UNKEPT_REPETITIONS) * case.flops / rate
    return bool(least(elapsed + seconds <= PEAK_SECONDS, subject.device))


def _seconds(subject: Subject, work: Callable[[], Tensor], look: Callable[[], None]) -> list[float]:
    """Seconds of each repetition, as many on every rank; the first two are not kept."""
    work()
    synchronize(subject.device)
    start = time.perf_counter()
    work()
    synchronize(subject.device)
    fitting = int(CASE_SECONDS / (time.perf_counter() - start))
    count = least(max(MIN_REPETITIONS, min(MAX_REPETITIONS, fitting)), subject.device)
    barrier()
    return timed(make_clock(subject.device), work, count, look)
