"""Peak memory of training: what a GPU's allocator gave out, on a CPU the resident set."""

import torch

from cifar.memory import peak_resident, reset_peak_resident


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
