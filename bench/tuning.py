"""A search for a better recipe: what it tries, and what its records say of what was tried.

A trial is a task like any other, in fresh processes, and its record the truth: which values it had
stands in the record's cell, its number in the record's repeat, so that a search can be taken up
again from its records alone. Trials are compared on images held out of the training split; no
trial scores the test images. No torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bench.protocol import Protocol
from bench.record import Record
from bench.space import Choice, Parameter, Range, Values, size_of, value_of
from bench.spec import Task
from cifar.config import AUGMENTATIONS, TrainConfig, require
from cifar.range_test import LONGEST_STEP
from cifar.serialize import STRICT

SUITE = "search"
"""The suite's name in runs and records."""
VALIDATION = 0.1
"""Share of the training images that trials are judged by, unless asked otherwise."""
TIMEOUT = 4 * 3600.0
"""Seconds after which a trial is ended, unless asked otherwise."""
TRIALS = 30
"""How many, unless asked otherwise."""
MOST_TRIALS = 10_000
TENFOLD = 10.0
"""How far from the recipe's own a learning rate or a weight decay is searched, either way."""
USUAL_DECAY = 1e-4
"""In the place of a weight decay of 0, from which no factor leads away."""
_POLICIES = tuple(name for name in AUGMENTATIONS if name.endswith("-augment"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What is searched, and for how long.

    Raises:
        ConfigError: nothing to search, or a value out of range.
    """

    __pydantic_config__: ClassVar = STRICT

    space: tuple[Range | Choice, ...]
    trials: int = TRIALS
    seed: int = 0
    """Of what is drawn; the trials train with it as well."""
    pruning: bool = True
    """Whether trials that are worse than most others at the same epoch are ended there."""

    def __post_init__(self) -> None:
        remedy = "nothing to search: give a range such as --lr 0.01..1, or several values"
        require(bool(self.space), "space", "", remedy)
        least = 1 <= self.trials <= MOST_TRIALS
        require(least, "trials", self.trials, f"give 1 to {MOST_TRIALS}")
        size = size_of(self.space)
        remedy = f"there are only {size} settings to try; give at most that many"
        require(size is None or self.trials <= size, "trials", self.trials, remedy)


def trial_protocol(timeout: float | None = None) -> Protocol:
    """How a trial is measured: trained and scored, within `timeout` seconds, and nothing timed.

    Trials run side by side, where a time would say nothing.
    """
    return Protocol(
        warmup_steps=0,
        timed_steps=1,
        min_timed_seconds=0.0,
        inference_batch_sizes=(),
        validation_alone=True,
        timeout=TIMEOUT if timeout is None else timeout,
    )


def trial_task(base: Task, number: int, train: TrainConfig) -> Task:
    """The task of a trial, counted from 0, in the search that `base` stands for."""
    return replace(base, cell=replace(base.cell, train=train), repeat=number)


def own_values(train: TrainConfig, space: Iterable[Parameter]) -> Values:
    """What a configuration has itself of the fields that are searched."""
    return {parameter.field: value_of(train, parameter.field) for parameter in space}


def default_space(train: TrainConfig, *, images: int, processes: int) -> tuple[Parameter, ...]:
    """What is searched where nothing is said: around what the recipe has itself.

    Learning rate and weight decay up to tenfold either way, and with Muon its step, which stands
    for the latter where there are convolutions; half, the same and twice the batch, as far as they
    divide and leave two steps in an epoch; cutout and TrivialAugment besides.
    """
    recipe = train.recipe
    sizes = (recipe.global_batch_size // 2, recipe.global_batch_size, recipe.global_batch_size * 2)
    good = [size for size in sizes if 1 <= size <= images // 2 and size % processes == 0]
    augment = [recipe.augment]
    if "cutout" not in recipe.augment:
        augment.append((*recipe.augment, "cutout"))
    if not set(recipe.augment) & set(_POLICIES):
        augment.append((*recipe.augment, "trivial-augment"))
    return (
        _around("lr", recipe.lr),
        *([_around("muon_step", recipe.muon_step)] if recipe.optimizer == "muon" else []),
        _around("weight_decay", recipe.weight_decay or USUAL_DECAY),
        *([Choice(field="global_batch_size", texts=tuple(map(str, good)))] if good[1:] else []),
        Choice(field="augment", texts=tuple(" ".join(each) or "none" for each in augment)),
    )


def _around(field: str, value: float) -> Range:
    highest = LONGEST_STEP if field == "muon_step" else math.inf
    ends = (value / TENFOLD, min(value * TENFOLD, highest))
    low, high = (float(f"{each:.3g}") for each in ends)
    return Range(field=field, low=low, high=high)


def check_images(train: TrainConfig, batch_sizes: Iterable[int], images: int) -> int:
    """Refuse what leaves no image to train on or to judge by, or an epoch of less than two steps.

    `images` is how many the training split has. Returns how many are left to train on.

    Raises:
        ConfigError: see there.
    """
    limit, share = train.limit_train, train.recipe.validation
    require(limit is None or limit <= images, "limit-train", limit, f"give at most {images}")
    count = images if limit is None else limit
    held_out = round(share * count)  # as `cifar.data.division` does
    remedy = f"leaves {held_out} of {count} training images to judge trials by; give another share"
    require(0 < held_out < count, "validation", share, remedy)
    left = count - held_out
    for size in batch_sizes:
        remedy = f"is less than two steps in an epoch of {left} images; give at most {left // 2}"
        require(2 * size <= left, "batch-size", size, remedy)
    return left


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What became of a trial.

    `state` is `finished`; `pruned`, ended early for being worse than others; `diverged`, a loss
    that was not finite; or the status of a record that is not ok. `curve` has the top-1 on the
    held-out images after every epoch that it trained; `top1` and `loss` are what it came to, and
    `samples` on how many images, if it is finished.
    """

    number: int
    """Counted from 0."""
    train: TrainConfig
    state: str
    curve: tuple[float, ...] = ()
    top1: float | None = None
    loss: float | None = None
    samples: int = 0
    reason: str = ""

    @property
    def is_answer(self) -> bool:
        """Whether it tells something of its values: that they do not fit or cannot run, too."""
        return self.state in ("finished", "pruned", "diverged", "oom", "unsupported")

    @property
    def rank(self) -> tuple[float, ...]:
        """Smaller is better: top-1, then loss; the others by how far they came."""
        if self.state == "finished" and self.top1 is not None and self.loss is not None:
            return (0, -self.top1, self.loss, self.number)
        last = self.curve[-1] if self.curve else 0.0
        return (1 if self.is_answer else 2, -len(self.curve), -last, self.number)


def told_by(record: Record) -> Trial:
    """What a trial's record says."""
    reached = record.find("validation_top1")
    labels = {} if reached is None else reached.labels
    state: str = record.status
    if record.status == "ok" and reached is not None:
        state = "finished" if reached.status == "ok" else str(labels.get("kind"))
    reason = reached.reason if state == "diverged" and reached is not None else record.reason
    return Trial(
        number=record.repeat,
        train=record.cell.train,
        state=state,
        curve=curve_of(record),
        top1=record.value("validation_top1"),
        loss=record.value("validation_loss"),
        samples=int(labels.get("samples", 0)),
        reason=" ".join(reason.split()),
    )


def curve_of(record: Record) -> tuple[float, ...]:
    """Top-1 on the held-out images after every epoch so far."""
    found = record.find("epoch_validation_top1")
    return found.samples[0] if found is not None and found.samples else ()


def trials_of(records: Iterable[Record]) -> list[Trial]:
    """What the last record of every trial says, the best trial first."""
    last = {record.repeat: record for record in records}
    return sorted(map(told_by, last.values()), key=lambda trial: trial.rank)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial of the highest top-1, of equal ones that of the smallest loss."""
    finished = [trial for trial in trials if trial.state == "finished"]
    return min(finished, key=lambda trial: trial.rank, default=None)
