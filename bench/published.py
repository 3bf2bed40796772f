"""Published figures of the projects that recipes are made after, to stand beside our own."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Figures of a project's own, of its full budget and its hardware, which it does not name.

    `top1` is a fraction, `inference_latency` seconds per sample, `checkpoint_bytes` a file's, with
    whatever else it holds.
    """

    top1: float
    checkpoint_bytes: float | None = None
    inference_latency: float | None = None


PUBLISHED = {
    "resnet18-jitter": Published(
        top1=0.9402, checkpoint_bytes=42.70 * 2**20, inference_latency=0.02767
    ),
    "resnet50-small": Published(top1=0.9559),
    "resnet34-small": Published(top1=0.9512),
    "resnet26-small": Published(top1=0.9029),
    "resnet9-one-cycle": Published(top1=0.9235),
}
"""By recipe, whose docstring names the source."""
