"""What the processes of a training must have been told alike, and who says so if they were not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import make_dataset, save_npz
from training import TINY_OPTIONS, complaints, finish, free_port, start

from cifar import agreement, distributed
from cifar.agreement import first_difference, sources_digest, told
from cifar.config import ModelConfig, Parallel, Pretrained, Recipe, RunConfig, TrainConfig
from cifar.data.config import DataConfig
from cifar.errors import DataError

OF_A_RUN = ModelConfig(pretrained=Pretrained(sha256="a"))
ALONE = TrainConfig(model=OF_A_RUN)


@pytest.mark.parametrize(
    ("train", "run", "name"),
    [
        ({"recipe": Recipe(lr=0.2)}, {}, "lr"),
        ({"recipe": Recipe(global_batch_size=32)}, {}, "batch-size"),
        ({"model": ModelConfig(name="resnet20")}, {}, "model"),
        (
            {"model": ModelConfig(pretrained=Pretrained(sha256="a", classes=("x",)))},
            {},
            "pretrained",
        ),
        ({"parallel": Parallel(local_steps=2)}, {}, "local-steps"),
        ({"data": DataConfig(source="cifar10")}, {}, "data"),
        ({"seed": 1}, {}, "seed"),
        ({}, {"save_every": 5}, "save-every"),
        ({}, {"check_every": 5}, "check-every"),
        ({}, {"max_skipped_steps": 5}, "max-skipped-steps"),
    ],
)
def test_an_option_that_differs_is_named(
    train: dict[str, Any], run: dict[str, Any], name: str
) -> None:
    other = told(dataclasses.replace(ALONE, **train), RunConfig(**run))
    difference = first_difference(told(ALONE, RunConfig()), other)
    assert difference is not None and difference[0] == name


@pytest.mark.parametrize(
    ("train", "run"),
    [
        ({"data": DataConfig(root="/elsewhere")}, {}),
        ({"recipe": Recipe(name="mine")}, {}),
        ({"recipe": Recipe(muon_step=0.5)}, {}),  # which SGD does not read
        ({}, {"output_dir": "/elsewhere", "keep_checkpoints": 9}),
    ],
)
def test_what_changes_nothing_may_differ(train: dict[str, Any], run: dict[str, Any]) -> None:
    other = told(dataclasses.replace(ALONE, **train), RunConfig(**run))
    assert other == told(ALONE, RunConfig())


def test_engine_backend_and_software_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is trained."""
    here = told(None, RunConfig(), strategy="ddp", backend="nccl")
    assert first_difference(here, {**here, "strategy": "fsdp"}) == ("strategy", "ddp", "fsdp")
    monkeypatch.setattr(agreement, "version", lambda name: "0")
    assert first_difference(here, told(None, RunConfig(), strategy="ddp", backend="nccl")) == (
        "torch",
        here["torch"],
        "0",
    )


def test_a_change_of_a_source_is_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "ROOT", tmp_path)
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "a.py").write_text("a = 1")
    before = sources_digest(("cifar",), (".py",))
    (tmp_path / "cifar" / "notes.txt").write_text("nothing")
    (tmp_path / "cifar" / ".#a.py").symlink_to("me@here.4711")  # as an editor's lock
    assert sources_digest(("cifar",), (".py",)) == before
    (tmp_path / "cifar" / "a.py").write_text("a = 2")
    assert sources_digest(("cifar",), (".py",)) != before


def test_other_images_are_told_with_the_rank_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "gather_text", lambda text, device: ("a", "a", "b"))
    with pytest.raises(DataError, match=r"^data: fingerprint b: of the images of rank 2, but a of"):
        distributed.check_same_images("a", None)


def by_hand(port: int, rank: int, *words: object) -> Any:
    """One of two processes that are started on two machines, say."""
    where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}  # fmt: skip
    return start("cifar", "train", "--cpu", *TINY_OPTIONS, *words, environment=where)


@pytest.mark.multiprocess
@pytest.mark.parametrize("differs", [pytest.param("lr", marks=pytest.mark.slow), "images"])
def test_two_processes_that_were_told_differently_both_end_with_a_line(
    differs: str, tmp_path: Path
) -> None:
    """Options before images are read, for the file of the images is missing there."""
    port = free_port()
    files = [tmp_path / f"{each}.npz" for each in (0, 1)]
    if differs == "images":
        for number, file in enumerate(files):
            save_npz(file, make_dataset(test=50 + number))
    words = [("--data", f"npz:{file}", "--output-dir", tmp_path / "run") for file in files]
    lrs = ("0.1", "0.2") if differs == "lr" else ("0.1", "0.1")
    nodes = [by_hand(port, rank, *words[rank], "--lr", lrs[rank]) for rank in (0, 1)]
    ends = [finish(node, seconds=100) for node in nodes]
    lines = [complaints(err) for _, _, err in ends]
    told = {"lr": "lr: '0.2': given to rank 1 (", "images": "data: fingerprint "}[differs]
    assert [len(each) for each in lines] == [1, 1], ends
    assert lines[0][0].startswith(f"cifar: {told}")
    assert lines[1][0].startswith(f"cifar: process 1: {told}")
    assert [code for code, _, _ in ends] == [2, 2]
    assert not (tmp_path / "run").exists()
