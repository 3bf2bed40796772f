"""What is trained and how: model, recipe, data, precision and run. No torch in here.

A new precision is a row in `PRECISIONS` and its name in `PrecisionName`.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from cifar.architectures import ARCHITECTURES, Architecture, PooledArchitecture
from cifar.data.config import DataConfig, DataOption
from cifar.errors import ConfigError
from cifar.serialize import NOT_IN_DIGEST, STRICT, in_digest_if

arg = tyro.conf.arg


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a ConfigError that names the field, the value and the remedy."""
    if not condition:
        raise ConfigError(f"{name}: {value!r}: {remedy}")


def option_name(field_name: str) -> str:
    """How a field is called on the command line."""
    return OPTION_NAMES.get(field_name, field_name).replace("_", "-")


MOST_CHANNELS = 65_536
"""Of a first stage, so that a slip is told from a wide network, and of images."""
MOST_CLASSES = 1_000_000
MOST_PIXELS = 65_536
"""Of a side of an image."""
MOST_PARTS = 65_536
"""Micro-batches of a step."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of a run: weights are fp32 in all of them.

    `autocast` is the dtype that convolutions and matrix products run in, None for fp32; `tf32` lets
    fp32 ones use TensorFloat-32 units; `loss_scaling` multiplies the loss to keep fp16 gradients
    from vanishing (https://arxiv.org/abs/1710.03740).
    """

    mixed_precision: Literal["no", "fp16", "bf16"]
    autocast: Literal["float16", "bfloat16"] | None = None
    tf32: bool = False
    loss_scaling: bool = False


CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
"""What torch.compile calls its modes."""
PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
"""The keys of `PRECISIONS`, as options and configurations accept them."""

PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(mixed_precision="no"),
    "tf32": Precision(mixed_precision="no", tf32=True),
    "bf16": Precision(mixed_precision="bf16", autocast="bfloat16"),
    "fp16": Precision(mixed_precision="fp16", autocast="float16", loss_scaling=True),
}


