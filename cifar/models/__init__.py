"""The networks: `build_model` turns a `ModelConfig` into an `nn.Module`."""

import functools
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.architectures import PooledArchitecture
from cifar.config import ModelConfig
from cifar.models.libraries import build_of_library
from cifar.models.resnet import ResNet
from cifar.models.resnet9 import ResNet9

__all__ = ["ResNet", "ResNet9", "build_model"]


def build_model(config: ModelConfig) -> nn.Module:
    """Build the network of a configuration, with fresh weights from torch's global generator.

    It maps images [N, in_channels, H, W] to logits [N, num_classes]: of any size, or of those that
    a library's network takes. Resizing is part of it, but of no name in its state.

    Raises:
        ConfigError: the library has no such network.
        UnsupportedError: the library is not installed.
    """
    module = build_of_library(config) if config.library else _build(config)
    if config.resize is not None:
        module.register_forward_pre_hook(functools.partial(_resize, config.resize))
    return module


def _build(config: ModelConfig) -> nn.Module:
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


def _resize(side: int, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Ahead of a network: [N, C, H, W] to [N, C, side, side] in the same dtype and memory format.

    Bilinear, and where the images are larger each pixel is a mean of all that it covers.
    """
    (images,) = inputs
    return (F.interpolate(images, size=(side, side), mode="bilinear", antialias=True),)
