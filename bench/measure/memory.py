"""Peak memory of training: of the device, or this process's resident set on a CPU."""

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.measure.subject import Subject
from bench.record import Measurement


def peak_memory(subject: Subject, *, was_reset: bool) -> Iterable[Measurement]:
    """The high-water mark since `reset_peak_memory`, and whether that could reset it."""
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
        kind=f"resident set {'while training' if was_reset else 'since the process started'}",
    )


def reset_peak_memory(device: torch.device) -> bool:
    """Start the high-water mark anew, so that loading the data does not count; whether it could.

    A GPU's allocator gives back nothing by itself: what was freed goes back first, or it would
    count as reserved. The next step takes again what a step needs, so a window must not be next.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not on this system, or forbidden: the mark then stands
        return False
    return True


def _peak_resident() -> int:
    """The high-water mark of this process's resident set in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