_BY_MUON = in_digest_if(lambda recipe: recipe.optimizer == "muon")
_BY_CROP = in_digest_if(lambda recipe: "crop" in recipe.augment)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is trained: budget, batch, optimiser, schedule, regularisation, augmentation."""

    __pydantic_config__: ClassVar = STRICT

    name: Annotated[str, arg(name="recipe", metavar="NAME")] = field(
        default="custom", metadata=NOT_IN_DIGEST
    )
    """Named settings that the other options start from."""
    epochs: int = 10
    """Passes over the training images."""
    global_batch_size: Annotated[int, arg(name="batch-size", aliases=("-b",))] = 128
    """Images per optimiser step, over all devices and accumulation steps."""
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """SGD with momentum, Adam, AdamW, or Muon for the convolutions and SGD for the rest."""
    lr: float = 0.1
    """Highest learning rate (muon: of all but the convolutions)."""
    momentum: float = 0.9
    """SGD's momentum; Adam's and AdamW's first beta."""
    nesterov: bool = True
    """Nesterov momentum (SGD, Muon)."""
    weight_decay: float = 5e-4
    """L2 penalty (SGD, Adam; muon: of all but the convolutions) or decoupled decay (AdamW)."""
    muon_step: float = field(default=0.03, metadata=_BY_MUON)
    """Highest step of a convolution, relative to the length of its weight; follows the schedule."""
    muon_momentum: float = field(default=0.6, metadata=_BY_MUON)
    """Momentum of the convolutions."""
    decay_norm_and_bias: bool = True
    """Apply the weight decay to BatchNorm parameters and biases as well."""
    schedule: Literal["cosine", "linear", "step", "one-cycle", "triangle", "constant"] = "cosine"
    """Learning rate after the warm-up; step divides it by 10 after one half and three quarters,
    one-cycle rises for 30 % of the steps and falls as a cosine, triangle rises for 10 % and falls
    in a line."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0; one-cycle and triangle have their own."""
    label_smoothing: float = 0.0
    """Probability mass spread over all classes."""
    ema_decay: float = 0.0
    """Evaluate and save an exponential moving average of the weights; 0: off."""
    clip_norm: float = 0.0
    """Shorten a gradient that is longer than this to it; 0: off."""
    sam_rho: float = 0.0
    """Length of the way up the slope whose end SAM takes the gradient of; 0: off."""
    mixup: float = 0.0
    """Mix every image with another one, in a proportion from Beta(mixup, mixup); 0: off."""
    cutmix: float = 0.0
    """Paste a part of another image into every one, whose share is from Beta(cutmix, cutmix);
    0: off; with mixup every image gets one of both."""
    augment: tuple[str, ...] = ("crop", "flip")
    """Augmentations, in order; `--augment` alone: none."""
    crop_padding: int = field(default=4, metadata=_BY_CROP)
    """Pixels around an image before `crop` cuts its size out at a random place."""
    crop_fill: Literal["black", "reflect"] = field(default="black", metadata=_BY_CROP)
    """What these pixels are: black, or the image mirrored at its edges."""

    def __post_init__(self) -> None:
        require(1 <= self.epochs <= MOST_EPOCHS, "epochs", self.epochs, f"give 1 to {MOST_EPOCHS}")
        size = self.global_batch_size
        require(size >= 1, option_name("global_batch_size"), size, "give 1 or more")
        require(0 < self.lr < math.inf, "lr", self.lr, "give a positive number")
        for name in (
            *("weight_decay", "warmup_epochs"),
            *("clip_norm", "sam_rho", "mixup", "cutmix"),
        ):
            value = getattr(self, name)
            require(0 <= value < math.inf, option_name(name), value, "give 0 or more")
        require(
            self.warmup_epochs == 0 or self.schedule not in ("one-cycle", "triangle"),
            "warmup-epochs",
            self.warmup_epochs,
            f"{self.schedule} has its own warm-up, use another --schedule",
        )
        require(
            self.warmup_epochs <= self.epochs,
            "warmup-epochs",
            self.warmup_epochs,
            "give at most the epochs",
        )
        require(0 < self.muon_step < 1, "muon-step", self.muon_step, "give 0 < value < 1")
        for name in ("momentum", "muon_momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, option_name(name), value, "give 0 <= value < 1")
        require(
            not self.nesterov or self.momentum > 0 or self.optimizer != "sgd",
            "momentum",
            self.momentum,
            "Nesterov needs a positive one (or --no-nesterov)",
        )
        self._check_augmentations()

    def _check_augmentations(self) -> None:
        require(
            1 <= self.crop_padding <= MOST_PADDING,
            "crop-padding",
            self.crop_padding,
            f"give 1 to {MOST_PADDING}",
        )
        unknown = [name for name in self.augment if name not in AUGMENTATIONS]
        require(
            not unknown,
            "augment",
            unknown[0] if unknown else None,
            f"choose from {', '.join(AUGMENTATIONS)}",
        )
        require(
            len(set(self.augment)) == len(self.augment),
            "augment",
            " ".join(self.augment),
            "name each augmentation once",
        )
        require(
            not {"flip", "alternating-flip"} <= set(self.augment),
            "augment",
            " ".join(self.augment),
            "flip and alternating-flip together mirror at random again; choose one",
        )
        require(
            "crop" not in self.augment[1:],
            "augment",
            " ".join(self.augment),
            "name crop first: it reads its windows straight from the split",
        )


MOST_EPOCHS = 1_000_000
"""So that a slip is told from a long run."""
MOST_PADDING = 64
"""Pixels: more would show little but the padding."""
OPTION_NAMES = {
    "global_batch_size": "batch-size",
    "accumulation_steps": "accumulation",
    "model.name": "model",
}
"""Command-line names of fields where they differ."""
AUGMENTATIONS = (
    *("crop", "flip", "alternating-flip", "cutout"),
    *("rotate", "color-jitter", "auto-augment", "rand-augment", "trivial-augment"),
)
"""Names of the functions in `cifar.data.augment` and of the policies in `cifar.data.policies`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that determines the weights a run ends with, but for the machine it runs on."""

    __pydantic_config__: ClassVar = STRICT

    model: ModelConfig = ModelConfig()
    recipe: Recipe = Recipe()
    data: DataOption = field(default=DataConfig())
    """Images: shapes (embedded), cifar10[:DIR], cifar100[:DIR], folder:DIR or npz:FILE."""
    precision: PrecisionName | None = None
    """Number format; when not given, what Accelerate was launched with (fp32 unless told)."""
    channels_last: bool = False
    """Keep images and convolution weights in NHWC order."""
    compile: bool = False
    """Run the model through torch.compile."""
    compile_mode: CompileMode = "default"
    """torch.compile's mode."""
    accumulation_steps: Annotated[int, arg(name="accumulation")] = 1
    """Micro-batches per optimiser step."""
    seed: int = 0
    """Of the initial weights, the order of the images, their augmentation and dropout."""

    def __post_init__(self) -> None:
        require(
            1 <= self.accumulation_steps <= MOST_PARTS,
            "accumulation",
            self.accumulation_steps,
            f"give 1 to {MOST_PARTS}",
        )
        require(0 <= self.seed < 2**31, "seed", self.seed, "give 0 <= seed < 2**31")
        require(
            self.compile or self.compile_mode == "default",
            "compile-mode",
            self.compile_mode,
            "needs --compile",
        )
        require(  # CUDA graphs would overwrite the gradients of the micro-batch before
            self.compile_mode == "default" or self.accumulation_steps == 1,
            "compile-mode",
            self.compile_mode,
            "not with --accumulation, use default",
        )

    def per_device_batch_size(self, num_processes: int) -> int:
        """Images per device and micro-batch: global / (processes x accumulation).

        Raises:
            ConfigError: the global batch does not divide; names the nearest sizes that do.
        """
        size, parts = self.recipe.global_batch_size, num_processes * self.accumulation_steps
        if size % parts:
            below, above = size // parts * parts, (size // parts + 1) * parts
            nearest = f"{below} or {above}" if below else str(above)
            raise ConfigError(
                f"batch-size: {size}: does not divide over {num_processes} processes x "
                f"{self.accumulation_steps} accumulation steps; nearest that does: {nearest}"
            )
        return size // parts


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where and how safely a run runs; nothing here changes the weights it ends with."""

    __pydantic_config__: ClassVar = STRICT

    output_dir: str | None = None
    """Folder of the run, new or empty; runs/train/<model>-<data>-<time> when not given."""
    num_processes: int | None = None
    """Processes that must have been started (accelerate launch or torchrun starts them)."""
    cpu: bool = False
    """Run on the CPU although there is a GPU."""
    save_every: int | None = None
    """Optimiser steps between checkpoints; one at the end of every epoch when not given."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, newest first; what a signal saves is one more."""
    check_every: int | None = None
    """Steps between readings of the device's counters (finite loss, skipped steps, signals);
    20 on a GPU, 10 in one process on a CPU and 1 in several when not given."""
    max_skipped_steps: int = 20
    """fp16: stop after this many skipped steps in a row."""

    def __post_init__(self) -> None:
        for name in (
            "num_processes",
            "save_every",
            "keep_checkpoints",
            "check_every",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, option_name(name), value, "give 1 or more")
