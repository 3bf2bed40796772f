"""The networks: `build_model` turns a `ModelConfig` into an `nn.Module`."""

from typing import Any

from torch import nn

from cifar.architectures import PooledArchitecture
from cifar.config import ModelConfig
from cifar.models.resnet import ResNet
from cifar.models.resnet9 import ResNet9

__all__ = ["ResNet", "ResNet9", "build_model"]


def build_model(config: ModelConfig) -> nn.Module:
    """Build the network of a configuration, with fresh weights from torch's global generator.

    It maps images [N, in_channels, H, W] of any size to logits [N, num_classes].
    """
    options: dict[str, Any] = {
        "num_classes": config.num_classes,
        "in_channels": config.in_channels,
        "width": config.width,
        "dropout": config.dropout,
        "squeeze_excitation": config.squeeze_excitation,
    }
    architecture = config.architecture
    if isinstance(architecture, PooledArchitecture):
        return ResNet9(architecture, **options)
    return ResNet(architecture, **options)
