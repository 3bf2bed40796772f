"""What the tests of the trainer share: tiny trainers, and the program run in this process."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import make_dataset
from torch import Tensor, nn

from cifar.checkpoint import write_checkpoint
from cifar.cli import run_program
from cifar.commands import COMMANDS, SUMMARY
from cifar.config import Distillation, ModelConfig, Recipe, RunConfig, TrainConfig
from cifar.config.distillation import find_teacher
from cifar.data.dataset import Dataset, Split
from cifar.data.loader import TrainBatch
from cifar.losses import cross_entropy
from cifar.process import worker_environment
from cifar.trainer import Trainer
from cifar.training_state import card_of

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(name="resnet20", width=4)
TINY_OPTIONS = ("--model", "resnet20-w4", "-b", "32", "--epochs", "2", "--lr", "0.05",
                "--no-report")  # fmt: skip
"""Three steps an epoch on the toy data set of 96 images."""
CLOCK = ("train_seconds", "train_images_per_s")
"""The keys of a metrics line that hold wall time."""


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, so that the next trainer may have another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)


def tiny_recipe(**fields: Any) -> Recipe:
    return Recipe(**{"epochs": 2, "global_batch_size": 32, "lr": 0.05, **fields})


def mixup(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """https://arxiv.org/abs/1710.09412 with partners from the same global batch."""
    partners = batch.load_partners()
    hard, other = (F.one_hot(each.targets, 10).float() for each in (batch, partners))
    images, targets = batch.images.lerp(partners.images, 0.3), hard.lerp(other, 0.3)
    return cross_entropy(0.0)(model, dataclasses.replace(batch, images=images, targets=targets))


def make_trainer(
    recipe: Recipe | None = None,
    *,
    data: Dataset | None = None,
    run: RunConfig = RunConfig(cpu=True),
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> Trainer:
    reset_accelerate()
    chosen = TrainConfig(**{"model": TINY, "recipe": recipe or tiny_recipe(), **config})
    return Trainer(chosen, run, data or make_dataset(), **(trainer or {}))


def rescaled() -> Dataset:
    """The toy images darker and of less contrast, in every channel by another factor."""
    factors = np.array([0.5, 0.3, 0.7])[:, None, None]

    def darker(split: Split) -> Split:
        return dataclasses.replace(split, images=(split.images * factors).astype(np.uint8))

    dataset = make_dataset()
    return dataclasses.replace(dataset, train=darker(dataset.train), test=darker(dataset.test))


def save_weights(folder: Path, trainer: Trainer) -> Path:
    """A checkpoint of a trainer's weights alone; its folder."""
    write_checkpoint(folder, {"model": trainer.weights()}, card_of(trainer))
    return folder


def taught_by(checkpoint: Path, **fields: float) -> Distillation:
    return Distillation(teacher=find_teacher(checkpoint), **fields)


def cifar(*words: object) -> int:
    """Run the program in this process; its exit code."""
    reset_accelerate()
    with mock.patch.dict(os.environ, worker_environment(1, {})):
        return run_program("cifar", SUMMARY, COMMANDS, [str(word) for word in words])


def train(npz: Path, output: Path, *options: object) -> int:
    """`cifar train` on the toy data set."""
    return cifar("train", "--cpu", "--data", f"npz:{npz}", "--output-dir", output, *TINY_OPTIONS,
                 *options)  # fmt: skip


def resume(output: Path, *options: object) -> int:
    return cifar("train", "--resume", output, *options)


@contextlib.contextmanager
def after_step(step: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something when `step` steps are done, before the trainer's loop looks at it."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        original(self)
        if self.step == step:
            action()

    with mock.patch.object(Trainer, "train_step", train_step):
        yield


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """While entered, a program that waits for the GPU is an error; afterwards it may again.

    The first change of the mode warns that it is a prototype feature, after it has made it.
    """
    torch.cuda.synchronize()
    try:
        _set_sync_mode("error")
        yield
    finally:
        _set_sync_mode("default")


def _set_sync_mode(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode(mode)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def start(*words: object, module: bool = True, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m WORDS` as a process of its own."""
    argv = [sys.executable, *(["-m"] if module else []), *map(str, words)]
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **here, **options.pop("environment", {})}
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    """Wait for a process; its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()  # or its pipes are a warning in another test
        raise
    return process.returncode, out, err


def complaints(err: str) -> list[str]:
    """The lines that the program itself wrote to stderr."""
    return [line for line in err.splitlines() if line.startswith("cifar:")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for their wall times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]
