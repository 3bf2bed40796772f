"""Which engine a strategy is trained by; those that are not needed are not imported."""

from typing import TYPE_CHECKING

from torch import nn

from cifar.config import TrainConfig
from cifar.engine import Engine
from cifar.strategy import Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_engine(
    strategy: Strategy, accelerator: "Accelerator", module: nn.Module, config: TrainConfig
) -> Engine:
    """The engine of a strategy, around a network on its device.

    Raises:
        UnsupportedError: a package it needs is missing.
    """
    if strategy == "ddp":
        return Engine(accelerator, module, config)
    if strategy == "fsdp":
        from cifar.fsdp import FullyShardedEngine

        return FullyShardedEngine(accelerator, module, config)
    from cifar.zero import ZeroEngine

    return ZeroEngine(accelerator, module, config, strategy)
