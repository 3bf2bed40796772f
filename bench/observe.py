"""What a trainer really ran with, observed on its own tensors, against what the cell asked for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bench.record import Label
from bench.spec import Cell
from cifar.config import PRECISIONS
from cifar.trainer import Trainer

_DTYPES = {None: "float32", "bfloat16": "bfloat16", "float16": "float16"}


@torch.inference_mode()
def observe(trainer: Trainer) -> dict[str, Label]:
    """Formats of a convolution's output and weights in the middle of the net, device, processes."""
    convolutions = [layer for layer in trainer.module.modules() if isinstance(layer, nn.Conv2d)]
    inner = convolutions[len(convolutions) // 2]
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    hook = inner.register_forward_hook(note)
    trainer.module.eval()
    try:
        trainer.module(trainer.test_images.batch(torch.arange(2, device=trainer.device)).images)
    finally:
        hook.remove()
    output = seen[0]
    return {
        "device": trainer.device.type,
        "num_processes": trainer.place.count,
        "wrapper": type(trainer.wrapped).__name__,
        "compute_dtype": str(output.dtype).removeprefix("torch."),
        "weight_dtype": str(inner.weight.dtype).removeprefix("torch."),
        "channels_last": _is_channels_last(output),
        "tf32": bool(torch.backends.cudnn.allow_tf32),
        "loss_scaling": trainer.scaler is not None,
        "compile": counters["stats"]["unique_graphs"] > 0,
        "skipped_steps": trainer.meter.skipped_steps,
        "samples_seen": trainer.samples_seen,
    }


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether NHWC order alone describes the tensor's memory."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def mismatches(cell: Cell, effective: dict[str, Label]) -> list[str]:
    """What differs from what was asked, one phrase each."""
    precision = PRECISIONS[cell.precision]
    asked: dict[str, Label] = {
        "num_processes": cell.num_processes,
        "compute_dtype": _DTYPES[precision.autocast],
        "weight_dtype": "float32",
        "channels_last": cell.train.channels_last,
        "compile": cell.train.compile,
        "tf32": precision.tf32,
        "loss_scaling": precision.loss_scaling,
    }
    return [
        f"{name}: {effective[name]} where {value} was asked"
        for name, value in asked.items()
        if effective[name] != value
    ]
