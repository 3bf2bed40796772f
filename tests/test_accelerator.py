import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from training import make_trainer, tiny_recipe

from cifar.accelerator import (
    check_devices,
    check_launch,
    check_processes,
)
from cifar.errors import ConfigError, UnsupportedError

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tf32_is_off_unless_asked_for(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    make_trainer(tiny_recipe(), precision=precision)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
