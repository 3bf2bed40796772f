import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import make_dataset, save_npz
from torch import nn
from training import (
    TINY,
    after_step,
    cifar,
    complaints,
    finish,
    kill,
    metrics,
    mixup,
    reset_accelerate,
    resume,
    start,
    tiny_recipe,
    train,
)

from cifar import checkpoint, distributed, run_folder, session
from cifar import run as run_module
from cifar.checkpoint import list_checkpoints, load_weights, read_folder
from cifar.config import RunConfig, TrainConfig
from cifar.data.config import parse_data
from cifar.data.loader import TrainBatch
from cifar.emulation import emulate_bf16
from cifar.errors import ConfigError, Stopped
from cifar.evaluation import Evaluation
from cifar.meter import Meter
from cifar.process import MALLOC, has_nvidia_gpus
from cifar.progress import TrainingProgress
from cifar.run import train as train_run
from cifar.session import Session
from cifar.signals import REPEAT_SECONDS, StopSignals, echo_seconds
from cifar.trainer import Trainer
from cifar.updates import descend

VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "everything": ("--ema-decay", "0.9", "--dropout", "0.3", "--accumulation", "2",
                   "--label-smoothing", "0.1", "--channels-last"),
    "adamw": ("--optimizer", "adamw", "--lr", "0.001", "--schedule", "cosine",
              "--ema-decay", "0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted runs of the variants, each made once."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("straight")
    save_npz(root / "toy.npz", make_dataset())

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = root / variant
            assert train(root / "toy.npz", made[variant], *VARIANTS[variant]) == 0
        return made[variant]

    return run


class Crash(BaseException):
    """Stands for a death without warning: no handler of the program catches it."""


def crash(*_: object, **__: object) -> None:
    raise Crash


def assert_same(found: Path, expected: Path) -> None:
    """Weights, optimiser and metrics of two runs are equal, bit for bit."""
    assert metrics(found) == metrics(expected)
    ends = [list_checkpoints(run / "checkpoints")[-1] for run in (found, expected)]
    assert ends[0].name == ends[1].name
    for mine, theirs in (ends, [run / "final" for run in (found, expected)]):
        files, other = read_folder(mine), read_folder(theirs)
        assert files.keys() == other.keys()
        for card in (files, other):  # each names the file of its own images
            card["model.json"] = re.sub(rb'"path": ".*"', b"", card["model.json"])
        changed = [name for name in files if files[name] != other[name]]
        assert changed in ([], ["state.json"]), "only the seconds of the epoch may differ"


def test_a_run_leaves_its_configuration_metrics_checkpoints_and_weights(
    straight: Callable[[str], Path],
) -> None:
    folder = straight("plain")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "checkpoints", "config.json", "final", "metrics.jsonl"]  # fmt: skip
    stored = run_folder.read_config(folder)
    assert stored.train.precision == "fp32" and stored.train.model.label == "resnet20-w4"
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
        "step-000000003", "step-000000006"]  # fmt: skip
    first, second = run_folder.read_metrics(folder)
    assert (first["epoch"], first["step"], first["samples_seen"]) == (1, 3, 96)
    assert (second["epoch"], second["step"], second["samples_seen"]) == (2, 6, 192)
    assert first["test_samples"] == 50 and 0 < second["train_loss"] < 10
    assert second["train_images_per_s"] == pytest.approx(96 / second["train_seconds"])
    card, _ = load_weights(folder)
    assert card.step == 6 and card.samples_seen == 192 and len(card.classes) == 10


def test_throughput_is_that_of_the_slowest_process(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "slowest", lambda *_: 1e6)
    train(npz, tmp_path / "run")
    for line in run_folder.read_metrics(tmp_path / "run"):
        assert line["train_seconds"] == 1e6
        assert line["train_images_per_s"] == pytest.approx(96 / 1e6)


