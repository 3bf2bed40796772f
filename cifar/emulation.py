"""bf16 on a CPU without kernels for it: the same arithmetic, somewhat slower than fp32."""

from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.precision import is_emulated


def emulate_if_needed(module: nn.Module, precision: str | None, device: torch.device) -> bool:
    """Call `emulate_bf16` where this is bf16 on a CPU that has no kernels for it; whether it is."""
    needed = precision == "bf16" and device.type == "cpu" and is_emulated(precision, device)
    if needed:
        emulate_bf16(module)
    return needed


def emulate_bf16(module: nn.Module) -> None:
    """Let a module's convolutions and linear layers compute bf16 products with fp32 kernels.

    Images, weights and outputs, and in the backward pass their gradients, are rounded to bf16;
    products, which fp32 holds exactly, are summed in fp32. That is what bf16 kernels do
    (https://uxlfoundation.github.io/oneDNN/dev_guide_data_types.html), but for the order of the
    sums. This happens under autocast, which rounds the results of the other layers; elsewhere the
    module computes as ever, and so do layers with a `forward` of their own. Compiled code rounds as
    well from here on, which Inductor leaves out where it fuses otherwise.
    """
    from torch._inductor import config as inductor  # takes as long to import as torch

    inductor.emulate_precision_casts = True
    for layer in module.modules():
        for kind, forward in _FORWARD.items():
            if isinstance(layer, kind) and type(layer).forward is kind.forward:
                layer.forward = MethodType(forward, layer)


def _convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return nn.Conv2d.forward(layer, images)
    with torch.autocast("cpu", enabled=False):
        sums: Tensor = layer._conv_forward(*_rounded(images, layer))
    return sums.bfloat16()


def _project(layer: nn.Linear, features: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(layer, features)
    with torch.autocast("cpu", enabled=False):
        sums = F.linear(*_rounded(features, layer))
    return sums.bfloat16()


def _rounded(given: Tensor, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias as the nearest bf16 values in fp32; gradients are rounded as well."""
    bias = None if layer.bias is None else layer.bias.bfloat16().float()
    return given.bfloat16().float(), layer.weight.bfloat16().float(), bias


_FORWARD: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv2d: _convolve,
    nn.Linear: _project,
}
