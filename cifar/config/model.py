"""Which network is trained."""

import importlib.util
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from cifar.architectures import ARCHITECTURES, Architecture, PooledArchitecture
from cifar.config.checks import option_name, require
from cifar.config.pretrained import IMAGENET, PretrainedOption
from cifar.errors import UnsupportedError
from cifar.serialize import STRICT

arg = tyro.conf.arg

MOST_CHANNELS = 65_536
"""Of a first stage, so that a slip is told from a wide network, and of images."""
MOST_CLASSES = 1_000_000
MOST_PIXELS = 65_536
"""Of a side of an image."""
LIBRARIES = {"torchvision": r"[a-z0-9_]+", "timm": r"[a-z0-9_]+(\.[a-z0-9_]+)?"}
"""Whose classifiers can be named as `LIBRARY:NAME`, and the form of their names."""
_SUFFIXED = re.compile(r"(.+?)(?:-w(\d+))?(?:-r(\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A network to build: one of this program's, or `torchvision:NAME` or `timm:NAME`.

    `--model NAME-wN` is short for `--model NAME --width N`, `NAME-rN` for `NAME --resize N`.
    """

    __pydantic_config__: ClassVar = STRICT

    name: Annotated[str, arg(name="model", metavar="NAME")] = "resnet18"
    """Architecture: resnet18, resnet34, resnet50, resnet101, resnet152, resnet20, resnet9, ..., or
    a classifier of a library: torchvision:resnet50, timm:resnet18.a1_in1k, ..."""
    width: int | None = None
    """Channels of the first stage; the architecture's own when not given."""
    dropout: float = 0.0
    """Probability of dropping a feature before the classifier; 0: none, or a library's own."""
    squeeze_excitation: bool = False
    """Reweight the channels at the end of every block (https://arxiv.org/abs/1709.01507)."""
    resize: int | None = None
    """Pixels each way that images are resized to ahead of the first layer, bilinearly."""
    pretrained: PretrainedOption = None
    """Weights to start from: imagenet (a library's default), a name such as IMAGENET1K_V2, a file
    (.safetensors, .pt, .pth; FILE@SHA256 checks it) or a run; random ones when not given."""
    num_classes: tyro.conf.Suppress[int] = 10
    in_channels: tyro.conf.Suppress[int] = 3

    def __post_init__(self) -> None:
        self._take_suffixes()
        if self.library:
            self._check_library()
        else:
            known = ", ".join(sorted(ARCHITECTURES, key=lambda name: (len(name), name)))
            remedy = f"choose one of {known}, torchvision:NAME or timm:NAME"
            require(self.name in ARCHITECTURES, "model", self.name, remedy)
            if self.width == self.architecture.width:
                object.__setattr__(self, "width", None)
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "give 0 <= p < 1")
        for name, least, most in (
            ("width", 1, MOST_CHANNELS),
            ("resize", 1, MOST_PIXELS),
            ("num_classes", 2, MOST_CLASSES),
            ("in_channels", 1, MOST_CHANNELS),
        ):
            value = getattr(self, name)
            good = value is None or least <= value <= most
            require(good, option_name(name), value, f"give {least} to {most}")
        self._check_pretrained()

    def _take_suffixes(self) -> None:
        match = _SUFFIXED.fullmatch(self.name)
        if match is None or not (match[1] in ARCHITECTURES or ":" in match[1]):
            return
        for field, number in (("width", match[2]), ("resize", match[3])):
            if number is not None:
                given = getattr(self, field)
                require(given is None, field, given, f"{self.name} already has a {field}")
                object.__setattr__(self, field, int(number))
        object.__setattr__(self, "name", match[1])

    def _check_library(self) -> None:
        form = LIBRARIES.get(self.library)
        remedy = "write torchvision:NAME or timm:NAME, such as torchvision:resnet50"
        known = form is not None and re.fullmatch(form, self.library_name) is not None
        require(known, "model", self.name, remedy)
        ours = f"is for this program's own architectures, not for {self.name}; leave it out"
        require(self.width is None, "width", self.width, ours)
        gated = self.squeeze_excitation
        require(not gated, option_name("squeeze_excitation"), gated, ours)
        require(
            self.library != "torchvision" or self.in_channels == 3,
            "model",
            self.name,
            f"takes images of 3 channels, not {self.in_channels}; take one of timm or of this "
            "program's own",
        )

    def _check_pretrained(self) -> None:
        name = None if self.pretrained is None else self.pretrained.name
        if name is None:
            return
        remedy = f"is no file, and {self.name} has no weights by name; give a file or a run"
        require(bool(self.library), "pretrained", name, remedy)
        require(
            self.library != "timm" or name == IMAGENET,
            "pretrained",
            name,
            f"timm names weights with the model, as in timm:resnet18.a1_in1k; give {IMAGENET}",
        )

    @property
    def library(self) -> str:
        """Whose network it is, as its name begins; "" for one of this program's own."""
        return self.name.partition(":")[0] if ":" in self.name else ""

    @property
    def library_name(self) -> str:
        """What the library calls it."""
        return self.name.partition(":")[2]

    def check_installed(self) -> None:
        """Raise an UnsupportedError if the network's library is not there; nothing is imported."""
        if self.library and importlib.util.find_spec(self.library) is None:
            extra = " (pip install 'cifar-resnet-bench[timm]')" if self.library == "timm" else ""
            raise UnsupportedError(
                f"model: {self.name!r}: {self.library} is not installed; install it{extra}"
            )

    @property
    def is_random(self) -> bool:
        """Whether training may draw random numbers in a forward pass; libraries' networks do so."""
        return bool(self.dropout or self.library)

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of what the first layer gets of images of this size."""
        return image_size if self.resize is None else (self.resize, self.resize)

    @property
    def architecture(self) -> Architecture | PooledArchitecture:
        """The row of `ARCHITECTURES`, of one of this program's own networks."""
        return ARCHITECTURES[self.name]

    @property
    def label(self) -> str:
        """The name as tables show it: `resnet18`, `resnet18-w16-se`, `timm:resnet18-r224`."""
        return (
            self.name
            + (f"-w{self.width}" if self.width else "")
            + (f"-r{self.resize}" if self.resize else "")
            + ("-se" if self.squeeze_excitation else "")
            + (f"-d{self.dropout:g}" if self.dropout else "")
            + ("-pretrained" if self.pretrained else "")
        )
