"""Inference latency: seconds per sample from images on the device to finished logits."""

import time
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from bench.measure.clock import synchronize
from bench.measure.subject import Subject
from bench.record import Measurement
from cifar.distributed import barrier, least
from cifar.trainer import Trainer


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
