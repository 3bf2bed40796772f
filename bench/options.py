"""The options of `bench run`, and the suite that they ask for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.launchers import check_launcher
from bench.option_types import CommaIntegers, CommaList, Flag
from bench.overrides import only, override
from bench.place_options import PlaceOptions
from bench.protocol import Protocol
from bench.scaling import exchange, scaling
from bench.spec import Plan, Suite, expand, grid
from bench.suites import P99_BATCHES, get_suite
from cifar.config import CompileMode, Parallel, option_name, require
from cifar.data.config import DATA_HELP, parse_data
from cifar.errors import ConfigError, UserError
from cifar.files import is_file, user_path
from cifar.recipes import get_recipe

arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Options of `bench run`."""

    suite: tyro.conf.Positional[Annotated[str | None, arg(metavar="[SUITE]")]] = None
    """A named suite (see bench list); or else give --models."""
    only: CommaList = ()
    """Of a suite the cells of these models, recipes or precisions, e.g. resnet9-muon or
    resnet18,bf16."""
    models: CommaList = ()
    """Models to measure without a suite, e.g. resnet18,resnet18-w16."""
    precisions: CommaList = ()
    """Their precisions: fp32, tf32, bf16, fp16; fp32 when not given."""
    data: Annotated[str | None, arg(metavar="SOURCE[:PATH]", help=DATA_HELP)] = None
    recipe: Annotated[str | None, arg(metavar="NAME")] = None
    """Recipe to train by; without a suite sgd when not given."""
    batch_size: Annotated[int | None, arg(aliases=("-b",), metavar="N")] = None
    """Images per optimiser step, over all devices."""
    channels_last: Flag = False
    """Keep images and convolution weights in NHWC order."""
    compile: Flag = False
    """Run the model through torch.compile."""
    compile_mode: Annotated[CompileMode | None, arg(metavar="MODE")] = None
    """torch.compile's mode: default, reduce-overhead or max-autotune."""
    accumulation_steps: Annotated[int | None, arg(name="accumulation", metavar="N")] = None
    """Micro-batches per optimiser step."""
    seeds: Annotated[int | None, arg(metavar="N")] = None
    """Measure every cell at this many seeds."""
    launcher: CommaList = ()
    """How processes are started, e.g. ddp; every cell by each."""
    num_processes: CommaIntegers = ()
    """Processes per cell, one per device, e.g. 4 or 1,2,4,8; every cell in each number."""
    parallel: Parallel = field(default=Parallel())
    train_samples: Annotated[int | None, arg(metavar="N")] = None
    """Training budget of every cell in samples; 0: speed only."""
    warmup_steps: Annotated[int | None, arg(metavar="N")] = None
    """Steps in each of the two spans whose times must agree to end the warm-up."""
    timed_steps: Annotated[int | None, arg(metavar="N")] = None
    """Optimiser steps that are timed."""
    timed_seconds: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Time as many steps as fit into so many seconds instead."""
    repeats: Annotated[int | None, arg(metavar="N")] = None
    """Fresh processes per cell."""
    target_interval: Annotated[float | None, arg(metavar="FRACTION")] = None
    """Stop repeating a cell once its throughput is known to within this, e.g. 0.01."""
    inference_batch_sizes: CommaIntegers = ()
    """Batch sizes of the inference latency, e.g. 1,2,4,8."""
    inference_backends: CommaList = ()
    """Further ways to run inference: compiled, exported, onnxruntime."""
    metrics: CommaList = ()
    """Further metrics: anatomy, pipeline, augmentations, utilization, cold."""
    timeout: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Seconds after which a cell is ended; with --resume for what is missing."""
    dry_run: Flag = False
    """Show the cells, their commands and the expected time; start nothing."""
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """Do what is missing in a run, given by its id or folder."""
    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Where runs are kept."""
    place: Annotated[PlaceOptions, arg(name="")] = field(default_factory=PlaceOptions)


CELL_OPTIONS = (
    "data",
    "recipe",
    "batch_size",
    "channels_last",
    "compile",
    "compile_mode",
    "accumulation_steps",
    "seeds",
    "launcher",
    "num_processes",
    "parallel",
    "train_samples",
    "warmup_steps",
    "timed_steps",
    "timed_seconds",
    "repeats",
    "target_interval",
    "inference_batch_sizes",
    "inference_backends",
    "metrics",
    "timeout",
)
"""The options that change the cells and protocols of a suite."""

SCALING = scaling.__name__
"""The suite that is made for the models, precisions, launchers and numbers of processes given."""


def build_suite(options: RunOptions) -> Suite:
    """The suite that the options ask for, every cell of it valid.

    Raises:
        ConfigError: neither suite nor models, both, or a name or value that cannot be meant.
    """
    changes = _given(options, CELL_OPTIONS)
    _check_counts(options.num_processes)
    require(
        not {"timed_steps", "timed_seconds"} <= changes.keys(),
        "timed-steps",
        options.timed_steps,
        "not with --timed-seconds, which times as many as fit; leave out one of them",
    )
    if options.recipe is not None:
        changes["recipe"] = get_recipe(options.recipe)
    if options.data is not None:
        changes["data"] = parse_data(options.data)
    _check_devices(options)
    if options.suite == SCALING:
        names = {"batch_size": "batch_size", "launcher": "launchers", "num_processes": "counts"}
        own = {name: changes.pop(given) for given, name in names.items() if given in changes}
        start = scaling(**_given(options, ("models", "precisions")), **own)
    else:
        start = _start(options)
    suite = override(only(start, options.only) if options.only else start, **changes)
    for task in expand(suite):
        check_launcher(task.cell.launcher)
    return suite


def _check_devices(options: RunOptions) -> None:
    """Refuse to count this machine's devices for a suite that SLURM starts on others."""
    counts = options.suite in (SCALING, exchange.__name__) and not options.num_processes
    if counts and options.place.slurm:
        raise ConfigError(
            f"num-processes: not given: suite {options.suite} counts the devices of this machine, "
            "and --slurm measures on others; give the numbers for theirs, such as 1,2,4,8"
        )


