"""The networks: `build_model` turns a `ModelConfig` into an `nn.Module`."""

from torch import nn

from cifar.config import ModelConfig
from cifar.models.resnet import ResNet

__all__ = ["ResNet", "build_model"]


def build_model(config: ModelConfig) -> nn.Module:
    """Build the network of a configuration, with fresh weights from torch's global generator.

    It maps images [N, in_channels, H, W] of any size to logits [N, num_classes].
    """
    return ResNet(
        config.architecture,
        num_classes=config.num_classes,
        in_channels=config.in_channels,
        width=config.width,
        dropout=config.dropout,
        squeeze_excitation=config.squeeze_excitation,
    )
