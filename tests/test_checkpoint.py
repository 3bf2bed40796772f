import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import make_trainer, tiny_recipe

from cifar.checkpoint import (
    MANIFEST,
    checkpoint_folder,
    list_checkpoints,
    load_into,
    load_weights,
    prune,
    read_folder,
    read_tensors,
    write_checkpoint,
    write_folder,
)
from cifar.config import ModelConfig
from cifar.errors import CheckpointError
from cifar.models import build_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one step with an average of the weights."""
    trainer = make_trainer(tiny_recipe(ema_decay=0.5))
    trainer.train_step()
    tensors, counters = trainer.state()
    folder = checkpoint_folder(tmp_path / "checkpoints", trainer.step)
    write_checkpoint(folder, tensors, trainer.card(), counters)
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    trainer = make_trainer(channels_last=True)
    trainer.train_step()
    tensors, counters = trainer.state()
    write_checkpoint(tmp_path / "a", tensors, trainer.card(), counters)
    files = read_folder(tmp_path / "a")
    for group, expected in tensors.items():
        found = read_tensors(files, group, tmp_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads(files["state.json"]) == counters
    card, weights = load_weights(tmp_path / "a")
    assert card == trainer.card() and weights.keys() == trainer.weights().keys()


def test_the_names_of_the_weights_have_no_wrappers_prefix(saved: Path) -> None:
    _, weights = load_weights(saved)
    assert weights.keys() == build_model(ModelConfig(name="resnet20", width=4)).state_dict().keys()


def test_an_average_takes_precedence(saved: Path) -> None:
    files = read_folder(saved)
    _, weights = load_weights(saved / "model.safetensors")
    average = read_tensors(files, "ema", saved)
    assert all(torch.equal(tensor, average[name]) for name, tensor in weights.items())
    assert not torch.equal(weights["conv1.weight"], read_tensors(files, "model", saved)["conv1.weight"])  # fmt: skip # noqa: E501


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["ema.safetensors", MANIFEST, "model.json", "model.safetensors",
                     "optimizer.safetensors", "state.json"]  # fmt: skip
    for name in names:
        content = (saved / name).read_bytes()
        step = 1 if name == MANIFEST else len(content) // 5
        for position in range(0, len(content), step):
            flipped = bytearray(content)
            flipped[position] ^= 1 << (position % 8)
            (saved / name).write_bytes(flipped)
            with pytest.raises(CheckpointError):
                read_folder(saved)
        (saved / name).write_bytes(content)
    read_folder(saved)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'["model.json"]', b"{", b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError):
        load_weights(saved)


@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors", "state.json"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_folder(saved)


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", {"x": b"old"})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / name, {"x": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert read_folder(tmp_path / "a")["x"] == b"old"


KILLED_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
from cifar.checkpoint import checkpoint_folder, list_checkpoints, prune, read_folder, write_folder
root = Path(sys.argv[1])
random.seed(0)
number = 0
for attempt in range(12):
    child = os.fork()
    if child == 0:
        for number in range(number, 10**6):
            folder = checkpoint_folder(root, number)
            write_folder(folder, {"a": bytes([number % 251]) * 300_000, "b": b"%d" % number})
            prune(folder, 2)
    time.sleep(random.uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = list_checkpoints(root)
    assert attempt == 0 or found, "a kill has cost all checkpoints"
    for folder in found:
        step = int(folder.name.removeprefix("step-"))
        files = read_folder(folder)
        assert files == {"a": bytes([step % 251]) * 300_000, "b": b"%d" % step}
        number = step + 1
assert number > 12, "the writers have written next to nothing"
prune(found[-1], 2)
assert not list(root.glob(".writing-*"))
"""


def test_kill_9_while_writing_never_leaves_a_damaged_checkpoint(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_WRITERS, str(tmp_path)],
        check=True,
        timeout=120,
    )


def test_pruning_keeps_the_newest_and_sweeps_half_written_ones(tmp_path: Path) -> None:
    for step in (9, 10, 100, 1000):
        write_folder(checkpoint_folder(tmp_path, step), {"x": b""})
    (tmp_path / ".writing-step-000000011").mkdir()
    prune(checkpoint_folder(tmp_path, 1000), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000100", "step-000001000"]


def test_pruning_does_not_count_later_checkpoints(tmp_path: Path) -> None:
    """They are damaged, or the run would have continued from them."""
    for step in (1, 2, 9):
        write_folder(checkpoint_folder(tmp_path, step), {"x": b""})
    prune(checkpoint_folder(tmp_path, 2), 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000002", "step-000000009"]  # fmt: skip # noqa: E501


def test_weights_are_found_in_a_run_a_folder_or_a_file(saved: Path) -> None:
    run = saved.parent.parent
    older = checkpoint_folder(saved.parent, 0)
    shutil.copytree(saved, older)
    cards = [load_weights(path)[0] for path in (run, saved, saved / "model.safetensors")]
    assert cards[0] == cards[1] == cards[2] and cards[0].step == 1


@pytest.mark.parametrize("where", ["absent", "."])
def test_no_weights_there_is_said(tmp_path: Path, where: str) -> None:
    with pytest.raises(CheckpointError, match="no weights there"):
        load_weights(tmp_path / where)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fc.bias": torch.zeros(3)}, r"fc\.bias is \[3\], must be \[10\]"),
        ({"extra": torch.zeros(3)}, r"extra is \[3\], must be absent"),
        ({"fc.bias": None}, r"fc\.bias is absent, must be \[10\]"),
    ],
)
def test_weights_of_another_model_are_refused(
    changed: dict[str, Tensor | None], named: str
) -> None:
    module = build_model(ModelConfig(name="resnet20", width=4))
    merged = {**module.state_dict(), **changed}
    with pytest.raises(CheckpointError, match=f"where: weights of another model: {named}"):
        load_into(module, {k: v for k, v in merged.items() if v is not None}, "where")
