"""FSDP2 and ZeRO, in two processes by gloo: what they learn, and what their checkpoints hold."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from engines import (
    KEPT,
    ON_GPU,
    PROCESSES,
    STEPS,
    SUBJECTS,
    build,
    everything,
    losses,
    resumed,
    save_state,
)
from safetensors.torch import load_file
from torch import Tensor
from training import ROOT, TINY_OPTIONS, cifar, complaints, finish, reset_accelerate, start

from bench.environment import collect
from bench.judge import WRAPPERS
from cifar.config import ModelConfig, Recipe, RunConfig, TrainConfig
from cifar.data.config import parse_data
from cifar.data.sources import load_dataset
from cifar.errors import UnsupportedError
from cifar.strategy import STRATEGIES, Strategy, check_settings, check_suits
from cifar.trainer import Trainer
from cifar.zero import import_deepspeed, zero_config

ENGINES: dict[str, dict[str, str]] = {
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        }
        for stage in (1, 2, 3)
    },
}
"""What a launcher says in the environment."""
ONLY_FSDP = ("sam", "muon", "frozen", "fp16", "compiled")
ONCE = ("aside", "straight", "again", "other")
"""What `engines.main` finds besides: after a step that was undone, and of checkpoints."""


def torchrun(strategy: str, processes: int, *words: object) -> "subprocess.Popen[str]":
    here = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return start("torch.distributed.run", "--standalone", "--nproc_per_node", processes, *words,
                 environment={**here, **ENGINES.get(strategy, {})})  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """What one process learns from the parts of every batch, and its checkpoint."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name, (recipe, fields) in SUBJECTS.items():
        trainer = build(recipe, PROCESSES, **fields)
        found[name] = everything(trainer, losses(trainer, STEPS))
        if name == KEPT:
            save_state(folder / "checkpoint", trainer)
            found["straight"] = found["other"] = everything(trainer, losses(trainer, 1))
    return folder, found


