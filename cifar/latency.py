"""Inference latency of a network that is ready: a short look, where `bench` measures at length."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Batches before the clock starts: libraries load and choose their kernels in the first ones."""
MOST_BATCHES = 50
SECONDS = 2.0
"""After which no further batch is timed; three are at least."""


@torch.inference_mode()
def latency(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Seconds per sample of images `[B, C, H, W]` on their device: the median of batches that are
    each waited for."""
    seconds: list[float] = []
    began = time.perf_counter()
    for number in range(WARM_UP + MOST_BATCHES):
        start = time.perf_counter()
        run(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        end = time.perf_counter()
        if number == WARM_UP - 1:
            began = end
        elif number >= WARM_UP:
            seconds.append(end - start)
            if end - began > SECONDS and len(seconds) >= 3:
                break
    return statistics.median(seconds) / len(images)
