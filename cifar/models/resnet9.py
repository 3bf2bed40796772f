"""Page's ResNet-9 for small images: few wide layers, max-pooling, and a residual where it pays.

After Page 2018, "How to train your ResNet" (https://github.com/davidcpage/cifar10-fast), in the
form with biases outside of the residual branches that many one-cycle tutorials train.
"""

import torch
from torch import Tensor, nn

from cifar.architectures import PooledArchitecture
from cifar.models.resnet import SqueezeExcitation, conv3x3


class PooledStage(nn.Module):
    """A convolution and a max-pool of two pixels, then perhaps a `ResidualBranch` beside them.

    [N, inputs, H, W] to [N, outputs, ceil(H / 2), ceil(W / 2)].
    """

    def __init__(
        self, inputs: int, outputs: int, *, residual: bool, squeeze_excitation: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn = nn.BatchNorm2d(outputs)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # so that an image of any size is left with one
        self.branch = ResidualBranch(outputs, squeeze_excitation) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the stage."""
        x = self.pool(torch.relu_(self.bn(self.conv(x))))
        return x if self.branch is None else x + self.branch(x)


class ResidualBranch(nn.Module):
    """Two 3x3 convolutions without bias, each with BatchNorm and ReLU: [N, channels, H, W]."""

    def __init__(self, channels: int, squeeze_excitation: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels) if squeeze_excitation else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the branch."""
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)))
        return x if self.se is None else self.se(x)


class ResNet9(nn.Module):
    """A convolution, stages `layer1` ... `layerN`, global max-pooling and a linear classifier.

    Images are [N, in_channels, H, W] of any size, logits [N, num_classes]. Weights start from He
    et al.'s normal distribution over fan-out and biases of convolutions from 0, see
    `cifar.models.resnet.ResNet`, whose arguments these are.
    """

    def __init__(
        self,
        architecture: PooledArchitecture,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int | None = None,
        dropout: float = 0.0,
        squeeze_excitation: bool = False,
    ) -> None:
        super().__init__()
        channels = width or architecture.width
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages: list[str] = []
        for index, residual in enumerate(architecture.residual):
            self.stages.append(f"layer{index + 1}")
            stage = PooledStage(
                channels, 2 * channels, residual=residual, squeeze_excitation=squeeze_excitation
            )
            self.add_module(self.stages[-1], stage)
            channels *= 2
        self.maxpool = nn.AdaptiveMaxPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = torch.relu_(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = self.maxpool(x).flatten(1)
        if self.dropout is not None:
            x = self.dropout(x)
        logits: Tensor = self.fc(x)
        return logits
