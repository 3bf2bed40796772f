"""How long tasks will take: from records of the same machine, else from arithmetic."""

import math
import statistics
from collections.abc import Sequence

from bench.protocol import Protocol
from bench.record import Record, this_host
from bench.spec import OBSERVED_STEPS, Cell, warm_up_span
from cifar.config import ModelConfig, TrainConfig
from cifar.cost import multiply_adds

START_SECONDS = 10.0
"""From command to first step: interpreter, torch, launcher, data."""
COMPILE_SECONDS = 60.0
"""torch.compile of a training step and of inference, cold."""
ASSUMED_FLOPS = 1e11
"""FLOP/s until a record of this machine says otherwise: two slow CPU cores in fp32."""
BUILD_SECONDS = 30.0
"""To compile or export for inference, for one batch size."""
FURTHER_SECONDS = 15.0
"""Of each further metric, roughly."""
PIXEL_COST = 5e4
"""Multiply-adds for each pixel of a library's network, of whose layers nothing is known here:
ResNet-50 has 82,000, ResNet-18 36,000."""
TRAINING_COST = 3
"""Forward and backward pass in forward passes: the backward pass has two products per layer."""
IMAGE_SIZES = {"tiny-imagenet": (64, 64)}
"""Height and width in pixels by data source; those of shapes and CIFAR, 32x32, for the others."""
TEST_SAMPLES = {"shapes": 2_000}
"""By data source; CIFAR's 10,000 for the others."""
TRAIN_SAMPLES = {"shapes": 10_000}
"""By data source; CIFAR's 50,000 for the others."""


def estimate_seconds(
    cell: Cell,
    protocol: Protocol,
    *,
    history: Sequence[Record] = (),
    host: str | None = None,
) -> float:
    """Expected seconds of wall time of one repeat, from launch to end.

    The median duration of the ok or unsupported records of the same cell and protocol in `history`;
    without one, multiply-adds over an assumed rate, corrected by the median ratio of actual to
    estimated time over the ok records in `history`. Only records of this machine (`host`) count.
    """
    host = host or this_host()
    mine = [
        record
        for record in history
        if record.environment and record.environment.host == host and not _ended_early(record)
    ]
    wanted = (cell.digest, protocol.digest)
    same = [
        record.duration_s
        for record in mine
        if record.status in ("ok", "unsupported") and record.key[:2] == wanted
    ]
    if same:
        return statistics.median(same)
    ratios = [
        max(record.duration_s - START_SECONDS, 0.0) / _work_seconds(record.cell, record.protocol)
        for record in mine
        if record.status == "ok"
    ]
    ratio = statistics.median(ratios) if ratios else 1.0
    return START_SECONDS + ratio * _work_seconds(cell, protocol)


def _ended_early(record: Record) -> bool:
    """Whether it is of a trial that did not train to its end, which took less than it may."""
    reached = record.find("validation_top1")
    return reached is not None and reached.status != "ok"


def _work_seconds(cell: Cell, protocol: Protocol) -> float:
    """Seconds at the assumed rate, start-up left out; inference within its time limit.

    A teacher's answers are left out too: a cell does not tell how large it is.
    """
    train = cell.train
    size = IMAGE_SIZES.get(train.data.source, (32, 32))
    forward = 2 * _multiply_adds(train.model, size) / ASSUMED_FLOPS
    if protocol.validation_alone:
        return _trial_seconds(train, forward)
    seconds = _training_seconds(
        train.recipe.passes * forward, train.recipe.global_batch_size, protocol
    )
    seconds += FURTHER_SECONDS * len(protocol.metrics)
    if protocol.train_samples:
        seconds += forward * TEST_SAMPLES.get(train.data.source, 10_000)
    seconds += _inference_seconds(forward, protocol)
    return seconds + (COMPILE_SECONDS if train.compile else 0.0)


def _multiply_adds(model: ModelConfig, size: tuple[int, int]) -> float:
    """Those of one image of this height and width forward."""
    if model.library:
        return PIXEL_COST * math.prod(model.input_size(size))
    return multiply_adds(model, size)


def _trial_seconds(train: TrainConfig, forward: float) -> float:
    """Seconds of all epochs and of scoring the images held out after each."""
    recipe = train.recipe
    images = train.limit_train or TRAIN_SAMPLES.get(train.data.source, 50_000)
    trained = TRAINING_COST * recipe.passes * (1 - recipe.validation) + recipe.validation
    return forward * images * recipe.epochs * trained


def _training_seconds(forward: float, batch_size: int, protocol: Protocol) -> float:
    """Seconds of all steps, at `forward` seconds for one sample; a budget holds the timed ones."""
    if protocol.train_samples:
        return TRAINING_COST * forward * protocol.train_samples
    step = TRAINING_COST * forward * batch_size
    untimed = step * (max(1, 2 * warm_up_span(protocol.warmup_steps, step)) + OBSERVED_STEPS)
    if protocol.timed_seconds is not None:
        return untimed + protocol.timed_seconds
    return untimed + max(step * protocol.timed_steps, protocol.min_timed_seconds)


def _inference_seconds(forward: float, protocol: Protocol) -> float:
    """Seconds of timing and building all backends, at `forward` seconds for one sample."""
    timing = 0.0
    for size in protocol.inference_batch_sizes:
        batch = forward * size
        least = min(protocol.inference_iterations, 3) * batch
        filled = max(protocol.inference_iterations * batch, protocol.min_timed_seconds)
        timed = min(filled, protocol.inference_seconds)
        warm = max(1, 2 * warm_up_span(protocol.inference_warmup, batch)) * batch
        row = max(batch, protocol.throughput_seconds) if protocol.throughput_seconds else 0.0
        timing += warm + max(least, timed) + row
    further = len(protocol.inference_backends)
    building = BUILD_SECONDS * len(protocol.inference_batch_sizes)
    return (1 + further) * timing + further * building
