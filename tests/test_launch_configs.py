"""The Accelerate configurations in launch/: complete, documented, free of what a cell decides."""

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from training import TINY_OPTIONS, cifar, finish, metrics, start

from bench.launchers import config_for
from cifar.strategy import STRATEGIES

FOLDER = Path(__file__).parent.parent / "launch"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml"))
DECIDED_BY_THE_CELL = {"mixed_precision", "downcast_bf16", "bf16", "fp16", "num_processes"}


def keys(value: object) -> Iterator[str]:
    """All keys of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


def read(name: str) -> dict[str, object]:
    found = importlib.resources.files("launch") / name
    fields = yaml.safe_load(found.read_text(encoding="utf-8"))
    assert isinstance(fields, dict)
    return fields


def test_nested_keys_are_found():
    assert list(keys({"a": {"fp16": {}}, "b": 1})) == ["a", "fp16", "b"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_leaves_precision_and_process_count_to_the_cell(name):
    assert not DECIDED_BY_THE_CELL & set(keys(read(name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_accepts_a_configuration(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / name))
    assert config.distributed_type == read(name)["distributed_type"]


def test_every_configuration_has_a_launcher_and_the_other_way_round():
    named = {config_for(name, count) for name in STRATEGIES for count in (1, 2)}
    assert named == set(CONFIGS)


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_process_alone_gets_no_data_parallel_wrapper(name):
    assert read(config_for(name, 1))["distributed_type"] != "MULTI_GPU"


def test_every_file_is_described():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    scripts = [path.name for path in FOLDER.glob("*.sbatch")]
    assert not [name for name in (*CONFIGS, *scripts) if name not in text]


SLOW = {"ddp.yaml", "fsdp.yaml", "zero1.yaml", "zero2.yaml", "zero3.yaml"}
"""Their engines are started by other tests as well."""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS],
)
def test_a_configuration_starts_a_training_whose_weights_one_process_evaluates(
    name: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = 1 if name == "single.yaml" else 2
    launch = ("accelerate.commands.launch", "--config_file", FOLDER / name)
    options = ("--num_processes", processes, "--main_process_port", 0, "--mixed_precision", "no")
    run = tmp_path / "run"
    train = ("-m", "cifar", "train", "--cpu", "--num-processes", processes, *TINY_OPTIONS,
             "--epochs", 1, "--data", f"npz:{npz}", "--output-dir", run)  # fmt: skip
    strategy = name.removesuffix(".yaml")
    recipe = ("--recipe", "sgd") if strategy.startswith("zero") else ()  # the other one has Muon
    code, out, err = finish(start(*launch, *options, *train, *recipe))
    assert code == 0, err
    shared = strategy in STRATEGIES and strategy != "ddp"
    assert f"{processes} x cpu" + (f" under {strategy}," if shared else ",") in out, err
    capsys.readouterr()
    assert cifar("evaluate", run, "--cpu", "--data", f"npz:{npz}", "--json") == 0, err
    alone, last = json.loads(capsys.readouterr().out), metrics(run)[-1]
    assert last["test_samples"] == alone["samples"] == 50
    assert (last["test_top1"], last["test_top5"]) == (alone["top1"], alone["top5"])
    assert last["test_loss"] == pytest.approx(alone["loss"], rel=1e-5)
