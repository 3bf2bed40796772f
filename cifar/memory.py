"""Running out of memory, told in one line instead of a traceback."""

import contextlib
from collections.abc import Iterator

import torch

from cifar.config import TrainConfig
from cifar.errors import OutOfMemoryError

_SAID = (
    *("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory"),
    *("out of memory", "std::bad_alloc"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""What torch's allocator on a CPU, the CUDA runtime and NVIDIA's libraries say of it, in errors of
types that mean anything."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its GPU did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextlib.contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """While entered, running out of memory is an error that names the model and the remedy.

    Raises:
        OutOfMemoryError: in place of whatever says so.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"memory: model {config.model.label} with batch size "
            f"{config.recipe.global_batch_size} does not fit; choose a smaller --width or -b, or "
            "more --accumulation"
        ) from None