def _check_counts(counts: Sequence[int]) -> None:
    for count in counts:
        require(count >= 1, "num-processes", count, "give 1 or more")
    repeated = len(set(counts)) < len(counts)
    require(not repeated, "num-processes", ",".join(map(str, counts)), "give each number once")


def _given(options: object, names: Iterable[str]) -> dict[str, Any]:
    """The options among these that were given; a flag that was not is False."""
    values = {name: getattr(options, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value is not False and value not in ((), Parallel())
    }


def _start(options: RunOptions) -> Suite:
    if options.suite is not None:
        for name, value in _given(options, ("models", "precisions")).items():
            given = ",".join(value)
            raise ConfigError(f"{name}: {given!r}: a suite brings its own; leave out one of them")
        return get_suite(options.suite)
    if not options.models:
        raise ConfigError("suite: none given: name one (see bench list) or give --models")
    remedy = "is for the cells of a suite; name one, or leave it out"
    require(not options.only, "only", ",".join(options.only), remedy)
    cells = grid(options.models, options.precisions or ("fp32",))
    return Suite(
        name="custom",
        description="cells given on the command line",
        plans=(Plan(protocol=Protocol(inference_iterations=P99_BATCHES), cells=cells),),
    )


RESUME_EXCLUDES = (
    *("suite", "only", "models", "precisions"),
    *(name for name in CELL_OPTIONS if name != "timeout"),
)
"""The options that would change what the run to resume measures; a time limit does not."""


def check_resume(options: object, excluded: Iterable[str] = RESUME_EXCLUDES) -> None:
    """Refuse options that would change the run to resume.

    Raises:
        ConfigError: one of them is given as well.
    """
    for name, value in _given(options, excluded).items():
        option, shown = _as_given(name, value)
        raise ConfigError(
            f"{option}: {shown}: not with --resume, which does what the run was started for; "
            "leave it out"
        )


def _as_given(name: str, value: Any) -> tuple[str, object]:
    """An option's name and value as on the command line; the first of an exchange's options."""
    if isinstance(value, Parallel):
        (name, *_) = value.changed
        value = getattr(value, name)
    return option_name(name), ",".join(map(str, value)) if isinstance(value, tuple) else value


def runs_folder(runs_dir: str) -> Path:
    """Where runs are kept, as the one absolute path without links that processes are marked by.

    Raises:
        UserError: it names a user that does not exist, or a file.
    """
    folder = user_path(runs_dir, "runs-dir").resolve()
    if is_file(folder, "runs-dir"):
        raise UserError(f"runs-dir: {str(folder)!r}: is a file; give a folder")
    return folder
