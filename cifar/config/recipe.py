"""How a model is trained, whatever it is and on which images."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from cifar.config.checks import option_name, require
from cifar.serialize import NOT_IN_DIGEST, STRICT, in_digest_if

arg = tyro.conf.arg

MOST_EPOCHS = 1_000_000
"""So that a slip is told from a long run."""
MOST_PADDING = 64
"""Pixels: more would show little but the padding."""
MOST_CUTOUT = 65_536
"""Pixels, so that a slip is told from a large image."""
CYCLED_MOMENTUM = 0.1
"""What one-cycle takes off the momentum at its highest learning rate."""
LEAST_ALPHA, MOST_ALPHA = 0.01, 1e6
"""Of a Beta distribution: below it is all own or all partner, above it all one half."""
TYPICAL_LR = {"sgd": 0.1, "adam": 0.001, "adamw": 0.001, "muon": 0.15}
"""Learning rates that train ResNets with BatchNorm, to begin with."""
MOST_OPERATIONS = 14
"""Of RandAugment: as many as it chooses from."""
AUGMENTATIONS = (
    *("crop", "flip", "alternating-flip", "cutout"),
    *("rotate", "color-jitter", "auto-augment", "rand-augment", "trivial-augment"),
)
"""Names of the functions in `cifar.data.augment` and of the policies in `cifar.data.policies`."""

_LR_HELP = (
    "Highest learning rate (muon: of all but the convolutions); auto: what a range test suggests, "
    "see lr-find."
)
"""Of `cifar train`, which knows that word."""
_BY_MUON = in_digest_if(lambda recipe: recipe.optimizer == "muon")


def _by(augmentation: str) -> dict[str, Any]:
    """Metadata of a field that this augmentation alone reads."""
    return in_digest_if(lambda recipe: augmentation in recipe.augment)


READ_BY = {
    "crop_padding": "crop",
    "crop_fill": "crop",
    "cutout_size": "cutout",
    "rotate_degrees": "rotate",
    "jitter": "color-jitter",
    "hue": "color-jitter",
    "rand_operations": "rand-augment",
    "rand_magnitude": "rand-augment",
}
"""The augmentation that each of these fields is for."""


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
    lr: Annotated[float, arg(metavar="FLOAT|auto", help=_LR_HELP)] = 0.1
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
    head_lr: float = 1.0
    """Multiple of the learning rate for the classifier, whose weight decay is divided by it and
    whose first weights are multiplied by its root: as if its answers were."""
    norm_bias_lr: float = 1.0
    """Multiple of the learning rate for BatchNorm's biases, whose weight decay is divided by it."""
    train_norm_scale: bool = True
    """Train BatchNorm's weights, which otherwise stay as they are."""
    schedule: Literal["cosine", "linear", "step", "one-cycle", "triangle", "constant"] = "cosine"
    """Learning rate after the warm-up; step divides it by 10 after one half and three quarters,
    one-cycle is PyTorch's OneCycleLR, with its momentum, triangle rises for 10 % and falls
    in a line."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0; one-cycle and triangle have their own."""
    frozen_epochs: int = 0
    """Epochs at the beginning in which the classifier alone is trained, on what the layers before
    it make of the images."""
    backbone_lr: float = 1.0
    """Share of the learning rate for the layers before the classifier."""
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
    crop_padding: int = field(default=4, metadata=_by("crop"))
    """Pixels around an image before `crop` cuts its size out at a random place."""
    crop_fill: Literal["black", "reflect"] = field(default="black", metadata=_by("crop"))
    """What these pixels are: black, or the image mirrored at its edges."""
    cutout_size: int = field(default=16, metadata=_by("cutout"))
    """Pixels of a side of the square that `cutout` paints over."""
    rotate_degrees: float = field(default=15.0, metadata=_by("rotate"))
    """Greatest angle of `rotate`, either way."""
    jitter: float = field(default=0.2, metadata=_by("color-jitter"))
    """Greatest change of brightness, contrast and saturation by `color-jitter`, as a fraction."""
    hue: float = field(default=0.0, metadata=_by("color-jitter"))
    """Greatest turn of the hue by `color-jitter`, either way, as a fraction of the circle of
    colours; 0: off."""
    rand_operations: int = field(default=2, metadata=_by("rand-augment"))
    """Operations that `rand-augment` does to an image."""
    rand_magnitude: int = field(default=9, metadata=_by("rand-augment"))
    """Their strength, 0 to 30."""
    validation: float = 0.0
    """Share of the training images that is held out to choose by; the test images never are."""
    patience: int = 0
    """Stop after so many epochs without a better top-1 on the validation images, and keep the
    weights of the best one; 0: off."""

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
        frozen = self.frozen_epochs
        remedy = "give 0 to the number of epochs"
        require(0 <= frozen <= self.epochs, option_name("frozen_epochs"), frozen, remedy)
        share = self.backbone_lr
        require(0 < share <= 1, option_name("backbone_lr"), share, "give 0 < share <= 1")
        for name in ("head_lr", "norm_bias_lr"):
            value = getattr(self, name)
            require(0 < value < math.inf, option_name(name), value, "give a positive number")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            mixes = value == 0 or LEAST_ALPHA <= value <= MOST_ALPHA
            require(mixes, name, value, f"give 0, or {LEAST_ALPHA:g} to {MOST_ALPHA:g}")
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
        require(
            self.schedule != "one-cycle" or self.momentum > CYCLED_MOMENTUM,
            "momentum",
            self.momentum,
            f"one-cycle lowers it by {CYCLED_MOMENTUM}; give more than that",
        )
        self._check_validation()
        self._check_augmentations()

    @property
    def passes(self) -> int:
        """How often a step goes forward and backward."""
        return 2 if self.sam_rho else 1

    def _check_validation(self) -> None:
        require(0 <= self.validation < 1, "validation", self.validation, "give 0 <= share < 1")
        require(
            0 <= self.patience <= MOST_EPOCHS,
            "patience",
            self.patience,
            f"give 0 to {MOST_EPOCHS}",
        )
        require(
            not self.patience or self.validation > 0,
            "patience",
            self.patience,
            "needs images to choose by; hold some out, such as --validation 0.1",
        )

    def _check_augmentations(self) -> None:
        for name, least, most in (
            ("crop_padding", 1, MOST_PADDING),
            ("cutout_size", 1, MOST_CUTOUT),
            ("rotate_degrees", 0, 180),
            ("jitter", 0, 1),
            ("hue", 0, 0.5),
            ("rand_operations", 1, MOST_OPERATIONS),
            ("rand_magnitude", 0, 30),
        ):
            value = getattr(self, name)
            require(least <= value <= most, option_name(name), value, f"give {least} to {most}")
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
