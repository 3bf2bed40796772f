"""The residual networks by name. A new depth is a row in `ARCHITECTURES`. No torch in here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The shape of a residual network: blocks per stage, kind of block and of shortcut.

    `projection` shortcuts are a strided 1x1 convolution where the shape changes (option B of He et
    al. 2015, https://arxiv.org/abs/1512.03385); `padding` ones subsample and pad with zero channels
    (option A), without parameters.
    """

    stages: tuple[int, ...]
    block: Literal["basic", "bottleneck"]
    width: int
    shortcut: Literal["projection", "padding"] = "projection"


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledArchitecture:
    """The shape of Page's network: a stage is a convolution and a max-pool of two pixels.

    Where `residual` says so it ends in two more convolutions beside an identity. `width` channels
    come before the first stage, and every stage doubles them (Page 2018, "How to train your
    ResNet", https://github.com/davidcpage/cifar10-fast).
    """

    residual: tuple[bool, ...]
    width: int


def _he(depth: int) -> Architecture:
    """He et al.'s CIFAR network of 6n + 2 layers: three stages of n basic blocks, 16-32-64."""
    return Architecture(stages=((depth - 2) // 6,) * 3, block="basic", width=16, shortcut="padding")


ARCHITECTURES: dict[str, Architecture | PooledArchitecture] = {
    "resnet9": PooledArchitecture(residual=(True, False, True), width=64),
    "resnet18": Architecture(stages=(2, 2, 2, 2), block="basic", width=64),
    "resnet26": Architecture(stages=(2, 2, 2, 2), block="bottleneck", width=64),
    "resnet34": Architecture(stages=(3, 4, 6, 3), block="basic", width=64),
    "resnet50": Architecture(stages=(3, 4, 6, 3), block="bottleneck", width=64),
    "resnet101": Architecture(stages=(3, 4, 23, 3), block="bottleneck", width=64),
    "resnet152": Architecture(stages=(3, 8, 36, 3), block="bottleneck", width=64),
    "resnet200": Architecture(stages=(3, 24, 36, 3), block="bottleneck", width=64),
    **{f"resnet{depth}": _he(depth) for depth in (20, 32, 44, 56, 110, 1202)},
}
"""ImageNet's ResNets with a CIFAR stem (3x3, stride 1, no max-pool), He et al.'s CIFAR ones, and
Page's."""
