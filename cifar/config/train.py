"""All of a run: what determines its weights, and where and how safely it runs."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from cifar.config.checks import option_name, require
from cifar.config.distillation import Distillation
from cifar.config.model import ModelConfig
from cifar.config.parallel import Parallel
from cifar.config.precision import PrecisionName
from cifar.config.recipe import Recipe
from cifar.data.config import DATA_HELP, DataConfig, DataOption
from cifar.errors import ConfigError
from cifar.serialize import STRICT

arg = tyro.conf.arg

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
"""What torch.compile calls its modes."""
MOST_PARTS = 65_536
"""Micro-batches of a step."""
MOST_SECONDS = 7 * 24 * 3600.0
"""That a process may wait for another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that determines the weights a run ends with, but for the machine it runs on."""

    __pydantic_config__: ClassVar = STRICT

    model: ModelConfig = field(default=ModelConfig())
    recipe: Recipe = field(default=Recipe())
    distillation: Distillation = field(default=Distillation())
    parallel: Parallel = field(default=Parallel())
    data: Annotated[DataOption, arg(help=DATA_HELP)] = field(default=DataConfig())
    limit_train: int | None = None
    """Training images to use, of every class in proportion; all of them when not given."""
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
        limit = self.limit_train
        require(limit is None or limit >= 1, "limit-train", limit, "give 1 or more")
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
        self._check_parallel()

    def _check_parallel(self) -> None:
        require(
            not (self.compile and self.parallel.sync_batch_norm),
            "sync-batch-norm",
            True,
            "not with --compile, whose graph would break at every BatchNorm; leave out one",
        )
        require(
            self.precision != "fp16" or self.parallel.local_steps == 1,
            "local-steps",
            self.parallel.local_steps,
            "not with --precision fp16, whose loss scale would differ between processes; use bf16",
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
    report: bool = True
    """Write pictures and tables of the run at its end, into its folder `report`."""
    max_skipped_steps: int = 20
    """fp16: stop after this many skipped steps in a row."""
    meeting_timeout: float = 45.0
    """Seconds that the processes of a job may start apart."""
    collective_timeout: float = 600.0
    """Seconds without progress after which processes that wait for another one name it and end."""

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
        for name in ("meeting_timeout", "collective_timeout"):
            seconds = getattr(self, name)
            good = 1 <= seconds <= MOST_SECONDS
            require(good, option_name(name), seconds, f"give 1 to {MOST_SECONDS:g} seconds")
