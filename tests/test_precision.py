import contextlib
from typing import Any

import pytest
import torch
from training import make_trainer

from cifar import precision as precisions
from cifar.errors import ConfigError, UnsupportedError
from cifar.precision import (
    allow_tf32,
    check_compile_mode,
    check_supported,
    is_emulated,
    is_native,
    resolve_precision,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "launched", "precision"),
    [
        (None, "no", "fp32"),
        (None, "bf16", "bf16"),
        (None, "fp16", "fp16"),
        ("bf16", "no", "bf16"),
        ("tf32", "no", "tf32"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_the_precision_is_the_programs_or_else_the_launchers(
    asked: str | None, launched: str, precision: str
) -> None:
    assert resolve_precision(asked, launched) == precision


@pytest.mark.parametrize(("asked", "launched"), [("fp32", "bf16"), ("bf16", "fp16")])
def test_two_precisions_are_a_conflict(asked: str, launched: str) -> None:
    with pytest.raises(ConfigError, match=f"precision: '{asked}'.*{launched}"):
        resolve_precision(asked, launched)


def test_fp8_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="mixed_precision: 'fp8'"):
        resolve_precision(None, "fp8")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_cpu_refuses_what_it_would_compute_in_fp32(precision: str) -> None:
    with pytest.raises(UnsupportedError, match=precision):
        check_supported(precision, CPU)
    with pytest.raises(UnsupportedError, match=precision):
        make_trainer(precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_supports_the_others(precision: str) -> None:
    check_supported(precision, CPU)


@pytest.mark.parametrize(
    ("device", "precision", "setting", "refused"),
    [
        ("cpu", "fp32", "ONEDNN_DEFAULT_FPMATH_MODE=BF16", True),
        ("cpu", "bf16", "DNNL_DEFAULT_FPMATH_MODE=any", True),
        ("cpu", "fp32", "ONEDNN_DEFAULT_FPMATH_MODE=STRICT", False),
        ("cpu", "fp32", "NVIDIA_TF32_OVERRIDE=1", False),
        ("cuda", "fp32", "NVIDIA_TF32_OVERRIDE=1", True),
        ("cuda", "bf16", "NVIDIA_TF32_OVERRIDE=1", True),
        ("cuda", "tf32", "NVIDIA_TF32_OVERRIDE=0", True),
        ("cuda", "fp32", "NVIDIA_TF32_OVERRIDE=0", False),
        ("cuda", "tf32", "NVIDIA_TF32_OVERRIDE=1", False),
        ("cuda", "fp32", "NVIDIA_TF32_OVERRIDE=", False),
        ("cuda", "fp32", "ONEDNN_DEFAULT_FPMATH_MODE=BF16", False),
    ],
)
def test_a_variable_that_would_change_the_precision_unseen_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    precision: str,
    setting: str,
    refused: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setenv(*setting.split("="))
    raises = pytest.raises(UnsupportedError, match=f"precision: '{precision}': {setting}")
    with raises if refused else contextlib.nullcontext():
        check_supported(precision, torch.device(device))


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compile_modes_that_a_cpu_has_pass(mode: str) -> None:
    check_compile_mode(mode, CPU)


def test_a_mode_that_means_cuda_graphs_is_unsupported_on_a_cpu() -> None:
    """Inductor would leave them out without a word."""
    with pytest.raises(UnsupportedError, match=r"compile-mode: 'reduce-overhead': .* use default"):
        make_trainer(compile=True, compile_mode="reduce-overhead")
    check_compile_mode("reduce-overhead", torch.device("cuda"))


@pytest.mark.parametrize(("allowed", "numbers"), [(True, "tf32"), (False, "ieee")])
def test_every_switch_says_the_same_of_tf32(allowed: bool, numbers: str) -> None:
    """Inductor's templates read `cudnn.fp32_precision`, its other kernels the legacy switches."""
    allow_tf32(not allowed)
    allow_tf32(allowed)
    cudnn: Any = torch.backends.cudnn
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    assert cudnn.fp32_precision == cudnn.conv.fp32_precision == numbers
    allow_tf32(False)


@pytest.mark.parametrize(
    ("machine", "kernels", "instructions", "native"),
    [
        ("x86_64", False, (False, False), False),
        ("x86_64", True, (False, False), False),
        ("x86_64", True, (True, False), True),
        ("x86_64", True, (False, True), True),
        ("aarch64", True, (False, False), True),
        ("aarch64", False, (False, False), False),
    ],
)
def test_kernels_are_not_yet_instructions(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    kernels: bool,
    instructions: tuple[bool, bool],
    native: bool,
) -> None:
    """oneDNN has bf16 kernels for AVX-512 without bf16, which convert; only they are enough to run.

    On an x86 alone are kernels without instructions.
    """
    avx512_bf16, amx = instructions
    monkeypatch.setattr(precisions.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert is_native("bf16", CPU) == native
    assert is_emulated("bf16", CPU) == (not kernels)
    assert is_native("fp32", CPU)
