"""Residual networks for small images: ImageNet's family with a CIFAR stem, and He et al.'s own.

Both follow He et al. 2015 (https://arxiv.org/abs/1512.03385); modules are named as in torchvision.
Bottlenecks stride in their 3x3 convolution, as torchvision's do (ResNet v1.5).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from cifar.architectures import Architecture


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias: [N, inputs, H, W] to [N, outputs, ceil(H / stride), ...]."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias: [N, inputs, H, W] to [N, outputs, ceil(H / stride), ...]."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class PaddingShortcut(nn.Module):
    """He et al.'s option A, without parameters: subsample the pixels, append channels of zeros.

    [N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)]; the memory format stays.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (0, 0, 0, 0, 0, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shortcut."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the means of all channels.

    Hu et al. 2017, "Squeeze-and-Excitation Networks" (https://arxiv.org/abs/1709.01507), with their
    reduction of 16, but never fewer than 4 hidden units: He's first stage would be left with one.
    """

    reduction: ClassVar[int] = 16
    min_hidden: ClassVar[int] = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // self.reduction, self.min_hidden)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate [N, channels, H, W]; the shape and the memory format stay."""
        gate = torch.relu_(self.fc1(x.mean((2, 3))))
        gate = torch.sigmoid(self.fc2(gate))
        return x * gate[:, :, None, None]


def _shortcut(kind: str, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """The path beside a block's branch; None for the identity."""
    if stride == 1 and inputs == outputs:
        return None
    if kind == "padding":
        return PaddingShortcut(inputs, outputs, stride)
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    [N, inputs, H, W] to [N, width, ceil(H / stride), ceil(W / stride)].
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: str, squeeze_excitation: bool
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcitation(width) if squeeze_excitation else None
        self.downsample = _shortcut(shortcut, inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = torch.relu_(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.se is not None:
            out = self.se(out)
        out += x if self.downsample is None else self.downsample(x)
        return torch.relu_(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    [N, inputs, H, W] to [N, 4 * width, ceil(H / stride), ceil(W / stride)].
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: str, squeeze_excitation: bool
    ) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.se = SqueezeExcitation(outputs) if squeeze_excitation else None
        self.downsample = _shortcut(shortcut, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = torch.relu_(self.bn1(self.conv1(x)))
        out = torch.relu_(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.se is not None:
            out = self.se(out)
        out += x if self.downsample is None else self.downsample(x)
        return torch.relu_(out)


BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """Stem, stages `layer1` ... `layerN`, global average pooling and a linear classifier.

    The first stage keeps the image's size, every later one halves it and doubles the channels.
    Images are [N, in_channels, H, W] of any size, logits [N, num_classes].

    Convolutions start from He et al.'s normal distribution over fan-out
    (https://arxiv.org/abs/1502.01852), BatchNorm from 1 and 0, linear layers from torch's default.

    Args:
        architecture: blocks per stage, kind of block and of shortcut, default width.
        num_classes: logits per image.
        in_channels: channels of the images.
        width: channels of the first stage (of its 3x3 convolutions, for bottlenecks); the
            architecture's own when None.
        dropout: probability of dropping a feature before the classifier.
        squeeze_excitation: end the residual branch of every block in a `SqueezeExcitation`.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int | None = None,
        dropout: float = 0.0,
        squeeze_excitation: bool = False,
    ) -> None:
        super().__init__()
        width = width or architecture.width
        block = BLOCKS[architecture.block]
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.stages: list[str] = []
        for index, count in enumerate(architecture.stages):
            stage = nn.Sequential()
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                planes = width * 2**index
                stage.append(
                    block(channels, planes, stride, architecture.shortcut, squeeze_excitation)
                )
                channels = planes * block.expansion
            self.stages.append(f"layer{index + 1}")
            self.add_module(self.stages[-1], stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = torch.relu_(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = self.avgpool(x).flatten(1)
        if self.dropout is not None:
            x = self.dropout(x)
        logits: Tensor = self.fc(x)
        return logits
