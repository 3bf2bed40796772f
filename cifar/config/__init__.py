"""What is trained and how: model, recipe, data, precision and run. No torch in here."""

from cifar.config.checks import OPTION_NAMES, option_name, require
from cifar.config.distillation import Distillation, Teacher, check_same_teacher, check_teacher
from cifar.config.model import LIBRARIES, MOST_CHANNELS, MOST_CLASSES, MOST_PIXELS, ModelConfig
from cifar.config.parallel import Parallel
from cifar.config.precision import PRECISIONS, Precision, PrecisionName
from cifar.config.pretrained import IMAGENET, Pretrained, parse_pretrained
from cifar.config.recipe import AUGMENTATIONS, READ_BY, TYPICAL_LR, Recipe
from cifar.config.train import CompileMode, RunConfig, TrainConfig

__all__ = [
    "AUGMENTATIONS",
    "IMAGENET",
    "LIBRARIES",
    "MOST_CHANNELS",
    "MOST_CLASSES",
    "MOST_PIXELS",
    "OPTION_NAMES",
    "PRECISIONS",
    "READ_BY",
    "TYPICAL_LR",
    "CompileMode",
    "Distillation",
    "ModelConfig",
    "Parallel",
    "Precision",
    "PrecisionName",
    "Pretrained",
    "Recipe",
    "RunConfig",
    "Teacher",
    "TrainConfig",
    "check_same_teacher",
    "check_teacher",
    "option_name",
    "parse_pretrained",
    "require",
]
