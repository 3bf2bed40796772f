"""What a device can compute a precision with, and refusing what would quietly be another one."""

import os
import platform
from collections.abc import Mapping

import torch

from cifar.config import PRECISIONS
from cifar.errors import ConfigError, UnsupportedError

_NAMED = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's `--mixed_precision` words and the precision that each means here."""

_STRICT = ("", "strict")
"""Values of oneDNN's default math mode that leave fp32 alone."""


def allow_tf32(allowed: bool) -> None:
    """Let fp32 matrix products and convolutions of a GPU compute in TensorFloat-32, or not.

    Inductor in torch 2.11-2.15 reads the legacy switches for most kernels and `fp32_precision` of
    all of cuDNN for its convolution templates; the legacy ones leave that unset.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.fp32_precision = "tf32" if allowed else "ieee"


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
