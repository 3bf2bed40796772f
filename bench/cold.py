"""A process that infers its first image: `python -m bench.cold FOLDER DEVICE` tells what that took.

FOLDER holds a checkpoint. One line of JSON is printed, with the fields of `Cold`.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cifar.network import Network, load_network

STARTED = "BENCH_COLD_STARTED"
"""The environment variable that tells when the process was started, by `time.monotonic`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cold:
    """Seconds from the start to the logits, and of the first two calls; what they computed."""

    start: float
    first: float
    second: float
    logits: list[float]
    seen: dict[str, str | int | float | bool]
    """What an inner convolution received in a third call, see `bench.observe`."""


@torch.inference_mode()
def infer(folder: Path, device: torch.device) -> Cold:
    """Load the weights, then infer an image twice, in the precision and layout of the checkpoint.

    Raises:
        CheckpointError: no weights there, or damaged.
        UnsupportedError: the device cannot run the precision.
    """
    network = load_network(folder, precision=None, device=device)
    config = network.card.config
    size = (config.model.in_channels, *network.card.image_size)
    images = ramp(size, device, channels_last=config.channels_last)
    logits = torch.empty(0)
    moments = [time.monotonic()]
    for _ in range(2):
        logits = network.logits(images).cpu()
        moments.append(time.monotonic())
    return Cold(
        start=moments[1] - float(os.environ[STARTED]),
        first=moments[1] - moments[0],
        second=moments[2] - moments[1],
        logits=logits[0].tolist(),
        seen=_observe(network, images),
    )


def ramp(size: Sequence[int], device: torch.device, *, channels_last: bool) -> Tensor:
    """An image `[1, C, H, W]` that any process can make: pixels from -1 to 1 in their order."""
    image = torch.linspace(-1, 1, torch.Size(size).numel(), device=device).view(1, *size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return image.to(memory_format=layout)


def _observe(network: Network, images: Tensor) -> dict[str, str | int | float | bool]:
    from bench.observe import InferenceWitness  # imports the trainer, so after the clock

    witness = InferenceWitness(network.module, compiled=False)
    return witness.observe(lambda: network.logits(images))


if __name__ == "__main__":
    print(json.dumps(asdict(infer(Path(sys.argv[1]), torch.device(sys.argv[2])))))
