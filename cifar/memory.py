"""A process's memory on the host: its peak, and what is said when it runs out. No torch."""

import ctypes
import re
import resource
import sys
from pathlib import Path

OUT_OF_MEMORY = re.compile(
    r"^(?:[\w.]*(?:OutOfMemoryError|MemoryError)\b|what\(\):\s+std::bad_alloc)"
    r"|\b(?:CUDA|HIP|XPU)(?:(?: driver)? error:)? out of memory"
    r"|Triton Error \[\w+\]: out of memory|[Cc]uda failure(?: \d+)? '?out of memory"
    r"|DefaultCPUAllocator: (?:can't|not enough)|std::bad_alloc"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|_(?:DEVICE|HOST)_ALLOCATION_FAILED"
    r"|Cannot allocate memory|oom-kill|Out of memory: Killed"
)
"""What Python, torch, the libraries of kernels and the system say of it, after the error's name."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its GPU did not suffice."""
    return OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}") is not None


def give_heap_back() -> None:
    """Return to the kernel what this process has freed and the C library kept, as far as it can.

    glibc alone can be told to, and under `cifar.process.MALLOC` gives back next to nothing by
    itself (https://man7.org/linux/man-pages/man3/malloc_trim.3.html). Pages that are used again
    are faulted in anew, so a warm-up must come next and never a timed window.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


def reset_peak_resident() -> bool:
    """Start the high-water mark of this process's resident set anew; whether that could be done.

    The kernel sets it to what is resident now: the heap is given back first, or the mark would be
    that of work before.
    """
    give_heap_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not on this system, or forbidden: the mark then stands
        return False
    return True


def peak_resident() -> int:
    """The high-water mark of this process's resident set in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
