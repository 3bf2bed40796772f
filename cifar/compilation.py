"""torch.compile, with the kernels that may be relied on."""

from typing import Any, cast

import torch
from torch import nn


def compiled(module: nn.Module, mode: str, **options: Any) -> nn.Module:
    """A module that runs through `torch.compile` in that mode; it compiles in the first call.

    `max-autotune` chooses among the libraries' convolutions: Inductor's own of more than one pixel
    were miscompiled until 2026, and nothing compares the results of the kernels that are tried
    (https://github.com/pytorch/pytorch/issues/173068); nor are they seen among what ran.
    """
    from torch._inductor import config

    config.max_autotune_conv_backends = "ATEN"
    return cast(nn.Module, torch.compile(module, mode=mode, **options))
