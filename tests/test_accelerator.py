import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from training import make_trainer, tiny_recipe

from cifar import accelerator
from cifar.accelerator import (
    allow_tf32,
    check_compile_mode,
    check_devices,
    check_launch,
    check_processes,
    check_supported,
    is_emulated,
    is_native,
    resolve_precision,
)
from cifar.errors import ConfigError, UnsupportedError

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


def test_the_launchers_precision_is_trained_in_and_noted() -> None:
    with mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION="bf16"):
        trainer = make_trainer()
    assert trainer.config.precision == "bf16"
    assert trainer.accelerator.mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "--accumulation"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON_LM"),
    ],
)
def test_launcher_settings_that_would_change_the_training_are_refused(
    name: str, value: str, named: str
) -> None:
    with mock.patch.dict(os.environ, {name: value}), pytest.raises(UnsupportedError, match=named):
        make_trainer()


def test_a_launchers_setting_that_is_neither_yes_nor_no_is_refused() -> None:
    told = pytest.raises(ConfigError, match=r"^ACCELERATE_USE_CPU: 'maybe': give true or false$")
    with mock.patch.dict(os.environ, ACCELERATE_USE_CPU="maybe"), told:
        make_trainer()


def test_the_launchers_neutral_settings_pass() -> None:
    check_launch(
        {
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "ACCELERATE_USE_FSDP": "false",
        }
    )


@pytest.mark.parametrize(
    ("running", "world_size", "expected"),
    [(1, "1", None), (1, None, None), (1, "1", 1), (4, "4", None), (4, "4", 4)],
)
def test_as_many_processes_as_asked_pass(
    running: int, world_size: str | None, expected: int | None
) -> None:
    with mock.patch.dict(os.environ, {} if world_size is None else {"WORLD_SIZE": world_size}):
        check_processes(SimpleNamespace(num_processes=running), expected)


@pytest.mark.parametrize(
    ("running", "world_size", "expected"),
    [(1, "1", 3), (1, None, 2), (1, "2", None), (1, "2", 2), (1, "2", 1), (2, "2", 1)],
)
def test_another_number_of_processes_is_refused(
    running: int, world_size: str | None, expected: int | None
) -> None:
    environment = {} if world_size is None else {"WORLD_SIZE": world_size}
    with (
        mock.patch.dict(os.environ, environment),
        pytest.raises(ConfigError, match=f"num-processes: .*{running} run together"),
    ):
        check_processes(SimpleNamespace(num_processes=running), expected)


@pytest.mark.parametrize(
    ("environment", "gpus", "refused"),
    [
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "3"}, 2, True),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}, 2, False),
        ({"LOCAL_WORLD_SIZE": "3"}, 1, False),
        ({}, 1, False),
    ],
)
def test_more_processes_than_gpus_are_refused_before_nccl_meets_them(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: int, refused: bool
) -> None:
    """But for launchers that may show each its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    raises = pytest.raises(ConfigError, match=r"num-processes: 3: this machine has 2 GPU\(s\)")
    with raises if refused else contextlib.nullcontext():
        check_devices(environment)


@pytest.mark.parametrize(("number", "gpus", "refused"), [(1, 2, False), (2, 2, True), (3, 1, True)])
def test_a_process_without_a_gpu_of_its_number_is_refused(
    number: int, gpus: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of a launcher that shows every process one GPU, and numbers them all the same."""
    environment = {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "8"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    raises = pytest.raises(ConfigError, match=rf"^LOCAL_RANK: '{number}': this process sees {gpus}")
    with raises if refused else contextlib.nullcontext():
        check_devices(environment)


def test_compile_without_a_compiler_is_unsupported(tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, PATH=str(tmp_path)):
        os.environ.pop("CXX", None)
        with pytest.raises(UnsupportedError, match=r"compile: .*compiler"):
            make_trainer(compile=True)


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compile_modes_that_a_cpu_has_pass(mode: str) -> None:
    check_compile_mode(mode, CPU)


def test_a_mode_that_means_cuda_graphs_is_unsupported_on_a_cpu() -> None:
    """Inductor would leave them out without a word."""
    with pytest.raises(UnsupportedError, match=r"compile-mode: 'reduce-overhead': .* use default"):
        make_trainer(compile=True, compile_mode="reduce-overhead")
    check_compile_mode("reduce-overhead", torch.device("cuda"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tf32_is_off_unless_asked_for(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    make_trainer(tiny_recipe(), precision=precision)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


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
    monkeypatch.setattr(accelerator.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert is_native("bf16", CPU) == native
    assert is_emulated("bf16", CPU) == (not kernels)
    assert is_native("fp32", CPU)
