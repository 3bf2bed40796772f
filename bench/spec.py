"""What is measured and how: cells, protocols, suites, and their expansion into tasks. No torch."""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

from bench.stats import FEWEST
from cifar.config import (
    PRECISIONS,
    DataConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    option_name,
    require,
)
from cifar.recipes import get_recipe
from cifar.serialize import NOT_IN_DIGEST, STRICT, digest


@functools.lru_cache(maxsize=4096)
def _digest(value: "Cell | Protocol") -> str:
    return digest(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the grid: a training configuration, its launcher and its process count.

    Raises:
        ConfigError: no precision or an unknown one, no process, or a batch that does not divide.
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
        require(self.num_processes >= 1, "num-processes", self.num_processes, "give 1 or more")
        self.train.per_device_batch_size(self.num_processes)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the contents."""
        return _digest(self)

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
            self.precision,
            self.layout if train.channels_last else "",
            self.compiled if train.compile else "",
            f"b{train.recipe.global_batch_size}",
            f"acc{train.accumulation_steps}" if train.accumulation_steps > 1 else "",
            f"x{self.num_processes}" if self.num_processes > 1 else "",
            self.launcher if self.launcher != "ddp" else "",
            train.data.source if train.data.source != "shapes" else "",
            f"seed{train.seed}" if train.seed else "",
        )
        return " ".join(part for part in parts if part)

    @property
    def slug(self) -> str:
        """The label in characters that are safe in a file name; not unique, see `Task.slug`."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.label)


METRICS = ("anatomy", "pipeline", "utilization")
"""What a protocol may ask for besides the basic metrics: the keys of `bench.measure.FURTHER`."""
BACKENDS = ("compiled", "exported", "onnxruntime")
"""Ways to run a model for inference, see `bench.measure.backends`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a cell is measured: steps, iterations, training budget and limits."""

    __pydantic_config__: ClassVar = STRICT

    warmup_steps: int = 5
    """Steps in each of two neighbouring spans whose median times must agree to end the warm-up."""
    max_warmup_steps: int = 30
    """Steps after which the clock starts anyway."""
    timed_steps: int = 20
    """Optimiser steps that are timed."""
    timed_seconds: float | None = None
    """Time as many steps as fit into so many seconds instead."""
    min_timed_seconds: float = 2.0
    """On a GPU, time more than `timed_steps` where these would take less than so many seconds: its
    steps may last milliseconds, and its energy is counted every 0.1 s."""
    repeats: int = field(default=1, metadata=NOT_IN_DIGEST)
    """Fresh processes per cell; at most so many with `target_interval`."""
    target_interval: float | None = field(default=None, metadata=NOT_IN_DIGEST)
    """Start no more processes of a cell once the 95 % interval of its training throughput reaches
    no further from the median than this fraction of it (see `bench.repeats`)."""
    train_samples: int = 0
    """Training budget in samples; 0: speed only."""
    inference_batch_sizes: tuple[int, ...] = (1, 256)
    inference_warmup: int = 5
    """Batches before the clock starts, at each batch size."""
    inference_iterations: int = 30
    """Batches timed at each batch size."""
    inference_seconds: float = 10.0
    """At each batch size, stop after this many seconds, but not before the third batch."""
    inference_backends: tuple[str, ...] = ()
    """Ways to run the same weights besides the cell's own: compiled, exported, onnxruntime."""
    metrics: tuple[str, ...] = ()
    """Further metrics than the basic ones: see METRICS."""
    training_alone: bool = False
    """True: measure the training and nothing else, with no step that is not the cell's own."""
    memory_limit: int | None = None
    """Bytes that each process may allocate, see `bench.limits`; None: as much as there is."""
    allow_emulated: bool = True
    """False: a precision the device only emulates (bf16 without kernels) is `unsupported`."""
    timeout: float = field(default=1800.0, metadata=NOT_IN_DIGEST)
    """Seconds after which the cell's processes are ended."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_together()
        for name, known in (("metrics", METRICS), ("inference_backends", BACKENDS)):
            given = getattr(self, name)
            require(
                set(given) <= set(known) and len(set(given)) == len(given),
                option_name(name),
                ",".join(given),
                f"choose from {', '.join(known)}, each once",
            )
            object.__setattr__(self, name, tuple(each for each in known if each in given))

    def _check_ranges(self) -> None:
        for name, least in (
            ("warmup_steps", 0),
            ("max_warmup_steps", 0),
            ("timed_steps", 1),
            ("repeats", 1),
            ("train_samples", 0),
            ("inference_warmup", 0),
            ("inference_iterations", 1),
            ("min_timed_seconds", 0),
        ):
            value = getattr(self, name)
            require(value >= least, option_name(name), value, f"give {least} or more")
        limit = self.memory_limit
        require(limit is None or limit >= 1, "memory-limit", limit, "give 1 or more")
        for name in ("inference_seconds", "timeout", "timed_seconds", "target_interval"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                option_name(name),
                value,
                "give a positive number",
            )
        sizes = self.inference_batch_sizes
        require(
            all(size >= 1 for size in sizes) and len(set(sizes)) == len(sizes),
            "inference-batch-sizes",
            sizes,
            "give different sizes of 1 or more",
        )

    def _check_together(self) -> None:
        require(
            self.timed_seconds is None or self.warmup_steps > 0,
            "timed-seconds",
            self.timed_seconds,
            "needs warm-up steps, whose pace tells how many fit",
        )
        require(
            self.target_interval is None or self.repeats > FEWEST,
            "target-interval",
            self.target_interval,
            f"needs repeats, at most how many processes to start: {FEWEST + 1} or more",
        )
        require(
            self.min_timed_seconds < math.inf,
            "min-timed-seconds",
            self.min_timed_seconds,
            "give 0 or a positive number",
        )
        require(
            not (self.training_alone and self.metrics),
            "metrics",
            ",".join(self.metrics),
            "not with training-alone, which measures the training and nothing else",
        )
        require(
            self.max_warmup_steps >= 2 * self.warmup_steps,
            "warmup-steps",
            self.warmup_steps,
            f"give at most {self.max_warmup_steps // 2}: two spans within {self.max_warmup_steps}",
        )
        require(
            self.timed_seconds is None or self.timed_seconds < self.timeout,
            "timed-seconds",
            self.timed_seconds,
            f"give less than the timeout of {self.timeout:g}",
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over what is measured; repeats and time limit do not enter."""
        return _digest(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One process to start: a cell, its protocol and the index of the repeat."""

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
        ConfigError: no cell at all, too many tasks, or a training budget smaller than two batches.
    """
    count = sum(len(plan.cells) * plan.protocol.repeats for plan in suite.plans)
    remedy = f"are more than {MOST_TASKS}; give fewer models, precisions, seeds or repeats"
    require(count <= MOST_TASKS, "processes", count, remedy)
    tasks: dict[tuple[str, str, int], Task] = {}
    for plan in suite.plans:
        for cell in plan.cells:
            _check_budget(cell, plan.protocol)
            for repeat in range(plan.protocol.repeats):
                task = Task(cell=cell, protocol=plan.protocol, repeat=repeat)
                tasks.setdefault(task.key, task)
    require(bool(tasks), "suite", suite.name, "has no cells; give models and precisions")
    return tuple(sorted(tasks.values(), key=lambda task: task.repeat))


def _check_budget(cell: Cell, protocol: Protocol) -> None:
    batch, budget = cell.train.recipe.global_batch_size, protocol.train_samples
    warm_up = least_warm_up(cell.train, protocol)
    least = 4 + warm_up
    require(
        budget == 0 or budget >= least * batch,
        "train-samples",
        budget,
        f"give 0 (speed only) or at least {least * batch}, for the first step, {warm_up} of "
        f"warm-up, a timed one and the two around it, of {batch} each",
    )


CAPTURE_STEPS = 2
"""Steps after the first that may belong to compiling: CUDA graphs warm up in one and are captured
in one. A compiled cell takes them before its window, whatever its protocol says."""


def least_warm_up(train: TrainConfig, protocol: Protocol) -> int:
    """Steps between the first and the observed one that a cell takes at the least."""
    return max(2 * protocol.warmup_steps, CAPTURE_STEPS if train.compile else 0)


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

    `recipe` is "default" if None, `batch_sizes` the recipe's own if empty.

    Raises:
        ConfigError: an unknown name, a value out of range, a batch that does not divide.
    """
    recipe = recipe or get_recipe("default")
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