def comparable(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without BatchNorm's statistics: one process takes them of all parts of a batch."""
    return {k: v for k, v in found.items() if "running" not in k and "batches" not in k}


def assert_alike(mine: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert mine.keys() == theirs.keys(), what
    tolerance = {"bf16": 2e-2, "fp16": 2e-2, "sam": 1e-4}.get(what, 1e-3 if ON_GPU else 1e-5)
    torch.testing.assert_close(mine["losses"], theirs["losses"], rtol=tolerance, atol=0.0)
    for name, tensor in comparable(theirs).items():
        apart = (mine[name].double() - tensor.double()).norm()
        assert apart <= 300 * tolerance * (tensor.double().norm() + 1e-2), f"{what}: {name}"


def check_seen(strategy: str, seen: dict[str, Any]) -> None:
    """The suite observes the engine, its shares and bf16 below it, and measures whole weights."""
    whole = build("plain")
    count = sum(each.numel() for each in whole.module.parameters())
    assert seen["param_count"] == count and seen["checkpoint_bytes"] > 4 * count
    assert seen["statuses"] == ["ok"] and seen["inference_latency"] > 0
    assert seen["wrapper"] == WRAPPERS[strategy]
    assert seen["num_processes"] == seen["devices"] == PROCESSES
    assert seen["backend"] == ("nccl" if ON_GPU else "gloo")
    share = pytest.approx(1 / PROCESSES, abs=0.1)
    assert seen["weights_updated"] == share
    assert seen["weights_held"] == (share if strategy in ("fsdp", "zero3") else 1.0)
    assert (seen["autocast"], seen["parameter_dtype"]) == ("bfloat16", "float32")
    assert seen["weight_channels_last"] is False
    skips = "gradient: not finite, so that DeepSpeed skipped a step"
    assert seen["overflow"].startswith(skips if strategy.startswith("zero") else "nothing")


def check_engine(
    strategy: str, alone: tuple[Path, dict[str, dict[str, Tensor]]], ours: Path
) -> None:
    """What it learns, that all processes know it, and that anyone goes on from its checkpoint."""
    folder, expected = alone
    code, _, err = finish(torchrun(strategy, PROCESSES, "-m", "engines", folder, ours))
    names = {file.name.rpartition("-")[0] for file in ours.glob("*.safetensors")}
    left_out = set(ONLY_FSDP if strategy.startswith("zero") else ()) & set(SUBJECTS)
    assert names == {*SUBJECTS, *ONCE} - left_out, err
    assert code == 0, err
    found = {
        name: [load_file(ours / f"{name}-{rank}.safetensors") for rank in range(PROCESSES)]
        for name in names
    }
    for name, (first, *others) in found.items():
        for other in others:
            shared = comparable(first)
            assert all(torch.equal(other[each], shared[each]) for each in shared), name
        if name in expected:
            assert_alike(first, expected[name], name)
    before, after = found[KEPT][0], found["aside"][0]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again, straight = (comparable(found[name][0]) for name in ("again", "straight"))
    if ON_GPU:  # whose kernels may add up in another order
        assert_alike(again, straight, "again")
    else:
        assert all(torch.equal(again[name], tensor) for name, tensor in straight.items())
    check_seen(strategy, json.loads((ours / "seen.json").read_text()))
    trainer = resumed(ours / "checkpoint", PROCESSES)
    assert_alike(everything(trainer, losses(trainer, 1)), expected["straight"], "resumed alone")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2")),
        "zero3",  # which shares out what they do, and the weights
    ],
)
def test_two_processes_of_an_engine_learn_what_one_does_and_take_up_each_others_checkpoints(
    strategy: str, alone: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """One process by accumulation, so that BatchNorm normalises by the same halves."""
    check_engine(strategy, alone, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ENGINES)
def test_an_engine_learns_on_gpus_what_one_process_does(
    strategy: str, alone: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """On two where there are two, else in a group of one process."""
    check_engine(strategy, alone, tmp_path)


def test_every_recipe_of_these_learns_something_of_its_own(
    alone: tuple[Path, dict[str, dict[str, Tensor]]],
) -> None:
    """Or it would not be seen to work."""
    _, found = alone
    trainer = build("plain", PROCESSES)
    plain = losses(trainer, STEPS)
    for name in set(SUBJECTS) - {"compiled"}:
        assert (found[name]["losses"] - plain).abs().max() > 1e-3, name


REAL = """
import json, sys
from test_engines import real_losses
from cifar.distributed import leave
import os
found = real_losses(sys.argv[1], 1)
if os.environ["RANK"] == "0":
    print("LOSSES", json.dumps(found), flush=True)
leave()
"""


def real_losses(folder: str, parts: int) -> list[float]:
    """Of the first 20 steps of resnet20 on CIFAR-10.

    The recipe's factors are powers of two, products with which are exact. With others torch's fused
    SGD rounds what it computes as a vector (with fused multiply-adds) and the tail of a tensor
    differently, tails are elsewhere in a share, and 20 steps make 1e-4 of the loss out of that.
    """
    reset_accelerate()
    config = TrainConfig(
        model=ModelConfig(name="resnet20"),
        recipe=Recipe(lr=2**-4, momentum=0.5, weight_decay=2**-11, schedule="constant"),
        data=parse_data(f"cifar10:{folder}"),
        limit_train=5120,
        accumulation_steps=parts,
    )
    trainer = Trainer(config, RunConfig(cpu=True), load_dataset(config.data))
    found: list[float] = losses(trainer, 20).tolist()
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_have_the_losses_of_one_on_real_images(
    cifar_data: Path, tmp_path: Path
) -> None:
    """The first 20 steps in fp32, to 1e-5: of the same samples, normalised by halves."""
    alone = real_losses(str(cifar_data), 2)
    script = tmp_path / "real.py"
    script.write_text(REAL)
    for strategy in STRATEGIES:
        _, out, err = finish(torchrun(strategy, 2, script, cifar_data))
        (told,) = [line for line in out.splitlines() if line.startswith("LOSSES ")] or [err]
        found = json.loads(told.removeprefix("LOSSES "))
        apart = max(abs(a / b - 1) for a, b in zip(found, alone, strict=True))
        print(f"{strategy}: losses differ by at most {apart:.1e}")
        assert apart <= 1e-5, strategy


@pytest.mark.parametrize(
    ("strategy", "fields", "told"),
    [
        ("fsdp", {"channels_last": True}, "channels-last: True: not with fsdp"),
        ("zero1", {"channels_last": True}, "channels-last: True: not with zero1"),
        ("zero2", {"recipe": Recipe(optimizer="muon")}, "optimizer: 'muon': not with zero2"),
        ("zero3", {"recipe": Recipe(sam_rho=0.1)}, "sam-rho: 0.1: not with zero3"),
        ("zero1", {"recipe": Recipe(frozen_epochs=1)}, "frozen-epochs: 1: not with zero1"),
        ("zero2", {"precision": "fp16"}, "precision: 'fp16': not with zero2"),
        ("zero3", {"compile": True}, "compile: True: not with zero3"),
        (
            "fsdp",
            {"compile": True, "compile_mode": "reduce-overhead"},
            "compile-mode: 'reduce-overhead': not with fsdp",
        ),
    ],
)
def test_what_an_engine_would_leave_out_is_refused(
    strategy: Strategy, fields: dict[str, Any], told: str
) -> None:
    config = TrainConfig(**fields)
    with pytest.raises(UnsupportedError, match=f"^{told}.* launch with "):
        check_suits(strategy, config, config.precision or "fp32")
    check_suits("ddp", config, config.precision or "fp32")


@pytest.mark.parametrize("recipe", [{"optimizer": "muon"}, {"sam_rho": 0.1}, {"frozen_epochs": 1}])
def test_fsdp_has_what_zero_lacks(recipe: dict[str, Any]) -> None:
    check_suits("fsdp", TrainConfig(recipe=Recipe(**recipe)), "fp16")


@pytest.mark.parametrize(
    ("strategy", "setting"),
    [
        ("fsdp", "FSDP_VERSION=1"),
        ("fsdp", "FSDP_OFFLOAD_PARAMS=true"),
        ("zero2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu"),
        ("zero3", "ACCELERATE_DEEPSPEED_CONFIG_FILE=mine.json"),
        ("zero1", "ACCELERATE_GRADIENT_CLIPPING=1.0"),
    ],
)
def test_a_setting_that_would_not_be_followed_is_refused(strategy: str, setting: str) -> None:
    name, _, value = setting.partition("=")
    environ = {**ENGINES[strategy], name: value}
    with pytest.raises(UnsupportedError, match=f"^{name}: '{value}': not supported; .*{strategy}"):
        check_settings(environ)
    check_settings({name: value})  # another engine's


def test_an_engine_without_a_group_of_processes_is_one_line(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.dict(os.environ, ENGINES["fsdp"]):
        assert cifar("train", "--cpu", "--data", f"npz:{npz}", "--output-dir", tmp_path / "a",
                     *TINY_OPTIONS) == 2  # fmt: skip
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith("cifar: LOCAL_RANK: not set: fsdp needs a group of processes")


def test_an_engine_that_does_not_suit_the_recipe_is_one_line(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.dict(os.environ, ENGINES["zero2"]):
        assert cifar("train", "--cpu", "--data", f"npz:{npz}", "--output-dir", tmp_path / "a",
                     *TINY_OPTIONS, "--optimizer", "muon") == 2  # fmt: skip
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith("cifar: optimizer: 'muon': not with zero2")
    assert not (tmp_path / "a").exists()


def test_deepspeed_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UnsupportedError, match=r"'zero2': .* install cifar-resnet-bench\[deepspeed"
    ):
        import_deepspeed("zero2", torch.device("cpu"))


@pytest.mark.parametrize(
    ("elements", "buckets"),
    [(269_723, (269_724, 269_724, 269_724)), (2 * 10**9, (5 * 10**8, 5 * 10**8, 5 * 10**7))],
)
def test_buckets_are_no_larger_than_a_network_fills(
    elements: int, buckets: tuple[int, int, int]
) -> None:
    """DeepSpeed allocates them whole: 2 GB in every process, whatever the network."""
    found = zero_config(TrainConfig(), 2, 1, elements)["zero_optimization"]
    names = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    assert tuple(found[name] for name in names) == buckets


def test_the_default_sizes_of_buckets_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    default, found = DeepSpeedZeroConfig(), zero_config(TrainConfig(), 3, 1, 2**40)
    asked = DeepSpeedZeroConfig(**found["zero_optimization"])
    for name in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"):
        assert getattr(asked, name) == getattr(default, name)


ENDED = """
import atexit, sys, types
from cifar.process import run_to_end
atexit.register(print, "by way of the interpreter")
if sys.argv[1] == "zero":
    sys.modules["cifar.zero"] = types.ModuleType("zero")
if sys.argv[1] == "group":
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def work():
    if len(sys.argv) > 2:
        raise ValueError("broken")
    print("done")
    return 3

sys.exit(run_to_end(work))
"""


@pytest.mark.parametrize(
    ("words", "code", "out", "last"),
    [
        (["zero"], 3, "done\n", ""),
        (["group"], 3, "done\n", ""),
        (["none"], 3, "done\nby way of the interpreter\n", ""),
        (["group", "broken"], 1, "", "ValueError: broken\n"),
        (["none", "broken"], 1, "by way of the interpreter\n", "ValueError: broken\n"),
    ],
)
def test_a_process_that_has_not_left_its_group_ends_without_taking_it_down(
    words: list[str], code: int, out: str, last: str
) -> None:
    """With its own exit code, and all that it has printed."""
    found, printed, told = finish(start("-c", ENDED, *words, module=False))
    assert (found, printed) == (code, out)
    assert told.endswith(last) and ("Traceback" in told) == bool(last)


LIMITED = """
from datetime import timedelta
import torch
import torch.distributed as dist
from cifar.distributed import limit_collectives
cpu = torch.device("cpu")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1,
                        timeout=timedelta(seconds=77))
group = dist.new_group([0])
print(group._get_backend(cpu).options._timeout)
limit_collectives(group, cpu)
print(group._get_backend(cpu).options._timeout)
"""


def test_a_library_s_group_waits_as_long_as_ours() -> None:
    assert finish(start("-c", LIMITED, module=False)) == (0, "0:30:00\n0:01:17\n", "")


def test_a_record_names_the_installed_deepspeed() -> None:
    """Of whatever engine, so that what a run has is told from what it lacks by one environment."""
    assert collect().tools["deepspeed"] == importlib.metadata.version("deepspeed")
