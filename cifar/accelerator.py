"""Starting Accelerate, and refusing what it would quietly turn into something else."""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, str_to_bool
from torch import nn

from cifar.agreement import told
from cifar.compilers import check_compiler
from cifar.config import PRECISIONS, RunConfig, TrainConfig
from cifar.distributed import join_group
from cifar.errors import ConfigError, UnsupportedError
from cifar.precision import (
    allow_tf32,
    check_compile_mode,
    check_supported,
    resolve_precision,
)
from cifar.ranks import check_rendezvous, local_rank, local_world_size, world_size
from cifar.strategy import Strategy, check_settings, check_suits, launched_strategy


def start_accelerator(config: TrainConfig, run: RunConfig) -> tuple[Accelerator, str, Strategy]:
    """The Accelerator of this process, the precision to train in, and the strategy launched.

    Raises:
        ConfigError: the precision contradicts Accelerate's, or another number of processes runs
            than was asked for or than there are GPUs for, or they could not find each other.
        UnsupportedError: this device or stack cannot run the precision or compile, the strategy not
            the recipe, or Accelerate was launched with an engine or setting that this program does
            not have.
    """
    name, strategy = meet(config, run)
    precision = PRECISIONS[name]
    allow_tf32(precision.tf32)
    torch.backends.cudnn.benchmark = True  # sizes are few and fixed; a CPU has no use for it
    with _engines_hidden():
        accelerator = Accelerator(
            cpu=runs_on_cpu(run),
            mixed_precision=precision.mixed_precision,
            kwargs_handlers=[
                # Buffers are made equal before they are saved or evaluated, not at every step.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    bucket_cap_mb=config.parallel.bucket_mib,
                )
            ],
        )
    assert accelerator.mixed_precision == precision.mixed_precision
    check_processes(accelerator, run.num_processes, strategy)
    return accelerator, name, strategy


@contextlib.contextmanager
def _engines_hidden() -> Iterator[None]:
    """Let Accelerate form a group of processes and nothing else, whatever engine was launched.

    It would have CPUs do without FSDP, and weights in bf16 with DeepSpeed: see `cifar.fsdp` and
    `cifar.zero`, which start their engines themselves.
    """
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def autocast_module(accelerator: Accelerator, module: nn.Module, precision: str) -> nn.Module:
    """A module whose `forward` runs in Accelerate's autocast, without anything else around it."""
    if PRECISIONS[precision].autocast is None:
        return module
    prepared: nn.Module = accelerator.prepare_model(
        module, device_placement=False, evaluation_mode=True
    )
    return prepared


