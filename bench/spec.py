"""What is measured: cells, suites, and their expansion into tasks. No torch."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

from bench.protocol import Protocol
from cifar.config import (
    PRECISIONS,
    ModelConfig,
    Recipe,
    TrainConfig,
    require,
)
from cifar.data.config import DataConfig
from cifar.recipes import get_recipe
from cifar.serialize import STRICT, digest

RECIPE = "sgd"
"""The recipe of a cell that names none: its optimiser step is the one that peers time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the grid: a training configuration, its launcher and its process count.

    Raises:
        ConfigError: no precision or an unknown one, no process, a batch that does not divide, or an
            exchange without others to exchange with.
        UnsupportedError: an exchange that its launcher does not do.
    """

    __pydantic_config__: ClassVar = STRICT

    train: TrainConfig
    launcher: str = "ddp"
    num_processes: int = 1

    def __post_init__(self) -> None:
        known = ", ".join(PRECISIONS)
        require(
            self.train.precision in PRECISIONS,
            "precision",
            self.train.precision,
            f"choose one of {known}",
        )
        patience = self.train.recipe.patience
        remedy = "a cell trains for its whole budget; take a recipe without"
        require(patience == 0, "patience", patience, remedy)
        require(self.num_processes >= 1, "num-processes", self.num_processes, "give 1 or more")
        self.train.per_device_batch_size(self.num_processes)
        self.train.parallel.check_launch(self.launcher, self.num_processes)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the contents."""
        return digest(self)

    @property
    def precision(self) -> str:
        """The precision's name: a cell always has one."""
        assert self.train.precision is not None
        return self.train.precision

    @property
    def layout(self) -> str:
        """Memory format of images and convolution weights, as tables show it."""
        return "channels-last" if self.train.channels_last else "contiguous"

    @property
    def compiled(self) -> str:
        """How the model is run, as tables show it: `eager`, `compile`, `compile-max-autotune`."""
        train = self.train
        if not train.compile:
            return "eager"
        return "compile" if train.compile_mode == "default" else f"compile-{train.compile_mode}"

    @property
    def label(self) -> str:
        """For people: `resnet18 fp32 channels-last compile b128 x2 seed1`, defaults left out."""
        train = self.train
        parts = (
            train.model.label,
            "distilled" if train.distillation.teacher else "",
            self.precision,
            self.layout if train.channels_last else "",
            self.compiled if train.compile else "",
            f"b{train.recipe.global_batch_size}",
            f"acc{train.accumulation_steps}" if train.accumulation_steps > 1 else "",
            f"x{self.num_processes}" if self.num_processes > 1 else "",
            self.launcher if self.launcher != "ddp" else "",
            train.parallel.label,
            train.data.source if train.data.source != "shapes" else "",
            f"seed{train.seed}" if train.seed else "",
        )
        return " ".join(part for part in parts if part)

    @property
    def slug(self) -> str:
        """The label in characters that are safe in a file name; not unique, see `Task.slug`."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One process to start: a cell, its protocol and the index of the repeat.

    Of a trial of a search `repeat` is the trial's number.
    """

    __pydantic_config__: ClassVar = STRICT

    cell: Cell
    protocol: Protocol
    repeat: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What a record of this task is known by."""
        return (self.cell.digest, self.protocol.digest, self.repeat)

    @property
    def slug(self) -> str:
        """A folder name, unique within a suite: `resnet18-fp32-b128-1f0c9a3e-r0`."""
        cell, protocol, repeat = self.key
        return f"{self.cell.slug}-{cell[:4]}{protocol[:4]}-r{repeat}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Cells that are measured alike."""

    protocol: Protocol
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A named set of plans; `description` is the line that `bench list` shows."""

    name: str
    description: str
    plans: tuple[Plan, ...]


MOST_TASKS = 10_000
"""Of one run: at ten seconds each they take more than a day."""


def expand(suite: Suite) -> tuple[Task, ...]:
    """One task per cell, protocol and repeat, without duplicates.

    The first repeats of all cells come before the second ones; see `bench.repeats.interleaved`.

    Raises:
        ConfigError: no cell at all, too many tasks, a training budget smaller than two batches, or
            steps of two kinds to be timed.
    """
    count = sum(len(plan.cells) * plan.protocol.repeats for plan in suite.plans)
    remedy = f"are more than {MOST_TASKS}; give fewer models, precisions, seeds or repeats"
    require(count <= MOST_TASKS, "processes", count, remedy)
    tasks: dict[tuple[str, str, int], Task] = {}
    for plan in suite.plans:
        for cell in plan.cells:
            _check_budget(cell, plan.protocol)
            _check_steps(cell, plan.protocol)
            for repeat in range(plan.protocol.repeats):
                task = Task(cell=cell, protocol=plan.protocol, repeat=repeat)
                tasks.setdefault(task.key, task)
    require(bool(tasks), "suite", suite.name, "has no cells; give models and precisions")
    return tuple(sorted(tasks.values(), key=lambda task: task.repeat))


def _check_budget(cell: Cell, protocol: Protocol) -> None:
    batch, budget = cell.train.recipe.global_batch_size, protocol.train_samples
    warm_up = least_warm_up(cell.train, protocol)
    least = FEWEST_STEPS + warm_up
    require(
        budget == 0 or budget >= least * batch,
        "train-samples",
        budget,
        f"give 0 (speed only) or at least {least * batch}, for the first step, {warm_up} of "
        f"warm-up, a timed one and the two around it, of {batch} each",
    )


def _check_steps(cell: Cell, protocol: Protocol) -> None:
    frozen = cell.train.recipe.frozen_epochs
    remedy = "its steps cost less than the later ones; name a --recipe without"
    require(frozen == 0 or protocol.validation_alone, "frozen-epochs", frozen, remedy)


OBSERVED_STEPS = 2
"""One on either side of the timed window, see `bench.observe`."""
FEWEST_STEPS = 2 + OBSERVED_STEPS
"""The first step, a timed one and those observed: what a cell takes without any warm-up."""
CAPTURE_STEPS = 2
"""Steps after the first that may belong to compiling: CUDA graphs warm up in one and are captured
in one. A compiled cell takes them before its window, whatever its protocol says."""


SPAN_SECONDS = 1.0
"""Seconds of work that tell a pace: no span of a warm-up needs to last longer."""


def warm_up_span(steps: int, seconds_per_step: float) -> int:
    """Steps in each of the two spans that end a warm-up: fewer than `steps` where they are long."""
    return min(steps, math.ceil(SPAN_SECONDS / seconds_per_step))


def least_warm_up(train: TrainConfig, protocol: Protocol) -> int:
    """Steps between the first and the observed one that a cell of short steps takes at the least.

    The first one is a step of the two spans as well.
    """
    return max(2 * protocol.warmup_steps - 1, CAPTURE_STEPS if train.compile else 0)


def seeded(cells: Sequence[Cell], seeds: int) -> tuple[Cell, ...]:
    """Every cell at seeds 0, 1, ..., `seeds` - 1."""
    require(1 <= seeds <= MOST_TASKS, "seeds", seeds, f"give 1 to {MOST_TASKS}")
    return tuple(
        replace(cell, train=replace(cell.train, seed=seed))
        for cell in cells
        for seed in range(seeds)
    )


def grid(
    models: Sequence[str],
    precisions: Sequence[str],
    *,
    channels_last: Sequence[bool] = (False,),
    compile: Sequence[bool] = (False,),  # noqa: A002 - the option's name everywhere
    batch_sizes: Sequence[int] = (),
    seeds: int = 1,
    recipe: Recipe | None = None,
    data: DataConfig | None = None,
    launcher: str = "ddp",
    num_processes: int = 1,
) -> tuple[Cell, ...]:
    """The product of the options, the last one varying fastest.

    `recipe` is `RECIPE` if None, `batch_sizes` the recipe's own if empty.

    Raises:
        ConfigError: an unknown name, a value out of range, a batch that does not divide.
    """
    recipe = recipe or get_recipe(RECIPE)
    cells = [
        Cell(
            train=TrainConfig(
                model=ModelConfig(name=model),
                recipe=replace(recipe, global_batch_size=batch_size),
                data=data or DataConfig(),
                precision=cast(Literal["fp32", "tf32", "bf16", "fp16"], precision),
                channels_last=nhwc,
                compile=compiled,
            ),
            launcher=launcher,
            num_processes=num_processes,
        )
        for model, precision, nhwc, compiled, batch_size in itertools.product(
            models, precisions, channels_last, compile, batch_sizes or (recipe.global_batch_size,)
        )
    ]
    return seeded(cells, seeds)
