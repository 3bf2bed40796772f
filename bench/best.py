"""The best trial of a search, as people use it: what it changes, and how to train with it."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.space import KINDS, Value, reads, show, value_of
from bench.tuning import Trial, best_of
from cifar.config import TrainConfig, option_name
from cifar.recipes import get_config

BEST_FILE = "best.json"
MOST_SEEDS = 2**31
"""A training's seed is below it."""
_OF_THE_SEARCH = ("validation",)
"""What a training with the best settings needs not: it has all images to train on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A field in which the best trial differs from the recipe, by its option's name."""

    option: str
    recipe: str
    best: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The contents of best.json."""

    recipe: str
    """The named recipe that the search started from."""
    model: str
    trial: int
    """Its number, counted from 1."""
    validation_top1: float
    """Fraction of the images held out that are right after the last epoch."""
    validation_loss: float
    """In nats."""
    validation_error: float
    """Standard error of that top-1, as a fraction: how much it owes to which images they are."""
    recipe_validation_top1: float | None
    """What the recipe's own values of what is searched came to; None if they were not tried, or not
    to the end."""
    epochs: int
    finished: int
    """Trials that came to their end, of `trials`."""
    trials: int
    changes: tuple[Change, ...]
    command: str
    """Trains with these settings, and a seed that was not searched with."""
    note: str


def summarise(trials: Sequence[Trial], searched: Sequence[str]) -> Best | None:
    """The best of all trials, None if none is finished; `searched` are the fields that varied."""
    best = best_of(trials)
    if best is None or best.top1 is None or best.loss is None:
        return None
    finished = [trial for trial in trials if trial.state == "finished"]
    itself = [each.top1 for each in finished if not set(searched) & set(_changed(each.train))]
    recipe, error = best.train.recipe, _standard_error(best.top1, best.samples)
    return Best(
        recipe=recipe.name,
        model=best.train.model.label,
        trial=best.number + 1,
        validation_top1=best.top1,
        validation_loss=best.loss,
        validation_error=error,
        recipe_validation_top1=itself[0] if itself else None,
        epochs=recipe.epochs,
        finished=len(finished),
        trials=len(trials),
        changes=changes(best.train),
        command=shlex.join(command(best.train)),
        note=(
            f"the best of {len(trials)} trials on the {best.samples:,} images that chose it, where "
            f"a top-1 has a standard error of {error:.2%}: expect less of it on others. Train it "
            f"with some seeds other than {best.train.seed}, as the command does, to confirm it"
        ),
    )


def _standard_error(top1: float, samples: int) -> float:
    """Of a share that was counted in so many samples; they are independent."""
    return math.sqrt(top1 * (1 - top1) / samples)


def render(best: Best) -> str:
    """What to tell of it."""
    itself = best.recipe_validation_top1
    beside = "" if itself is None else f" (with the values of {best.recipe}: {itself:.2%})"
    width = max((len(each.option) for each in best.changes), default=0)
    return "\n".join(
        [
            f"best: trial {best.trial}, top-1 {best.validation_top1:.2%} on the held-out images "
            f"after {best.epochs} epoch{'s' * (best.epochs > 1)}{beside}",
            f"changes to {best.recipe}:" if best.changes else f"no change to {best.recipe}",
            *(f"  {each.option:<{width}}  {each.recipe} -> {each.best}" for each in best.changes),
            f"to train with it: {best.command}",
            f"note: {best.note}",
            "",
        ]
    )


def changes(train: TrainConfig) -> tuple[Change, ...]:
    """In which fields a configuration differs from the recipe of its name; budget included."""
    named = get_config(train.recipe.name)
    return tuple(
        Change(
            option=option_name(field),
            recipe=show(value_of(named, field)),
            best=show(value_of(train, field)),
        )
        for field in _changed(train)
    )


def _changed(train: TrainConfig) -> list[str]:
    """The fields that a training reads and in which it differs from the recipe of its name."""
    named = get_config(train.recipe.name)
    return [
        field
        for field in KINDS
        if field not in _OF_THE_SEARCH
        and reads(train, field)
        and value_of(train, field) != value_of(named, field)
    ]


def command(train: TrainConfig) -> list[str]:
    """The words of `cifar train` for a configuration, with the next seed.

    It trains on all images, which the search had held some out of.
    """
    model, named = train.model, get_config(train.recipe.name).model
    words = ["cifar", "train", "--recipe", train.recipe.name]
    if replace(model, dropout=named.dropout) != named:
        width = f"-w{model.width}" if model.width else ""
        resize = f"-r{model.resize}" if model.resize else ""
        words += ["--model", f"{model.name}{width}{resize}"]
        words += ["--squeeze-excitation"] * model.squeeze_excitation
    words += ["--data", str(train.data)]
    given = _changed(train)
    if "optimizer" in given and "lr" not in given:
        given.append("lr")  # whose meaning changes with it
    for field in given:
        words += [f"--{option_name(field)}", *_words(value_of(train, field))]
    words += ["--precision", str(train.precision)]
    words += ["--channels-last"] * train.channels_last
    return [*words, "--seed", str((train.seed + 1) % MOST_SEEDS)]


def _words(value: Value) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (show(value),)
