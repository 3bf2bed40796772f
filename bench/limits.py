"""A limit on the memory of this process, which turns over-allocation into an error of its own."""

import os
import resource
import sys

import torch

from cifar.accelerator import check_devices
from cifar.config import require
from cifar.errors import UnsupportedError
from cifar.ranks import local_rank


def limit_memory(limit: int | None) -> None:
    """Let this process allocate no more than `limit` bytes; None: as much as there is.

    On a GPU it bounds what PyTorch's allocator takes of this process's device
    (https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.set_per_process_memory_fraction.html):
    CUDA's context comes on top. On a CPU it bounds all private writable memory, the interpreter's
    and torch's own (0.8 GiB) included: RLIMIT_DATA of setrlimit(2), Linux 4.7 or newer. RLIMIT_AS
    would also count the 2 GiB of mapped libraries, which take memory from nobody.

    Raises:
        ConfigError: more than there is or than is allowed, or this process has no GPU.
        UnsupportedError: this system's kernel has no such limit.
    """
    if limit is None:
        return
    if torch.cuda.is_available():
        check_devices(os.environ)
        _limit_gpu(limit, max(0, local_rank(os.environ)))
    else:
        _limit_process(limit)


def _limit_gpu(limit: int, index: int) -> None:
    total = torch.cuda.get_device_properties(index).total_memory
    _require_at_most(limit, total, "device has")
    torch.cuda.set_per_process_memory_fraction(limit / total, index)


def _limit_process(limit: int) -> None:
    if sys.platform != "linux":
        raise UnsupportedError(
            f"memory-limit: {limit}: {sys.platform} enforces none on a process's memory; "
            "measure the frontier on Linux or on a GPU"
        )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        _require_at_most(limit, hard, "process may have")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _require_at_most(limit: int, most: int, what: str) -> None:
    remedy = f"the {what} {most} bytes; give at most {most // 2**20} MiB"
    require(limit <= most, "memory-limit", limit, remedy)
