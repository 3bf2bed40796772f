"""A process that infers its first image: `python -m bench.cold FOLDER` tells what that took.

FOLDER holds a checkpoint. One line of JSON is printed, with the seconds of `Cold`.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cifar.network import load_network

STARTED = "BENCH_COLD_STARTED"
"""The environment variable that tells when the process was started, by `time.monotonic`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cold:
    """Seconds: from the start to the logits, and the last two batches of one image in it."""

    start: float
    first: float
    second: float


@torch.inference_mode()
def infer(folder: Path, device: torch.device) -> Cold:
    """Load the weights, then infer an image twice."""
    network = load_network(folder, precision=None, device=device)
    shape = (1, network.card.config.model.in_channels, *network.card.image_size)
    images = torch.zeros(shape, device=device)
    moments = [time.monotonic()]
    for _ in range(2):
        network.logits(images).cpu()
        moments.append(time.monotonic())
    return Cold(
        start=moments[1] - float(os.environ[STARTED]),
        first=moments[1] - moments[0],
        second=moments[2] - moments[1],
    )


if __name__ == "__main__":
    print(json.dumps(asdict(infer(Path(sys.argv[1]), torch.device(sys.argv[2])))))
