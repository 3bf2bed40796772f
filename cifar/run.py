"""A training run as a program does it: images, trainer, signals, and the group left at the end."""

import functools
import os
import sys
from pathlib import Path
from typing import Literal

import torch

from cifar import report, run_folder
from cifar.accelerator import meet, runs_on_cpu
from cifar.checkpoint import newest_whole
from cifar.config import RunConfig, TrainConfig
from cifar.data.sources import load_dataset
from cifar.device_memory import explained_training
from cifar.distributed import explained_peers, reduce_max, then_leave
from cifar.evaluation import Evaluation
from cifar.losses import ComputeLoss
from cifar.lr_finder import find_lr
from cifar.precision import shortfall_of
from cifar.process import differences, has_nvidia_gpus
from cifar.pulse import PULSE
from cifar.range_test import RangeTest
from cifar.ranks import is_first, note_on_tasks
from cifar.session import Session, resume_command
from cifar.signals import StopSignals
from cifar.trainer import Trainer
from cifar.updates import Update
from cifar.weights import list_checkpoints

Resume = bool | Literal["auto"]
"""Whether to go on with the run in a folder; auto: if it has a checkpoint there."""


def train(
    config: TrainConfig,
    run: RunConfig,
    folder: Path | None,
    *,
    resume: Resume,
    range_test: RangeTest | None = None,
    compute_loss: ComputeLoss | None = None,
    update: Update | None = None,
) -> Evaluation:
    """Train as configured, writing to `folder` (None on processes that write nothing).

    With a range test the learning rate is the one that it finds, or has found when the run began.
    Loss and update are those of `cifar.trainer`; nothing on disk knows of others, so give them
    again to resume. Returns the evaluation of the final weights on the whole test split: those of
    the last epoch, or where the recipe has patience those of the best one on the validation images.

    Raises:
        UserError: bad input.
        TrainingError: training went wrong, the test found no learning rate, or there is too little
            memory.
        Stopped: by a signal, after saving.
    """
    return then_leave(
        functools.partial(
            _train,
            config,
            run,
            folder,
            resume=resume,
            range_test=range_test,
            compute_loss=compute_loss,
            update=update,
        )
    )


def _train(
    config: TrainConfig,
    run: RunConfig,
    folder: Path | None,
    *,
    resume: Resume,
    range_test: RangeTest | None,
    compute_loss: ComputeLoss | None,
    update: Update | None,
) -> Evaluation:
    with explained_training(config), explained_peers():
        told = {"resume": resume} | ({"lr": "auto"} if range_test else {})
        meet(config, run, **told)  # who cannot be met is told before images are read
        if resume == "auto":
            assert folder is not None, "that decides"
            config, resume = found_there(folder, config, run)
        with PULSE.during("reading images"):
            dataset = load_dataset(config.data)
        lr_files: report.Files = {}
        if range_test is not None and not resume:
            config, lr_files = find_lr(
                config, run, dataset, range_test, compute_loss=compute_loss, update=update
            )
        with PULSE.during("building the model"):  # whose weights may have to be fetched
            trainer = Trainer(
                config, run, dataset, compute_loss=compute_loss, update=update, is_resumed=resume
            )
        # Until here a signal ends the process, there is nothing to save.
        remedy = resume_command(folder) if trainer.is_main else ""
        with StopSignals(remedy) as signals:
            session = Session(trainer, folder, signals)
            if resume:
                session.resume()
            else:
                session.begin(lr_files)
            if trainer.is_main:
                _tell_of_place(trainer)  # after the last check: an error is one line on stderr
            return session.fit()


def found_there(folder: Path, config: TrainConfig, run: RunConfig) -> tuple[TrainConfig, bool]:
    """What to train, and whether to go on with it: the first process looks, for all.

    The run's own configuration knows what was resolved or found when it began.
    """
    found = 0
    if is_first(os.environ):
        whole, faults = newest_whole(list_checkpoints(folder / "checkpoints"))
        found = int(whole is not None)
        for fault in () if found else faults:  # else the session that goes on from it tells
            print(f"warning: {fault}", file=sys.stderr, flush=True)
    device = torch.device("cpu" if runs_on_cpu(run) else "cuda")
    with PULSE.waiting():
        is_found = bool(reduce_max(torch.tensor(found, device=device)))
    if not is_found:
        return config, False
    return run_folder.read_config(folder).train, True


def _tell_of_place(trainer: Trainer) -> None:
    """Say what makes this process slower than another one, or than bench measures, or alone."""
    name, notes = trainer.config.precision, []
    assert name is not None, "a trainer has resolved it"
    if shortfall := shortfall_of(name, trainer.device):
        notes.append(shortfall)
    if _leaves_gpus_out(trainer):
        notes.append(
            f"device: cpu: this machine has NVIDIA GPUs, and torch for CUDA {torch.version.cuda} "
            "cannot use them; renew their driver, give them to this container, or give --cpu"
        )
    if note := note_on_tasks(os.environ):
        notes.append(note)
    if different := differences(os.environ):
        notes.append(f"environment: {', '.join(different)}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _leaves_gpus_out(trainer: Trainer) -> bool:
    """Whether it trains on a CPU beside GPUs that nobody has hidden."""
    wanted = trainer.device.type == "cpu" and not trainer.run.cpu and torch.version.cuda
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return bool(wanted) and shown[:1] not in ("", "-") and has_nvidia_gpus()
