"""A device's memory: what training takes of it at most, and running out of it told in one line.

That is what a GPU's allocator gave out, and on a CPU the resident set.
"""

import contextlib
import re
from collections.abc import Iterator

import torch

from cifar.config import TrainConfig
from cifar.errors import OutOfMemoryError
from cifar.memory import is_out_of_memory, peak_resident, reset_peak_resident

_HIDING = re.compile(
    r"(?:FIND|GET) was unable to find an engine to execute this computation"
    r"|CU(?:BLAS|DNN)_STATUS_NOT_INITIALIZED"
)
"""What torch says where cuDNN had no room for the workspace of any kernel, each of which it tries
and forgets (`try_plans` in aten/src/ATen/native/cudnn/Conv_v8.cpp, pytorch#108645), and where a
library had none for its handle; it says the same of libraries that do not fit the GPU."""
_FULL = 256 * 2**20
"""Bytes left of a GPU below which a library's handle and kernels may not fit: our choice."""


def reset_peak_memory(device: torch.device) -> bool:
    """Start the high-water mark anew, so that loading the data does not count; whether it could.

    Neither a GPU's allocator nor a CPU's gives back anything by itself: what was freed goes back
    first, or it would count. The next step takes again what a step needs, so a warm-up must be
    next and never a timed window.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return reset_peak_resident()


def peak_memory(device: torch.device) -> int:
    """The high-water mark in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, or hides it and a GPU's is at its end."""
    return is_out_of_memory(error) or (bool(_HIDING.search(str(error))) and _is_full())


def _is_full() -> bool:
    """Whether this process was refused memory of its GPU, or next to none of that is left.

    A refusal that was got over counts too: cuDNN's search has some where all goes well.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    if torch.cuda.memory_stats().get("num_ooms", 0):
        return True
    with contextlib.suppress(RuntimeError):  # after an error that the device does not recover from
        return torch.cuda.mem_get_info()[0] < _FULL
    return False


@contextlib.contextmanager
def named() -> Iterator[None]:
    """While entered, an error that hides that a GPU's memory ran out is raised as one that says so.

    Raises:
        torch.OutOfMemoryError: in its place; it follows from the other one.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or not ran_out(error):
            raise
        raise torch.OutOfMemoryError(f"CUDA out of memory: {error}") from error


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """While entered, running out of memory is an error: `what` does not fit, and the remedy.

    Raises:
        OutOfMemoryError: in place of whatever says so.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(f"memory: {what} does not fit; {remedy}") from None


def explained_training(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """`explained` for a model in training."""
    smaller = "--resize" if config.model.library else "--width"
    return explained(
        f"model {config.model.label} with batch size {config.recipe.global_batch_size}",
        f"choose a smaller {smaller} or -b, or more --accumulation",
    )