def test_writing_checkpoints_is_not_counted_wherever_a_process_waits_for_it(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait() -> None:
        waits.append(0.5)
        time.sleep(waits[-1])

    monkeypatch.setattr(session, "barrier", wait)
    train(npz, tmp_path / "run", "--save-every", "1")
    seconds = [line["train_seconds"] for line in run_folder.read_metrics(tmp_path / "run")]
    assert len(waits) >= 6 and sum(seconds) < sum(waits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_stopped_by_a_signal_continues_bit_for_bit(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path], variant: str, step: int
) -> None:
    """Within the first epoch, at its very end, and within the second."""
    folder = tmp_path / "run"
    with after_step(step, kill(signal.SIGTERM)):
        assert train(npz, folder, *VARIANTS[variant]) == 143
    assert not (folder / "final").exists()
    assert [path.name for path in list_checkpoints(folder / "checkpoints")][-1:] == [
        f"step-{step:09d}"]  # fmt: skip
    assert resume(folder) == 0
    assert_same(folder, straight(variant))


def test_a_run_with_functions_of_its_own_is_saved_and_resumed_like_any(
    npz: Path, tmp_path: Path
) -> None:
    calls: list[str] = []

    def loss(model: nn.Module, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append("loss")
        return mixup(model, batch)

    def update(trainer: Trainer, forward_backward: Callable[[], None]) -> None:
        calls.append("update")
        descend(trainer, forward_backward)

    config = TrainConfig(model=TINY, recipe=tiny_recipe(), data=parse_data(f"npz:{npz}"))

    def run(folder: Path, *, resume: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        reset_accelerate()
        train_run(config, RunConfig(cpu=True), folder, resume=resume, compute_loss=loss,
                  update=update)  # fmt: skip

    run(tmp_path / "straight")
    with after_step(4, kill(signal.SIGTERM)), pytest.raises(Stopped):
        run(tmp_path / "stopped")
    run(tmp_path / "stopped", resume=True)
    assert_same(tmp_path / "stopped", tmp_path / "straight")
    assert calls == ["update", "loss"] * 12


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_each_stopping_signal_has_its_exit_code_and_one_line(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    before = signal.getsignal(number)
    with after_step(1, kill(number)):
        assert train(npz, tmp_path / "run") == code
    assert signal.getsignal(number) is before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cifar: stopped by signal {number} after step 1; continue with: ")
    assert f"--resume {tmp_path / 'run'}" in line


def test_a_run_that_died_mid_epoch_continues_from_its_last_checkpoint(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    with after_step(5, crash), pytest.raises(Crash):
        train(npz, tmp_path / "run", "--save-every", "2")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000000004"
    assert resume(tmp_path / "run") == 0
    assert_same(tmp_path / "run", straight("plain"))


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("[pair.cc:545] Read error [::1]:7: Connection reset by peer. This is typically", True),
        ("[pair.cc:464] Connection closed by peer [127.0.0.1]:5", True),
        ("[unbound_buffer.cc:78] Timed out waiting 1200000ms for recv operation", True),
        ("Expected size 3 but got size 4", False),
    ],
)
def test_the_end_of_another_process_is_one_line(
    npz: Path, tmp_path: Path, text: str, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is no such thing stays the error that it is."""

    def fail() -> None:
        raise RuntimeError(text)

    expected = contextlib.nullcontext() if known else pytest.raises(RuntimeError, match="size 4")
    with after_step(4, fail), expected:
        assert train(npz, tmp_path / "run") == 1
    if known:
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("cifar: processes: another one has ended or cannot be reached")
        assert line.endswith("; continue from step 3 with --resume")
        assert text.partition(". This")[0] in line


@pytest.mark.parametrize("place", ["_save", "_end_epoch", "_write_final"])
def test_a_run_that_died_anywhere_leaves_one_line_per_epoch(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path], place: str
) -> None:
    """Before the checkpoint of an epoch, between that and its line, and after the last one."""
    folder = tmp_path / "run"
    with after_step(2, kill(signal.SIGTERM)):
        assert train(npz, folder) == 143
    with mock.patch.object(Session, place, crash), pytest.raises(Crash):
        resume(folder)
    assert resume(folder) == 0
    assert_same(folder, straight("plain"))


def in_evaluation(
    number: int, action: Callable[[], object]
) -> contextlib.AbstractContextManager[object]:
    """Do something in the `number`-th evaluation, before its first batch."""
    original, count = Trainer.evaluate, itertools.count(1)

    def evaluate(self: Trainer, *words: Any, **options: Any) -> Evaluation:
        if next(count) == number:
            action()
        return original(self, *words, **options)

    return mock.patch.object(Trainer, "evaluate", evaluate)


def test_a_run_that_died_in_an_evaluation_has_saved_its_epoch(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with in_evaluation(2, crash), pytest.raises(Crash):
        train(npz, folder, "--keep-checkpoints", "1")
    assert list_checkpoints(folder / "checkpoints")[-1].name == "step-000000006"
    assert len(metrics(folder)) == 1
    with mock.patch.object(Trainer, "train_step", crash):
        assert resume(folder) == 0
    assert_same(folder, straight("plain"))


def test_a_signal_ends_an_evaluation_between_its_batches(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with (
        mock.patch("cifar.data.loader.EVAL_PIXELS", 10 * 16 * 16),
        in_evaluation(1, kill(signal.SIGTERM)),
    ):
        assert train(npz, folder) == 143
    assert "stopped by signal 15 after step 3;" in capsys.readouterr().err
    assert not (folder / "metrics.jsonl").exists()
    assert resume(folder) == 0
    assert_same(folder, straight("plain"))


def test_weights_whose_loss_is_not_finite_leave_the_checkpoint_before_them(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where one checkpoint alone is kept."""

    def evaluate(self: Trainer, *words: Any, **options: Any) -> Evaluation:
        found = original(self, *words, **options)
        return dataclasses.replace(found, loss=math.nan) if self.step == 6 else found

    original, folder = Trainer.evaluate, tmp_path / "run"
    with mock.patch.object(Trainer, "evaluate", evaluate):
        assert train(npz, folder, "--keep-checkpoints", "1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: loss: not finite on the test images after step 6: ")
    assert line.endswith("; continue from step 3 with --resume")
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-000000003"]


def test_a_checkpoint_that_cannot_be_taken_back_is_one_line(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def evaluate(self: Trainer, *words: Any, **options: Any) -> Evaluation:
        return dataclasses.replace(original(self, *words, **options), loss=math.nan)

    original = Trainer.evaluate
    with (
        mock.patch.object(Trainer, "evaluate", evaluate),
        mock.patch.object(checkpoint, "remove_folder", refuse),
    ):
        assert train(npz, tmp_path / "run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000000003: cannot be written: Permission denied" in line


def test_a_run_stopped_at_the_end_of_an_epoch_may_die_again_after_that_epochs_line(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with after_step(3, kill(signal.SIGTERM)):
        assert train(npz, folder) == 143
    assert not (folder / "metrics.jsonl").exists(), "the evaluation is still to come"
    with after_step(4, crash), pytest.raises(Crash):
        resume(folder)
    assert len(metrics(folder)) == 1
    assert resume(folder) == 0
    assert_same(folder, straight("plain"))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path], keep: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    with after_step(5, kill(signal.SIGTERM)):
        train(npz, folder, "--save-every", "2", "--keep-checkpoints", "3")
    damaged = list_checkpoints(folder / "checkpoints")[-1] / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    assert resume(folder, "--keep-checkpoints", keep) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^warning: .*step-000000005.*checksum", err) and "steps 4..6" in out
    assert_same(folder, straight("plain"))


def test_when_every_checkpoint_is_damaged_the_run_cannot_go_on(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with after_step(2, kill(signal.SIGTERM)):
        train(npz, folder)
    for path in list_checkpoints(folder / "checkpoints"):
        (path / "state.json").write_text("{}")
    capsys.readouterr()
    assert resume(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"cifar: resume: .* no whole checkpoint there \(.*checksum\); remove it", line)


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight("plain"), folder)
    with mock.patch.object(Trainer, "train_step", crash):
        assert resume(folder) == 0
    assert_same(folder, straight("plain"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--lr", "0.2"), "lr: 0.2: the run to resume has 0.05"),
        (("--model", "resnet32"), "model: 'resnet32': the run to resume has 'resnet20'"),
        (("--model", "resnet18"), "model: 'resnet18': the run to resume has 'resnet20'"),
        (("--batch-size", "16"), "batch-size: 16: the run to resume has 32"),
        (("--seed", "3"), "seed: 3: the run to resume has 0"),
        (("--precision", "bf16"), "precision: 'bf16': the run to resume has 'fp32'"),
        (("--data", "shapes"), "data: 'shapes': the run to resume has 'npz'"),
        (("--accumulation", "2"), "accumulation: 2: the run to resume has 1"),
        (("--recipe", "other"), "recipe: 'other'"),
        (("--output-dir", "elsewhere"), "output-dir: 'elsewhere'"),
    ],
)
def test_another_option_is_refused_when_resuming(
    straight: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, str],
    named: str,
) -> None:
    assert resume(straight("plain"), *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_the_same_option_is_accepted_when_resuming(straight: Callable[[str], Path]) -> None:
    assert resume(straight("plain"), "--lr", "0.05", "--save-every", "1") == 0


def broken_state(folder: Path) -> None:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    files = read_folder(newest)
    state = json.loads(files["state.json"])
    del state["format"]
    checkpoint.write_folder(newest, {**files, "state.json": json.dumps(state).encode()})


def without_group(folder: Path) -> None:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    files = read_folder(newest)
    del files["optimizer.safetensors"]
    checkpoint.write_folder(newest, files)


def other_optimizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["train"]["recipe"]["optimizer"] = "adamw"
    (folder / "config.json").write_text(json.dumps(config))


def damaged_line(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "st\n' + lines)


def deep_line(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("[" * 100_000 + "\n")


def line_without_step(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (broken_state, "state.json: format: missing: add it, or use the version"),
        (without_group, "has no optimizer.safetensors"),
        (other_optimizer, "of another configuration than config.json"),
        (damaged_line, "metrics.jsonl: line 1: not the metrics of an epoch"),
        (deep_line, "metrics.jsonl: line 1: not the metrics of an epoch"),
        (line_without_step, "metrics.jsonl: line 1: not the metrics of an epoch"),
    ],
)
def test_a_run_whose_files_do_not_fit_is_one_line(
    tmp_path: Path, straight: Callable[[str], Path], capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None], named: str,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(straight("plain"), folder)
    damage(folder)
    capsys.readouterr()
    assert resume(folder) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert named in line


def test_other_images_under_the_same_name_are_refused(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with after_step(2, kill(signal.SIGTERM)):
        train(npz, tmp_path / "run")
    arrays = dict(np.load(npz))
    arrays["train_images"][0, 0, 0, 0] ^= 1
    np.savez(npz, **arrays)
    capsys.readouterr()
    assert resume(tmp_path / "run") == 2
    (line,) = complaints(capsys.readouterr().err)
    assert "not the images this run was started with" in line


def test_a_run_is_resumed_on_images_that_have_moved(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with after_step(2, kill(signal.SIGTERM)):
        train(npz, folder)
    moved = npz.rename(tmp_path / "elsewhere.npz")
    assert resume(folder) == 2, "there are none where they were"
    with after_step(4, kill(signal.SIGTERM)):
        assert resume(folder, "--data", f"npz:{moved}") == 143
    assert resume(folder, "--data", f"npz:{moved}") == 0
    assert metrics(folder) == metrics(straight("plain"))


def test_a_new_run_never_overwrites(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert train(npz, folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: output-dir: ") and "no empty folder" in line
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_bad_input_leaves_no_folder_behind(npz: Path, tmp_path: Path) -> None:
    assert train(npz, tmp_path / "new" / "run", "-b", "97") == 2
    assert not (tmp_path / "new").exists()


def test_bad_input_leaves_a_folder_that_was_there_as_it_was(npz: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train(npz, tmp_path / "run", "-b", "97") == 2
    assert list((tmp_path / "run").iterdir()) == []


def test_bad_input_is_one_line_also_where_the_folder_cannot_be_removed(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with mock.patch.object(Path, "rmdir", refuse), mock.patch.object(Path, "unlink", refuse):
        assert train(npz, tmp_path / "run", "-b", "97") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: batch-size: 97")


def test_a_folder_is_looked_into_again_once_it_is_locked(tmp_path: Path) -> None:
    """Another run may have been started and stopped there between the two."""
    real = run_folder.locked

    def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
        (folder / "config.json").write_text("{}")
        return real(folder)

    with (
        mock.patch.object(run_folder, "locked", locked),
        pytest.raises(ConfigError, match="no empty folder"),
        run_folder.created(TrainConfig(), str(tmp_path / "run")),
    ):
        pass
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_paths_may_begin_with_a_tilde(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with after_step(2, kill(signal.SIGTERM)):
        assert train(npz, Path("~/run")) == 143
    assert (tmp_path / "run" / "config.json").exists() and not (tmp_path / "~").exists()
    assert resume(Path("~/run")) == 0
    assert cifar("evaluate", "~/run", "--cpu") == 0
    capsys.readouterr()
    assert cifar("train", "--resume=~no-such-user-anywhere/run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: resume: '~no-such-user-anywhere/run': no such user")


def test_a_run_goes_on_from_another_folder(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with after_step(2, kill(signal.SIGTERM)):
        assert train(Path(npz.name), tmp_path / "run") == 143
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(tmp_path / "run") == 0
    assert cifar("evaluate", tmp_path / "run", "--cpu") == 0


def test_two_runs_of_the_same_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    config = TrainConfig()
    with run_folder.created(config, None) as first, run_folder.created(config, None) as second:
        assert first != second
        assert {first.name, second.name} == {
            "resnet18-shapes-20260101-000000", "resnet18-shapes-20260101-000000-2"}  # fmt: skip


def test_a_folder_whose_run_never_started_is_taken_over(npz: Path, tmp_path: Path) -> None:
    """A killed start leaves its lock file, and nobody holds it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert train(npz, tmp_path / "run", "--epochs", "1") == 0


def test_a_run_is_trained_by_one_process_at_a_time(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with after_step(2, kill(signal.SIGTERM)):
        train(npz, folder)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    with run_folder.resumed(folder):
        assert resume(folder) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cifar: resume: '{folder}': another process is training there")
    assert sorted(folder.rglob("*")) == before
    assert resume(folder) == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_nothing_can_be_locked_a_run_is_started_with_a_note(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("cifar.files.fcntl.flock", flock)
    with run_folder.created(TrainConfig(), str(tmp_path / "run")) as folder:
        (folder / "config.json").touch()
    with run_folder.resumed(folder):
        lines = capsys.readouterr().err.splitlines()
    assert lines == [f"note: {folder}: cannot be locked here; start one run at a time there"] * 2


def test_a_folder_that_fails_to_be_locked_otherwise_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("cifar.files.fcntl.flock", flock)
    with (
        pytest.raises(ConfigError, match=r"output-dir: .*cannot be written"),
        run_folder.created(TrainConfig(), str(tmp_path / "run")),
    ):
        pass


def test_a_folder_asked_for_by_two_runs_goes_to_the_first(tmp_path: Path) -> None:
    asked = str(tmp_path / "run")
    with (
        run_folder.created(TrainConfig(), asked),
        pytest.raises(ConfigError, match="no empty folder"),
        run_folder.created(TrainConfig(), asked),
    ):
        pass
    assert not (tmp_path / "run").exists(), "neither has started to train"


def test_a_torn_last_line_of_the_metrics_is_dropped_on_resume(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with after_step(5, kill(signal.SIGTERM)):
        train(npz, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')
    assert resume(folder) == 0
    assert_same(folder, straight("plain"))


@pytest.mark.parametrize("failing", [".writing-step", "metrics.jsonl"])
def test_a_full_disk_costs_one_line_and_no_old_checkpoint(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path], failing: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = os.fsync

    def full(descriptor: int) -> None:
        if failing in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    folder = tmp_path / "run"

    with (
        mock.patch.object(os, "fsync", real),  # puts the real one back
        after_step(4, lambda: setattr(os, "fsync", full)),
    ):
        assert train(npz, folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left" in line
    whole = (
        ["step-000000003"] if failing == ".writing-step" else ["step-000000003", "step-000000006"]
    )
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == whole
    assert resume(folder) == 0
    assert_same(folder, straight("plain"))


def test_a_diverged_run_keeps_its_last_good_checkpoint(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison() -> None:
        with torch.no_grad():
            trainers[-1].module.fc.weight[0, 0] = torch.inf

    trainers: list[Trainer] = []
    real = Trainer.__init__

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        trainers.append(self)

    folder = tmp_path / "run"
    with mock.patch.object(Trainer, "__init__", init), after_step(4, poison):
        assert train(npz, folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: loss: not finite in step 5: ")
    assert line.endswith("; continue from step 3 with --resume")
    card, weights = load_weights(folder)
    assert card.step == 3
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_weights_that_break_in_an_epochs_last_step_are_neither_reported_nor_saved(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No loss has seen them: the evaluation is the first to."""
    assert train(npz, tmp_path / "run", "--lr", "1e38", "-b", "96", "--schedule", "constant") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite" in line and line.endswith("; nothing was saved yet")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


SECOND_SIGNAL = """
import os, signal, time
from cifar import signals as module
from cifar.pulse import PULSE
from cifar.signals import ECHO_SECONDS, StopSignals
module.REPEAT_SECONDS = 0.5
with StopSignals("go on") as signals:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGINT
    while not PULSE.is_stopping:  # from when on what is an echo is reckoned
        time.sleep(0.01)
    time.sleep(ECHO_SECONDS + 0.1)
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    print("still alive", flush=True)
"""


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "WORLD_SIZE"])
def test_a_second_signal_stops_at_once_but_a_launchers_echo_does_not(name: str) -> None:
    process = start("-c", SECOND_SIGNAL, module=False, environment={name: "2"})
    told = "stopped at once by signal 15, without saving; go on\n"
    assert finish(process, seconds=50) == (143, "alive\n", told)


def test_slurms_third_way_to_signal_a_process_is_no_second_wish() -> None:
    """The step, torchrun and the script's trap: the last one more than a second after the first."""
    environment = {"TORCHELASTIC_RUN_ID": "2", "SLURM_JOB_ID": "7"}
    script = SECOND_SIGNAL.replace("time.sleep(60)", "time.sleep(0.5)")
    found = finish(start("-c", script, module=False, environment=environment), seconds=50)
    assert found == (0, "alive\nstill alive\n", "")


def test_what_timeout_sends_twice_is_one_signal_and_a_hand_s_second_one_is_not() -> None:
    """It signals its child, and then the group that the child is in."""
    told = "stopped at once by signal {}, without saving; go on\n"
    found = finish(start("-c", SECOND_SIGNAL, module=False), seconds=50)
    assert found == (143, "alive\n", told.format(15))
    by_hand = SECOND_SIGNAL.replace("    os.kill", "    time.sleep(1.0)\n    os.kill")
    found = finish(start("-c", by_hand, module=False), seconds=50)
    assert found == (130, "", told.format(2))
    assert echo_seconds({"WORLD_SIZE": "1"}) == REPEAT_SECONDS


LEFT = """
import os, signal
from cifar.signals import StopSignals
try:
    with StopSignals():
        os.kill(os.getpid(), signal.{sent})
        raise RuntimeError("{told}")
except RuntimeError:
    print("goes on")
"""
GONE = "[pair.cc:5] Connection closed by peer [127.0.0.1]:1"


@pytest.mark.parametrize(
    ("sent", "told", "launched", "expected"),
    [
        ("SIGTERM", GONE, True, (-signal.SIGTERM, "", "")),
        ("SIGTERM", GONE, False, (0, "goes on\n", "")),
        ("SIGUSR1", GONE, True, (0, "goes on\n", "")),
        ("SIGTERM", "mat1 and mat2 shapes cannot be multiplied", True, (0, "goes on\n", "")),
    ],
)
def test_a_launcher_s_signal_ends_a_process_that_notices_later_that_it_is_left(
    sent: str, told: str, launched: bool, expected: tuple[int, str, str]
) -> None:
    """What breaks by itself then has its say, and so has one that nobody else speaks for."""
    environment = {"TORCHELASTIC_RUN_ID": "2"} if launched else {}
    script = LEFT.format(sent=sent, told=told)
    assert finish(start("-c", script, module=False, environment=environment)) == expected


BLOCKED_IN_C = """
import ctypes
from cifar.signals import StopSignals
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with StopSignals():
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)  # of a default mutex: for ever, and no signal interrupts it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is one on Linux alone")
def test_a_second_signal_stops_a_process_that_is_blocked_in_c() -> None:
    process = start("-c", BLOCKED_IN_C, module=False)
    assert process.stdout is not None and process.stdout.readline() == "blocked\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(2.0)
    assert process.poll() is None, "the first one is only noted"
    process.send_signal(signal.SIGUSR1)
    assert finish(process, seconds=60) == (138, "", "")


def test_a_run_that_is_stopped_lets_go_of_its_model_before_it_leaves_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        pass

    alive: list[weakref.ref[Model]] = []

    def work() -> None:
        model = Model()
        alive.append(weakref.ref(model))
        raise Stopped(signal.SIGTERM, "stopped")

    left: list[bool] = []
    monkeypatch.setattr(distributed, "leave", lambda: left.append(alive[0]() is None))
    with pytest.raises(Stopped, match="stopped"):
        distributed.then_leave(work)
    assert left == [True]


def test_stop_signals_leave_nothing_behind() -> None:
    def counts() -> tuple[int, int, int]:
        files = len([*Path("/proc/self/fd").iterdir()])
        return signal.set_wakeup_fd(-1), threading.active_count(), files

    before = counts()
    with StopSignals():
        assert threading.active_count() == before[1] + 1
    assert counts() == before


def test_the_first_signal_is_noted_and_the_handlers_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # else the second one would end the tests
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before


KILLED = """
import os, signal, sys
from cifar.commands import main
from cifar.trainer import Trainer
original = Trainer.train_step
def train_step(self):
    original(self)
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.train_step = train_step
sys.exit(main())
"""


def test_after_kill_9_the_run_continues_bit_for_bit(
    npz: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    options = ("train", "--cpu", "--model", "resnet20-w4", "-b", 32, "--epochs", 2, "--lr", 0.05)
    process = start("-c", KILLED, *options, "--data", f"npz:{npz}", "--output-dir", folder,
                    module=False, environment={"CIFAR_RESTARTED": "1"})  # fmt: skip
    assert finish(process)[0] == -9
    assert len(metrics(folder)) == 1
    assert resume(folder) == 0
    assert_same(folder, straight("plain"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_progress_is_live(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert train(npz, tmp_path / "run") == 0
    shown = terminal.getvalue()
    assert "\x1b[" in shown and "6/6" in shown and "images/s" in shown
    assert "epoch 2/2  train loss" in shown


def test_in_a_log_the_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar.progress.PLAIN_INTERVAL", 0.0)
    with TrainingProgress(10, 5, 32, enabled=True) as progress:
        progress.start_at(4)
        progress.update(6)
    out = capsys.readouterr().out
    assert out.startswith("step 6/10  ") and "\x1b" not in out and out.count("\n") == 1


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(10, 5, 32, enabled=False) as progress:
        progress.update(6)
        progress.say("hello")
    assert capsys.readouterr() == ("", "")


def test_evaluating_a_run_reproduces_its_last_line(
    npz: Path, straight: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for variant in ("plain", "everything"):
        folder = straight(variant)
        capsys.readouterr()
        assert cifar("evaluate", folder, "--cpu", "--data", f"npz:{npz}", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        last = metrics(folder)[-1]
        assert (found["top1"], found["top5"], found["loss"], found["samples"]) == (
            last["test_top1"], last["test_top5"], last["test_loss"], 50)  # fmt: skip
        assert sum(map(sum, found["confusion"])) == 50


def test_final_weights_are_the_average_where_there_is_one(
    straight: Callable[[str], Path],
) -> None:
    folder = straight("everything")
    newest = list_checkpoints(folder / "checkpoints")[-1]
    _, final = load_weights(folder / "final")
    average = checkpoint.read_tensors(read_folder(newest), "ema", newest)
    assert all(torch.equal(tensor, average[name]) for name, tensor in final.items())


def test_final_weights_have_the_whole_configuration_beside_them(
    straight: Callable[[str], Path],
) -> None:
    for variant, averaged in (("adamw", False), ("everything", True)):
        folder = straight(variant)
        card, _ = load_weights(folder / "final")
        stored = run_folder.read_config(folder).train
        assert card.averaged is averaged
        assert dataclasses.replace(card.config, model=stored.model) == stored
        assert sorted(path.name for path in (folder / "final").iterdir()) == [
            "manifest.json", "model.json", "model.safetensors"]  # fmt: skip


@contextlib.contextmanager
def noted_environment() -> Iterator[None]:
    """While entered, there is something to note of every run's environment."""
    given = {**MALLOC, "GOMP_SPINCOUNT": "3", "OMP_NUM_THREADS": "1"}
    with (
        mock.patch("cifar.process.available_cores", return_value=99),
        mock.patch("training.worker_environment", return_value=given),
    ):
        yield


def test_settings_other_than_bench_s_are_told_once(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path / "usual", "--epochs", "1") == 0
    assert capsys.readouterr().err == ""
    with noted_environment():
        assert train(npz, tmp_path / "other", "--epochs", "1") == 0
    assert capsys.readouterr().err == (
        "note: environment: GOMP_SPINCOUNT=3 (bench: 100000), OMP_NUM_THREADS=1 (bench: 99)\n"
    )


def test_an_error_comes_alone_though_there_is_something_to_note(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with after_step(2, kill(signal.SIGTERM)):
        assert train(npz, folder) == 143
    arrays = dict(np.load(npz))
    arrays["train_images"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    other = ("--data", f"npz:{tmp_path / 'other.npz'}")
    capsys.readouterr()
    with noted_environment():
        assert resume(folder, *other) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "not the images this run was started with" in line
        assert cifar("evaluate", folder, *other, "--cpu", "--precision", "fp16") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "precision: 'fp16'" in line
        (weights,) = folder.glob("checkpoints/*/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1])
        assert resume(folder) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no whole checkpoint there" in line


def test_a_precision_without_kernels_is_emulated_and_told_once(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for emulated, precision, count in ((True, "bf16", 1), (False, "bf16", 0), (True, "fp32", 0)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda e=emulated: not e)
        folder = tmp_path / f"{emulated}-{precision}"
        with mock.patch("cifar.emulation.emulate_bf16", wraps=emulate_bf16) as emulate:
            assert train(npz, folder, "--epochs", "1", "--precision", precision) == 0
            assert capsys.readouterr().err.count("note: precision: 'bf16': this CPU ") == count
            assert cifar("evaluate", str(folder), "--cpu") == 0
        assert emulate.call_count == 2 * count


def test_kernels_without_instructions_are_told(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr("cifar.precision.platform.machine", lambda: "x86_64")
    assert train(npz, tmp_path / "run", "--epochs", "1", "--precision", "bf16") == 0
    assert capsys.readouterr().err == (
        "note: precision: 'bf16': this CPU has no bf16 instructions; its kernels convert to fp32 "
        "and back\n"
    )


@pytest.mark.parametrize(
    ("shown", "asked", "told"),
    [
        (None, False, True),
        ("0,1", False, True),
        ("", False, False),
        ("-1", False, False),
        (None, True, False),
    ],
)
def test_gpus_that_torch_cannot_use_are_told(
    shown: str | None, asked: bool, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a driver that is too old; those that were hidden, or left out, are meant to be."""
    gpu = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    assert not has_nvidia_gpus(tmp_path)
    gpu.mkdir(parents=True)
    monkeypatch.setattr(run_module, "has_nvidia_gpus", lambda: has_nvidia_gpus(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    trainer = SimpleNamespace(device=torch.device("cpu"), run=RunConfig(cpu=asked))
    assert run_module._leaves_gpus_out(trainer) is told
