import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import make_trainer, tiny_recipe

from cifar.checkpoint import (
    MANIFEST,
    checkpoint_folder,
    find_weights,
    list_checkpoints,
    load_into,
    load_weights,
    newest_whole,
    prune,
    read_card,
    read_folder,
    read_state,
    read_tensors,
    step_of,
    write_checkpoint,
    write_folder,
)
from cifar.config import ModelConfig
from cifar.errors import CheckpointError
from cifar.models import build_model
from cifar.training_state import card_of, state_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one step with an average of the weights."""
    trainer = make_trainer(tiny_recipe(ema_decay=0.5))
    trainer.train_step()
    tensors, counters = state_of(trainer)
    folder = checkpoint_folder(tmp_path / "checkpoints", trainer.step)
    write_checkpoint(folder, tensors, card_of(trainer), counters)
    return folder


def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path: Path) -> None:
    whole, lacking = tmp_path / "step-000000001", tmp_path / "step-000000002"
    write_folder(whole, dict.fromkeys(("state.json", "model.json", "model.safetensors"), b"x"))
    write_folder(lacking, {})
    found, faults = newest_whole([whole, lacking])
    assert found is not None and found[0] == whole
    assert faults == [f"checkpoint: {lacking}: has no state.json"]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    trainer = make_trainer(channels_last=True)
    trainer.train_step()
    tensors, counters = state_of(trainer)
    write_checkpoint(tmp_path / "a", tensors, card_of(trainer), counters)
    files = read_folder(tmp_path / "a")
    for group, expected in tensors.items():
        found = read_tensors(files, group, tmp_path)
        assert list(found) == sorted(found), "one order in every process"
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_state(files, tmp_path) == counters and counters.format == 1
    assert read_card(files, tmp_path).config.channels_last
    card, weights = load_weights(tmp_path / "a")
    assert card == card_of(trainer) and weights.keys() == trainer.weights().keys()


def test_the_names_of_the_weights_have_no_wrappers_prefix(saved: Path) -> None:
    _, weights = load_weights(saved)
    assert weights.keys() == build_model(ModelConfig(name="resnet20", width=4)).state_dict().keys()


@pytest.mark.parametrize(
    ("named", "group"),
    [(".", "ema"), ("ema.safetensors", "ema"), ("model.safetensors", "model")],
)
def test_an_average_takes_precedence_unless_a_file_is_named(
    saved: Path, named: str, group: str
) -> None:
    groups = {each: read_tensors(read_folder(saved), each, saved) for each in ("ema", "model")}
    assert not torch.equal(groups["ema"]["conv1.weight"], groups["model"]["conv1.weight"])
    assert find_weights(saved / named) == saved / f"{group}.safetensors"
    _, weights = load_weights(saved / named)
    assert weights.keys() == groups[group].keys()
    assert all(torch.equal(tensor, groups[group][name]) for name, tensor in weights.items())


def test_a_file_of_other_tensors_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: no weights of a model"):
        load_weights(saved / "optimizer.safetensors")


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a checkpoint and its checksum with it."""
    files = read_folder(folder)
    content = json.loads(files[name])
    change(content)
    write_folder(folder, {**files, name: json.dumps(content).encode()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("format"), "format: missing: add it"),
        (lambda state: state.update(format=2), "format: 2: Input should be 1"),
        (lambda state: state.pop("ema_updates"), "ema_updates: missing"),
        (lambda state: state.update(extra=1), "extra: 1: no such field"),
        (lambda state: state.update(step="3"), "step: '3': "),
        (lambda state: state["meter"].update(sums=[0.0]), r"meter\.sums"),
    ],
)
def test_a_state_of_another_format_is_one_line(
    saved: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    rewrite(saved, "state.json", change)
    with pytest.raises(
        CheckpointError, match=rf"state\.json: {named}.* use the version that wrote"
    ) as caught:
        read_state(read_folder(saved), saved)
    assert "\n" not in str(caught.value)


def test_a_card_of_another_version_is_one_line(saved: Path) -> None:
    def older(card: dict[str, Any]) -> None:
        card.update(recipe=card.pop("config")["recipe"]["name"])

    rewrite(saved, "model.json", older)
    with pytest.raises(CheckpointError, match=r"model\.json: config: missing: .*use the version"):
        load_weights(saved)


def test_a_card_holds_the_whole_configuration(saved: Path) -> None:
    card, _ = load_weights(saved)
    trainer = make_trainer(tiny_recipe(ema_decay=0.5))
    assert card.config.recipe == tiny_recipe(ema_decay=0.5)
    assert card.config.precision == "fp32" and trainer.config.model == card.config.model
    assert not card.averaged, "model.safetensors of a checkpoint holds the weights themselves"


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


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'["model.json"]', b"{", b"\xff\xfe", b"[" * 100_000],
    ids=lambda content: content[:15],
)
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
seen, deadline = False, time.monotonic() + 60
for attempt in range(1000):
    if attempt >= 12 and number > 12:
        break
    assert time.monotonic() < deadline, "the writers have written next to nothing"
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
    assert found or not seen, "a kill has cost all checkpoints"
    seen = bool(found)
    for folder in found:
        step = int(folder.name.removeprefix("step-"))
        files = read_folder(folder)
        assert files == {"a": bytes([step % 251]) * 300_000, "b": b"%d" % step}
        number = step + 1
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


def test_a_folder_that_a_user_has_named_is_neither_read_nor_deleted(tmp_path: Path) -> None:
    mine = [tmp_path / "step-000000400-good", tmp_path / "step-400", tmp_path / "step-x"]
    for folder in mine:
        write_folder(folder, {"x": b""})
    for step in (1, 2, 3):
        write_folder(checkpoint_folder(tmp_path, step), {"x": b""})
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [1, 2, 3]
    prune(checkpoint_folder(tmp_path, 3), 1)
    left = [*mine, checkpoint_folder(tmp_path, 3)]
    assert sorted(tmp_path.iterdir()) == sorted(left)


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
    with pytest.raises(CheckpointError, match=f"where: weights of another model: {named}.*; use "):
        load_into(module, {k: v for k, v in merged.items() if v is not None}, "where")
