"""Peak memory of training as measurements."""

from collections.abc import Iterable

import torch

from bench.measure.subject import Subject
from bench.record import Measurement
from cifar import device_memory


def measure_peak(
    subject: Subject, *, was_reset: bool, with_trials: bool = False
) -> Iterable[Measurement]:
    """The high-water mark since `reset_peak_memory`, and whether that could reset it.

    `with_trials`: what a GPU's libraries took to try kernels out is in it.
    """
    on_gpu = subject.device.type == "cuda"
    since = "while training" if was_reset else "since the process started"
    trials = ", trying kernels out included" if with_trials else ""
    kind = f"allocated on the device{trials}" if on_gpu else f"resident set {since}"
    peak = device_memory.peak_memory(subject.device)
    yield subject.measurement("peak_memory_bytes", "bytes", "lower", [peak], kind=kind)
    if on_gpu:
        reserved = torch.cuda.max_memory_reserved(subject.device)
        yield subject.measurement("peak_memory_reserved_bytes", "bytes", "lower", [reserved])
