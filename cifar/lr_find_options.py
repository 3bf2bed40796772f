"""The command `cifar lr-find`: its options, and what it prints and writes."""

import dataclasses
import itertools
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cifar.cli import parse
from cifar.config import RunConfig, TrainConfig, option_name
from cifar.errors import ConfigError, TrainingError
from cifar.files import check_place, user_path
from cifar.process import ensure_environment
from cifar.range_test import Curve, RangeTest, suggested, told, tuned
from cifar.ranks import is_first
from cifar.run_folder import name_of
from cifar.train_options import (
    check_changes,
    check_skips,
    is_given,
    named_config,
    with_typical_lr,
    without,
)

arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True, slots=True)
class LrFindOptions:
    """Options of `cifar lr-find`: those of `cifar train` say what is trained."""

    train: Annotated[TrainConfig, arg(name="")]
    run: RunConfig
    test: Annotated[RangeTest, arg(name="range test")] = field(default=RangeTest())
    output: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder for the curve, as picture, CSV and JSON; runs/lr-find/<model>-<data>-<time> when not
    given."""


_FOR_TRAINING = {
    "--lr": "is what is looked for; leave it out",
    "--output-dir": "is for the folder of a run; name that for the curve with --output",
    **dict.fromkeys(
        ("--resume", "--save-every", "--keep-checkpoints", "--report", "--no-report"),
        "is for cifar train; leave it out",
    ),
}
"""Options of `cifar train` that mean nothing here, and what to do about it."""
_OWN = ("--lowest", "--highest", "--steps", "--output")


def read_lr_find_options(argv: list[str]) -> LrFindOptions:
    """The options, starting from the recipe that is named.

    Raises:
        ConfigError: a bad one, or one that is for `cifar train` alone.
    """
    for option, remedy in _FOR_TRAINING.items():
        if is_given(option, argv):
            raise ConfigError(f"{option}: {remedy}")
    named = named_config(argv)
    options = parse(
        LrFindOptions,
        argv,
        prog="cifar lr-find",
        description="Suggest a highest learning rate for cifar train with the same options: train "
        "for some steps while it grows, and see where learning begins and where the loss breaks.",
        example="cifar lr-find --model resnet18 --data cifar10 --optimizer adamw",
        default=LrFindOptions(train=named, run=RunConfig()),
    )
    check_changes(named.recipe, options.train.recipe, argv)
    check_skips(options.train.precision, argv)
    options.train.model.check_installed()
    return dataclasses.replace(options, train=with_typical_lr(options.train, named.recipe))


def run_lr_find(argv: list[str]) -> int:
    """`cifar lr-find`."""
    options = read_lr_find_options(argv)
    folder = _folder(options)
    if is_first(os.environ):
        check_place("output", folder, is_folder=True)
    ensure_environment()
    from cifar.lr_finder import explore

    curve, what = explore(options.train, options.run, options.test)
    try:
        found = tuned(options.train, curve)
    except TrainingError as error:
        _write(folder, curve, options.train, None, what)
        raise TrainingError(f"{error}; the curve is in {folder}") from None
    _write(folder, curve, options.train, found, what)
    if is_first(os.environ):
        print(f"suggested: {told(found)}; the curve is in {folder}")
        print(_command(found, argv))
    return 0


def _folder(options: LrFindOptions) -> Path:
    if options.output is not None:
        return user_path(options.output, "output")
    return Path("runs", "lr-find", name_of(options.train))


def _write(
    folder: Path, curve: Curve, train: TrainConfig, found: TrainConfig | None, what: str
) -> None:
    """Write the curve, from the first process alone."""
    if is_first(os.environ):
        from cifar.report import put_files, range_test_files

        put_files("output", folder, range_test_files(curve, train, found, what))


def _command(found: TrainConfig, argv: list[str]) -> str:
    """The command that trains with what was found."""
    values = {f"--{option_name(name)}": f"{value:g}" for name, value in suggested(found).items()}
    words = argv
    for option in (*_OWN, *values):
        words = without(option, words)
    return shlex.join(["cifar", "train", *words, *itertools.chain(*values.items())])
