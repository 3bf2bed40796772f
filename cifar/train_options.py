"""The options of `cifar train`, which start from a recipe or from the run to resume."""

import dataclasses
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cifar import restart, run_folder
from cifar.cli import parse
from cifar.config import (
    IMAGENET,
    LIBRARIES,
    READ_BY,
    TYPICAL_LR,
    ModelConfig,
    Pretrained,
    Recipe,
    RunConfig,
    TrainConfig,
    option_name,
    require,
)
from cifar.files import user_path
from cifar.ranks import is_first
from cifar.recipes import from_scratch, get_config

arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of `cifar train`."""

    train: Annotated[TrainConfig, arg(name="")]
    run: RunConfig
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """Continue the run in this folder from its newest checkpoint; auto: the one in --output-dir, or
    start it there if it has no checkpoint yet."""
    finds_lr: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
    """Whether a range test chooses the learning rate: `--lr auto`."""

    @property
    def is_auto(self) -> bool:
        """Whether the run's folder decides if there is one to resume."""
        return self.resume == restart.AUTO

    @property
    def folder(self) -> Path | None:
        """The folder of the run to resume, if it is known to be one."""
        if self.resume is None or self.is_auto:
            return None
        return user_path(self.resume, "resume")


def for_another(name: str, named: ModelConfig) -> ModelConfig:
    """What of a recipe's own model is also for another one, of this name.

    Of one library for that of another: to fine-tune its default weights on images of that size.
    """
    library = name.partition(":")[0] if ":" in name else ""
    if not (named.library and library in LIBRARIES):
        return ModelConfig(dropout=named.dropout)
    return ModelConfig(
        name=f"{library}:resnet18",  # until the name itself is read
        dropout=named.dropout,
        resize=None if re.search(r"-r\d+$", name) else named.resize,
        pretrained=named.pretrained and Pretrained(name=IMAGENET),
    )


AUTO = "auto"
"""The value of `--lr` that stands for the one a range test finds."""


def read_train_options(argv: list[str]) -> TrainOptions:
    """The options, starting from the run to resume or else from the recipe that is named."""
    resume, finds_lr = _value_of("--resume", argv), _value_of("--lr", argv) == AUTO
    starts = resume is None or resume == restart.AUTO
    note = ""
    if not starts:
        assert resume is not None
        stored = run_folder.read_config(user_path(resume, "resume"))
        start = TrainOptions(train=stored.train, run=stored.run)
        remedy = (
            f"the run to resume has {stored.train.recipe.lr!r}; leave it out, or start a new run"
        )
        require(not finds_lr, "lr", AUTO, remedy)
    else:
        start = TrainOptions(train=named_config(argv), run=RunConfig())
    options = parse(
        TrainOptions,
        without("--lr", argv) if finds_lr else argv,
        prog="cifar train",
        description="Train a model; the run's folder receives configuration, metrics, checkpoints "
        "and final weights.",
        example="cifar train --model resnet18 --data cifar10 --precision bf16 --channels-last",
        default=start,
    )
    if starts:
        check_changes(start.train.recipe, options.train.recipe, argv)
        _check_lr(start.train.recipe, options.train.recipe, argv)
        note = from_scratch(options.train)
    require(
        not options.is_auto or options.run.output_dir is not None,
        "resume",
        restart.AUTO,
        "needs the folder that the run is to be in; give it by --output-dir",
    )
    check_skips(options.train.precision, argv)
    options.train.model.check_installed()
    if finds_lr:
        train = with_typical_lr(options.train, start.train.recipe)
        options = dataclasses.replace(options, train=train, finds_lr=True)
    if note and is_first(os.environ):  # after the last check: an error is one line on stderr
        print(f"note: {note}", file=sys.stderr, flush=True)
    return options


def named_config(argv: list[str]) -> TrainConfig:
    """The configuration of the recipe that is named, from which the other options start."""
    name = _value_of("--recipe", argv)
    train = get_config("default" if name is None else name)
    if (model := _value_of("--model", argv)) is not None:
        train = dataclasses.replace(train, model=for_another(model, train.model))
    return train


def with_typical_lr(train: TrainConfig, named: Recipe) -> TrainConfig:
    """What a range test starts from: the named recipe's learning rate is for its own optimiser.

    The test replaces it, but keeps Muon's step in proportion to it.
    """
    recipe = train.recipe
    if recipe.optimizer == named.optimizer:
        return train
    recipe = dataclasses.replace(recipe, lr=TYPICAL_LR[recipe.optimizer])
    return dataclasses.replace(train, recipe=recipe)


def check_changes(named: Recipe, recipe: Recipe, argv: list[str]) -> None:
    """Raise a ConfigError if a change to the named recipe is of no use without another one."""
    for field, augmentation in READ_BY.items():
        value = getattr(recipe, field)
        require(
            augmentation in recipe.augment or value == getattr(named, field),
            option_name(field),
            value,
            f"is for {augmentation}; add {augmentation} to --augment",
        )
    for field in ("muon_step", "muon_momentum"):
        value = getattr(recipe, field)
        require(
            recipe.optimizer == "muon" or value == getattr(named, field),
            option_name(field),
            value,
            f"is for muon, not for {recipe.optimizer}; give --optimizer muon",
        )
    require(
        recipe.optimizer not in ("adam", "adamw")
        or not (is_given("--nesterov", argv) or is_given("--no-nesterov", argv)),
        "nesterov",
        recipe.nesterov,
        f"is for sgd and muon, not for {recipe.optimizer}; leave it out",
    )


def _check_lr(named: Recipe, recipe: Recipe, argv: list[str]) -> None:
    """Raise a ConfigError for another optimiser that was given no learning rate of its own."""
    require(
        recipe.optimizer == named.optimizer or _value_of("--lr", argv) is not None,
        "optimizer",
        recipe.optimizer,
        f"the learning rate of recipe {named.name}, {named.lr:g}, is for {named.optimizer}; give "
        f"one with --lr, such as --lr {TYPICAL_LR[recipe.optimizer]:g}"
        + (" (and its weight decay: try --weight-decay 0.05)" * (recipe.optimizer == "adamw")),
    )


def check_skips(precision: str | None, argv: list[str]) -> None:
    """Raise a ConfigError for a limit on skipped steps in a precision that skips none."""
    name = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "fp32")
    require(
        name == "fp16" or not is_given("--max-skipped-steps", argv),
        "max-skipped-steps",
        _value_of("--max-skipped-steps", argv),
        "is for fp16, which alone skips steps; leave it out, or give --precision fp16",
    )


def without(option: str, argv: list[str]) -> list[str]:
    """The words but for an option and its value, as often as it is given."""
    kept, is_value = [], False
    for word in argv:
        if is_value:
            is_value = False
        elif _name_of(word) == option:
            is_value = "=" not in word
        else:
            kept.append(word)
    return kept


def is_given(option: str, argv: list[str]) -> bool:
    """Whether an option is among the words."""
    return any(_name_of(word) == option for word in argv)


def _name_of(word: str) -> str:
    """The option in a word, `_` being as good as `-` in it."""
    return word.partition("=")[0].replace("_", "-")


def _value_of(option: str, argv: list[str]) -> str | None:
    """The last value given for an option, as `--option value` or `--option=value`."""
    value = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if _name_of(word) == option:
            after = None if (following or "").startswith("--") else following
            value = word.partition("=")[2] if "=" in word else after
    return value
