"""Starting Accelerate, and refusing what it would quietly turn into something else."""

import contextlib
import dataclasses
import functools
import os
import platform
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
from cifar.ranks import check_rendezvous, local_rank, local_world_size, world_size
from cifar.strategy import Strategy, check_settings, check_suits, launched_strategy

_NAMED = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's `--mixed_precision` words and the precision that each means here."""

_STRICT = ("", "strict")
"""Values of oneDNN's default math mode that leave fp32 alone."""


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
    told = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(told)


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
    told = environ.get("ACCELERATE_USE_CPU", "false")
    try:
        return bool(str_to_bool(told))
    except ValueError:
        raise ConfigError(f"ACCELERATE_USE_CPU: {told!r}: give true or false") from None


def allow_tf32(allowed: bool) -> None:
    """Let fp32 matrix products and convolutions of a GPU compute in TensorFloat-32, or not.

    Inductor in torch 2.11-2.15 reads the legacy switches for most kernels and `fp32_precision` of
    all of cuDNN for its convolution templates; the legacy ones leave that unset.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.fp32_precision = "tf32" if allowed else "ieee"


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


def resolve_precision(asked: str | None, launched: str) -> str:
    """The precision to train in, from `--precision` and Accelerate's `--mixed_precision`.

    Accelerate says "no" when nothing was asked of it, so only its other words can contradict.

    Raises:
        ConfigError: both are given and differ.
        UnsupportedError: Accelerate was launched in a precision that this program lacks (fp8).
    """
    if launched not in _NAMED:
        raise UnsupportedError(
            f"mixed_precision: {launched!r}: not supported; choose one of {', '.join(_NAMED)}"
        )
    if asked is not None and launched != "no" and asked != _NAMED[launched]:
        raise ConfigError(
            f"precision: {asked!r}: accelerate was launched with --mixed_precision {launched}; "
            "give only one of them"
        )
    return asked or _NAMED[launched]


def check_supported(name: str, device: torch.device) -> None:
    """Raise an UnsupportedError if this precision would quietly run as another one."""
    if device.type == "cpu" and name == "fp16":
        raise UnsupportedError(
            "precision: 'fp16': Accelerate on a CPU computes fp32 instead; use fp32 or bf16"
        )
    if device.type == "cpu" and name == "tf32":
        raise UnsupportedError("precision: 'tf32': a CPU has no TensorFloat-32 units; use fp32")
    if device.type == "cuda" and name == "tf32" and torch.cuda.get_device_capability() < (8, 0):
        raise UnsupportedError(
            "precision: 'tf32': this GPU has no TensorFloat-32 units (Ampere or newer); use fp32"
        )
    _check_overrides(name, device, os.environ)


def _check_overrides(name: str, device: torch.device, environ: Mapping[str, str]) -> None:
    """Raise an UnsupportedError for a variable that changes the format beneath torch's switches.

    NVIDIA's libraries obey theirs whatever the program asks for; oneDNN computes fp32 convolutions
    in the format that its default math mode names
    (https://uxlfoundation.github.io/oneDNN/dev_guide_attributes_fpmath_mode.html).
    """
    if device.type == "cuda":
        tf32 = {"0": False, "1": True}.get(environ.get("NVIDIA_TF32_OVERRIDE", ""))
        contradicting = (
            ["NVIDIA_TF32_OVERRIDE"] if tf32 not in (None, PRECISIONS[name].tf32) else []
        )
    else:
        modes = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
        contradicting = [mode for mode in modes if environ.get(mode, "").lower() not in _STRICT]
    for variable in contradicting:
        raise UnsupportedError(
            f"precision: {name!r}: {variable}={environ[variable]} in the environment makes it "
            f"another one; unset {variable}"
        )


def check_compile_mode(mode: str, device: torch.device) -> None:
    """Raise an UnsupportedError if torch.compile would quietly run another mode than this one."""
    if device.type == "cpu" and mode == "reduce-overhead":
        raise UnsupportedError(
            "compile-mode: 'reduce-overhead': a CPU has no CUDA graphs, which it stands for; use "
            "default or max-autotune"
        )


def is_emulated(name: str, device: torch.device) -> bool:
    """Whether the device lacks even kernels for the precision.

    A CPU without AVX-512 has no bf16 convolutions in oneDNN: torch then takes a reference path that
    is 10 to 20 times slower than fp32, which `cifar.emulation` avoids.
    """
    if name != "bf16":
        return False
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulation_of(name: str, device: torch.device) -> str:
    """What is said of a precision that the device emulates, "" of any other."""
    if not is_emulated(name, device):
        return ""
    return (
        f"precision: '{name}': this {device.type.upper()} has no {name} kernels and emulates them: "
        "the same rounding, not the speed"
    )


def shortfall_of(name: str, device: torch.device) -> str:
    """What is said of a precision whose speed is not that of its format here, "" of any other."""
    if told := emulation_of(name, device):
        return told
    if is_native(name, device):
        return ""
    return (
        f"precision: '{name}': this {device.type.upper()} has no {name} instructions; its kernels "
        "convert to fp32 and back"
    )


def is_native(name: str, device: torch.device) -> bool:
    """Whether the device has instructions for the precision's number format.

    A CPU with AVX-512 but without its bf16 or matrix extensions (AMX) has none, yet oneDNN has
    kernels for it, which convert to fp32 and back
    (https://uxlfoundation.github.io/oneDNN/dev_guide_data_types.html).
    """
    if name != "bf16" or device.type == "cuda":
        return not is_emulated(name, device)
    if is_emulated(name, device):
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # elsewhere oneDNN's kernels need the instructions
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
