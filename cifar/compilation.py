"""torch.compile, with the kernels that may be relied on."""

import os
from typing import Any, cast

import torch
from torch import nn

_CHOSEN = "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS"


def compiled(module: nn.Module, mode: str, **options: Any) -> nn.Module:
    """A module that runs through `torch.compile` in that mode; it compiles in the first call.

    `max-autotune` chooses among the libraries' convolutions, unless torch's variable names others:
    Inductor's own of more than one pixel were miscompiled before May 2026, and nothing compares the
    results of the kernels that are tried (https://github.com/pytorch/pytorch/issues/173068); nor
    are they seen among what ran.
    """
    from torch._inductor import config

    if _CHOSEN not in os.environ:
        config.max_autotune_conv_backends = "ATEN"
    return cast(nn.Module, torch.compile(module, mode=mode, **options))