def meet(config: TrainConfig, run: RunConfig, **others: object) -> tuple[str, Strategy]:
    """Check what can be without images, and form the group of the job's processes.

    `Accelerator()` then uses it. `others` are what else all of them must have been told alike, by
    the options' names. Returns the precision to train in and the strategy that was launched.
    Raises as `start_accelerator`; if a group exists it stays.
    """
    check_launch(os.environ)
    strategy = launched_strategy(os.environ)
    name = resolve_precision(config.precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    device = torch.device("cpu" if runs_on_cpu(run) else "cuda")
    check_supported(name, device)
    check_suits(strategy, config, name)
    if config.compile:
        check_compile_mode(config.compile_mode, device)
        check_compiler(device.type)
    check_grouped(strategy, os.environ)
    resolved = dataclasses.replace(config, precision=name)  # type: ignore[arg-type]
    join_job(resolved, run, strategy=strategy, **others)
    return name, strategy


def join_job(config: TrainConfig | None, run: RunConfig, **others: object) -> None:
    """Form the group of processes that were told alike, see `cifar.agreement.told`.

    Raises:
        ConfigError: there are fewer GPUs than processes, or they could not find each other, or were
            told otherwise.
    """
    cpu = runs_on_cpu(run)
    if not cpu:
        check_devices(os.environ)
    check_rendezvous(os.environ, cpu=cpu)
    backend = "gloo" if cpu else "nccl"
    join_group(backend, run, functools.partial(told, config, run, backend=backend, **others))


def runs_on_cpu(run: RunConfig) -> bool:
    """Whether to train on the CPU: as told, or for want of a GPU; raises as `launched_on_cpu`."""
    return launched_on_cpu(os.environ) or run.cpu or not torch.cuda.is_available()


def wrap_module(accelerator: Accelerator, module: nn.Module, precision: str) -> Any:
    """A module in what Accelerate puts around it: autocast, and DDP for several processes.

    It may have been wrapped before; that is undone.
    """
    if accelerator.num_processes == 1 and PRECISIONS[precision].autocast is None:
        return module  # nothing; to find that out it would import sharded tensors for 1 s
    accelerator._models.clear()  # of a wrapper before
    for name in ("forward", "_original_forward"):  # Accelerate's, made anew
        vars(module).pop(name, None)
    with warnings.catch_warnings():
        # torch 2.15 renames the option, Accelerate knows the old name alone
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
        return accelerator.prepare_model(module)


def launched_on_cpu(environ: Mapping[str, str]) -> bool:
    """Whether Accelerate was told to leave GPUs alone.

    Raises:
        ConfigError: what it was told is neither yes nor no.
    """
    value = environ.get("ACCELERATE_USE_CPU", "false")
    try:
        return bool(str_to_bool(value))
    except ValueError:
        raise ConfigError(f"ACCELERATE_USE_CPU: {value!r}: give true or false") from None


def check_launch(environ: Mapping[str, str]) -> None:
    """Raise an UnsupportedError for launcher settings that would change the training unseen."""
    for name, neutral, option in (
        ("DYNAMO_BACKEND", "no", "compile"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "accumulation"),
    ):
        value = environ.get(f"ACCELERATE_{name}", neutral)
        if value.lower() != neutral:
            raise UnsupportedError(
                f"{name.lower()}: {value!r}: accelerate was launched with it; leave it out and "
                f"give --{option} to this program"
            )
    check_settings(environ)


def check_devices(environ: Mapping[str, str]) -> None:
    """Raise a ConfigError if torchrun or Accelerate started more processes here than GPUs are seen,
    or if there is no GPU of this process's number.

    NCCL, Accelerate or DeepSpeed would end them with tracebacks. Other launchers may show every
    process its own GPU alone, which is number 0.
    """
    processes, count = local_world_size(environ), torch.cuda.device_count()
    if "TORCHELASTIC_RUN_ID" in environ and processes > count > 0:
        raise ConfigError(
            f"num-processes: {processes}: this machine has {count} GPU(s), and every process needs "
            "one; start at most that many on it, or give --cpu"
        )
    if local_rank(environ) >= count > 0:
        raise ConfigError(
            f"LOCAL_RANK: '{local_rank(environ)}': this process sees {count} GPU(s), numbered from "
            "0; give the number of one, 0 where every process sees its own alone, or give --cpu"
        )


def check_grouped(strategy: Strategy, environ: Mapping[str, str]) -> None:
    """Raise a ConfigError if an engine that works on a group of processes was given none."""
    if strategy != "ddp" and "LOCAL_RANK" not in environ:
        raise ConfigError(
            f"LOCAL_RANK: not set: {strategy} needs a group of processes, even of one; start with: "
            f"accelerate launch --config_file launch/{strategy}.yaml --num_processes 1 ..."
        )


def check_processes(
    accelerator: Accelerator, expected: int | None, strategy: Strategy = "ddp"
) -> None:
    """Raise a ConfigError unless as many processes run together as were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process without a word, and other
    mistakes start independent copies that each believe to be alone.
    """
    started = world_size(os.environ)
    running = accelerator.num_processes
    wanted = started if expected is None else expected
    if running != wanted or running != started:
        raise ConfigError(
            f"num-processes: {wanted}: {running} run together (WORLD_SIZE is {started}); start "
            f"with: accelerate launch --config_file launch/{strategy}.yaml --num_processes "
            f"{wanted} -m cifar train ..."
        )
