"""`cifar train --resume auto`: the same command begins a run and goes on with it."""

import contextlib
import dataclasses
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_run import assert_same
from training import (
    ROOT,
    TINY_OPTIONS,
    after_step,
    cifar,
    complaints,
    finish,
    free_port,
    kill,
    metrics,
    start,
    train,
)

from cifar import restart
from cifar.checkpoint import list_checkpoints, load_weights
from cifar.files import locked
from cifar.run_folder import read_config
from cifar.signals import end_with_launcher
from cifar.trainer import Trainer

AUTO = ("--resume", "auto")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The folder of a run on these images that nothing disturbs, trained once."""
    folder = tmp_path_factory.mktemp("straight") / "run"

    def get(npz: Path) -> Path:
        if not folder.exists():
            assert train(npz, folder) == 0
        return folder

    return get


def test_one_command_begins_and_goes_on_bit_for_bit(
    npz: Path, tmp_path: Path, straight: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "new" / "run"
    with after_step(2, kill(signal.SIGTERM)):
        assert train(npz, folder, *AUTO) == 143
    with after_step(4, kill(signal.SIGUSR1)):
        assert train(npz, folder, *AUTO) == 138
    assert train(npz, folder, *AUTO) == 0
    assert_same(folder, straight(npz))
    out = capsys.readouterr().out
    assert [f"steps {step}..6" in out for step in (0, 2, 4)] == [True] * 3


def test_a_folder_may_be_written_otherwise_or_have_moved(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with after_step(3, kill(signal.SIGTERM)):
        assert train(npz, Path("one"), *AUTO) == 143
    with after_step(4, kill(signal.SIGTERM)):
        assert train(npz, tmp_path / "one", *AUTO) == 143
    (tmp_path / "one").rename(tmp_path / "two")
    assert train(npz, Path("two"), *AUTO) == 0
    capsys.readouterr()
    assert cifar("train", "--resume", "two", "--output-dir", "three") == 2
    told = "cifar: output-dir: 'three': the run to resume is in 'two'; leave it out, or start a new"
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("is_auto", [True, False], ids=["auto", "resume"])
def test_what_a_killed_process_left_half_written_goes(
    npz: Path, tmp_path: Path, is_auto: bool
) -> None:
    folder = tmp_path / "run"
    with after_step(3, kill(signal.SIGTERM)):
        assert train(npz, folder) == 143
    (folder / ".metrics.jsonl.77.tmp").write_text("half a li")
    (folder / ".writing-old-final").mkdir()
    (folder / ".writing-old-final" / "model.safetensors").touch()
    if is_auto:
        assert train(npz, folder, *AUTO) == 0
    else:
        assert cifar("train", "--resume", folder) == 0
    left_over = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left_over <= {".lock"}


def test_a_finished_run_stays_as_it_is(
    npz: Path, tmp_path: Path, straight: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(straight(npz), tmp_path / "run")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace(str(straight(npz)), str(folder)))
    monkeypatch.setattr(Trainer, "train_step", None)
    assert train(npz, folder, *AUTO) == 0
    assert_same(folder, straight(npz))


def test_a_run_whose_start_was_killed_begins_anew(
    npz: Path, tmp_path: Path, straight: Callable[[Path], Path]
) -> None:
    """With its configuration alone, or what is left of writing it."""
    folder = tmp_path / "run"
    with after_step(2, kill(signal.SIGTERM)):
        assert train(npz, folder, *AUTO) == 143
    shutil.rmtree(folder / "checkpoints")
    (folder / ".config.json.7.tmp").write_text("{")
    assert train(npz, folder, *AUTO) == 0
    assert_same(folder, straight(npz))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".config.json.7.tmp").write_text("{")
    (tmp_path / "b" / ".lock").touch()
    assert train(npz, tmp_path / "b", *AUTO, "--epochs", 1) == 0


def damage(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_checkpoints_are_skipped_and_told(
    npz: Path, tmp_path: Path, straight: Callable[[Path], Path], count: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The newest of two: on from the other one. Both: from the beginning."""
    folder = tmp_path / "run"
    with after_step(5, kill(signal.SIGTERM)):
        assert train(npz, folder, *AUTO) == 143
    found = list_checkpoints(folder / "checkpoints")
    assert [path.name[-1] for path in found] == ["3", "5"]
    for checkpoint in found[-count:]:
        damage(checkpoint)
    capsys.readouterr()
    assert train(npz, folder, *AUTO) == 0
    told = capsys.readouterr()
    assert told.err.count("does not match its checksum") == count
    assert f"steps {(3, 0)[count - 1]}..6" in told.out
    assert_same(folder, straight(npz))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--epochs", "3"), "epochs: 3: the run to resume has 2"),
        (("--precision", "bf16"), "precision: 'bf16': the run to resume has 'fp32'"),
    ],
)
def test_other_options_than_the_runs_are_refused(
    npz: Path, straight: Callable[[Path], Path], options: tuple[str, ...], named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = straight(npz)
    before = metrics(folder)
    assert train(npz, folder, *AUTO, *options) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith(f"cifar: {named}")
    assert metrics(folder) == before


def test_a_folder_of_something_else_is_left_alone(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    assert train(npz, tmp_path, *AUTO) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith(f"cifar: output-dir: '{tmp_path}': holds something else than a run")
    assert not (tmp_path / ".lock").exists()


def test_the_run_needs_a_folder(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar("train", *TINY_OPTIONS, "--data", f"npz:{npz}", *AUTO) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith("cifar: resume: 'auto': needs the folder") and "--output-dir" in line


def test_the_start_before_may_take_a_while_to_end(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(restart, "_LOOK_SECONDS", 0.01)
    with locked(folder), mock.patch.object(restart, "PATIENCE_SECONDS", 0.1):
        assert train(npz, folder, *AUTO) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith(f"cifar: resume: '{folder}': another process is training there")

    with contextlib.ExitStack() as held:
        held.enter_context(locked(folder))
        monkeypatch.setattr(restart.time, "sleep", lambda seconds: held.close())
        assert train(npz, folder, *AUTO, "--epochs", 1) == 0


@pytest.mark.multiprocess
def test_a_taken_folder_is_told_before_the_others_give_up(npz: Path, tmp_path: Path) -> None:
    """By the first process, which alone looks for it; they would say that it has not come."""
    folder, port = tmp_path / "run", free_port()
    folder.mkdir()
    words = ("train", "--cpu", *TINY_OPTIONS, "--data", f"npz:{npz}", *AUTO, "--output-dir", folder,
             "--meeting-timeout", 20)  # fmt: skip
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with locked(folder):
        first, second = (
            start("cifar", *words, environment={**where, "RANK": str(rank)}) for rank in (0, 1)
        )
        code, _, err = finish(first, seconds=100)
        assert second.poll() is None, second.communicate()
    second.kill()
    finish(second)
    (line,) = complaints(err)
    assert line.startswith(f"cifar: resume: '{folder}': another process is training there")
    assert code == 2


def test_a_learning_rate_that_was_found_is_kept(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(config: Any, *words: Any, **options: Any) -> Any:
        recipe = dataclasses.replace(config.recipe, lr=0.0625)
        return dataclasses.replace(config, recipe=recipe), {}

    monkeypatch.setattr("cifar.run.find_lr", find)
    auto = ("--lr", "auto", *AUTO)
    with after_step(4, kill(signal.SIGTERM)):
        assert train(npz, tmp_path / "run", *auto) == 143
    monkeypatch.setattr("cifar.run.find_lr", None)
    assert train(npz, tmp_path / "run", *auto) == 0
    assert read_config(tmp_path / "run").train.recipe.lr == 0.0625
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 6]


ORPHANED = """
import os, sys, time
from cifar.signals import end_with_launcher
end_with_launcher({"TORCHELASTIC_RUN_ID": "x"} if sys.argv[1] == "launched" else {})
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("how", ["launched", "alone"])
def test_a_process_whose_launcher_was_killed_is_told_to_end(how: str) -> None:
    parent = start("-c", PARENT, ORPHANED, how, module=False)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    child = os.pidfd_open(pid)
    parent.kill()
    has_ended = bool(select.select([child], [], [], 20 if how == "launched" else 0.5)[0])
    if not has_ended:
        signal.pidfd_send_signal(child, signal.SIGKILL)
    assert has_ended is (how == "launched")
    finish(parent)
    os.close(child)


def test_a_launcher_that_ends_before_the_kernel_was_asked_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parents, raised = iter([7, 1, 7, 7]), []
    monkeypatch.setattr("cifar.signals.ctypes.CDLL", mock.MagicMock())
    monkeypatch.setattr("cifar.signals.os.getppid", lambda: next(parents))
    monkeypatch.setattr("cifar.signals.signal.raise_signal", raised.append)
    end_with_launcher({"TORCHELASTIC_RUN_ID": "x"})
    assert raised == [signal.SIGTERM]
    end_with_launcher({"TORCHELASTIC_RUN_ID": "x"})
    assert raised == [signal.SIGTERM]


def test_without_a_launcher_nothing_is_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar.signals.ctypes.CDLL", None)
    end_with_launcher({})
    with pytest.raises(TypeError):
        end_with_launcher({"TORCHELASTIC_RUN_ID": "x"})


RESTARTED = """
import os, signal, sys
from cifar.commands import main
from cifar.trainer import Trainer
original = Trainer.train_step
def train_step(self):
    original(self)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if self.step == (4, 5, 0)[attempt] and self.place.index == 1 - attempt:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.train_step = train_step
sys.exit(main())
"""


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2)
ACCELERATE = ("accelerate.commands.launch", "--config_file", ROOT / "launch" / "ddp.yaml",
              "--num_processes", 2, "--main_process_port", 0,
              "--mixed_precision", "no")  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("launcher", "restarts"),
    [
        pytest.param(TORCHRUN, "--max-restarts", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, "--max_restarts", marks=pytest.mark.slow),
    ],
)
def test_killed_ranks_are_started_anew_and_go_on(
    npz: Path, tmp_path: Path, launcher: tuple[object, ...], restarts: str
) -> None:
    """The second rank in its fourth step, then the first in its fifth; equal to a run of two."""
    (tmp_path / "restarted.py").write_text(RESTARTED)
    words = ("train", "--cpu", "--model", "resnet20-w4", "-b", "32", "--epochs", "2", "--lr",
             "0.05", "--no-report", "--data", f"npz:{npz}", *AUTO, "--output-dir")  # fmt: skip
    once = {"CIFAR_RESTARTED": "1"}
    code, out, err = finish(
        start(*launcher, restarts, 2, tmp_path / "restarted.py", *words, tmp_path / "a",
              environment=once)
    )  # fmt: skip
    assert code == 0, err
    assert [f"steps {step}..6" in out for step in (0, 3)] == [True, True]
    code, _, err = finish(start(*launcher, "-m", "cifar", *words, tmp_path / "b", environment=once))
    assert code == 0, err
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    (_, killed), (_, whole) = (load_weights(tmp_path / each) for each in ("a", "b"))
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
