"""Which network is trained."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from cifar.architectures import ARCHITECTURES, Architecture, PooledArchitecture
from cifar.config.checks import option_name, require
from cifar.serialize import STRICT

arg = tyro.conf.arg

MOST_CHANNELS = 65_536
"""Of a first stage, so that a slip is told from a wide network, and of images."""
MOST_CLASSES = 1_000_000
MOST_PIXELS = 65_536
"""Of a side of an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A network to build.

    `--model NAME-wN` is short for `--model NAME --width N`.
    """

    __pydantic_config__: ClassVar = STRICT

    name: Annotated[str, arg(name="model", metavar="NAME")] = "resnet18"
    """Architecture: resnet18, resnet34, resnet50, resnet101, resnet152, resnet20, resnet9, ..."""
    width: int | None = None
    """Channels of the first stage; the architecture's own when not given."""
    dropout: float = 0.0
    """Probability of dropping a feature before the classifier."""
    squeeze_excitation: bool = False
    """Reweight the channels at the end of every block (https://arxiv.org/abs/1709.01507)."""
    num_classes: tyro.conf.Suppress[int] = 10
    in_channels: tyro.conf.Suppress[int] = 3

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(.+)-w(\d+)", self.name)
        if match and match[1] in ARCHITECTURES:
            require(self.width is None, "width", self.width, f"{self.name} already has a width")
            object.__setattr__(self, "name", match[1])
            object.__setattr__(self, "width", int(match[2]))
        known = ", ".join(sorted(ARCHITECTURES, key=lambda name: (len(name), name)))
        require(self.name in ARCHITECTURES, "model", self.name, f"choose one of {known}")
        if self.width == self.architecture.width:
            object.__setattr__(self, "width", None)
        require(
            self.width is None or 0 < self.width <= MOST_CHANNELS,
            "width",
            self.width,
            f"give 1 to {MOST_CHANNELS}",
        )
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "give 0 <= p < 1")
        for name, least, most in (
            ("num_classes", 2, MOST_CLASSES),
            ("in_channels", 1, MOST_CHANNELS),
        ):
            value = getattr(self, name)
            require(least <= value <= most, option_name(name), value, f"give {least} to {most}")

    @property
    def architecture(self) -> Architecture | PooledArchitecture:
        """The row of `ARCHITECTURES`."""
        return ARCHITECTURES[self.name]

    @property
    def label(self) -> str:
        """The name as tables show it: `resnet18`, `resnet18-w16`, `resnet18-w16-se`."""
        return (
            self.name
            + (f"-w{self.width}" if self.width else "")
            + ("-se" if self.squeeze_excitation else "")
            + (f"-d{self.dropout:g}" if self.dropout else "")
        )
