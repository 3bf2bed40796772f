"""Where a cell's training runs, as found: its engine, processes, devices and their backend.

Accelerate may quietly start plain data parallelism, or one process, instead of what was asked, so
nothing here goes by what was configured.
"""

import os
import socket
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bench.judge import Labels
from cifar.distributed import gather_text
from cifar.trainer import Trainer


def placement(trainer: Trainer) -> Labels:
    """Of a trainer between two steps; a collective call.

    `devices` counts those that differ: GPUs by their UUID. Processes on CPUs share a machine's
    cores, of which none is any process's own: there the count is of the numbers that the launcher
    gave them, and nothing observed. `weights_held` and `weights_updated` are the
    fractions of all weights that lie on this process and that its optimiser changes, 1 where
    nothing is shared out.
    """
    grouped = dist.is_available() and dist.is_initialized()
    total = sum(each.numel() for each in trainer.bare.parameters())
    return {
        "num_processes": dist.get_world_size() if grouped else 1,
        "devices": len(set(gather_text(_device(trainer.device), trainer.device))),
        "backend": str(dist.get_backend()) if grouped else "none",
        "wrapper": wrapper_of(trainer),
        "weights_held": round(_held(trainer) / total, 4),
        "weights_updated": round(_updated(trainer) / total, 4),
    }


def wrapper_of(trainer: Trainer) -> str:
    """What the network is called through: a class, or the name of an engine and its stage."""
    model = getattr(trainer.model, "_orig_mod", trainer.model)
    if isinstance(model, FSDPModule):
        return "FSDP2"
    if type(model).__name__ == "DeepSpeedEngine":
        return f"ZeRO-{_zero_stage(trainer)}"
    return type(model).__name__


def _zero_stage(trainer: Trainer) -> int:
    """By what DeepSpeed's optimiser does, whatever the engine was configured with.

    0: it shares out nothing. Stages 1 and 2 are one class, whose switch says what becomes of the
    gradients (deepspeed/runtime/zero/stage_1_and_2.py).
    """
    optimizer: Any = cast(Any, trainer.wrapped).optimizer
    if any(hasattr(each, "ds_tensor") for each in trainer.module.parameters()):
        return 3
    switch: bool | None = getattr(optimizer, "partition_gradients", None)
    return 0 if switch is None else 1 + switch


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    node, share = (os.environ.get(name, "0") for name in ("GROUP_RANK", "LOCAL_RANK"))
    return f"{socket.gethostname()} {node} {share}"


def _held(trainer: Trainer) -> int:
    """Elements of the network's parameters in this process's memory."""
    return sum(_elements(each) for each in trainer.module.parameters())


def _elements(parameter: Tensor) -> int:
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    share: Tensor | None = getattr(parameter, "ds_tensor", None)  # of ZeRO's stage 3
    return parameter.numel() + (0 if share is None else share.numel())


def _updated(trainer: Trainer) -> int:
    """Elements that this process's optimiser has in its groups, or keeps a state of.

    ZeRO's stage 3 puts its tensors into the groups for the time of a step alone.
    """
    optimizer = trainer.optimizer
    grouped = [each for group in optimizer.param_groups for each in group["params"]]
    return sum({id(each): each.numel() for each in [*grouped, *optimizer.state]}.values())
