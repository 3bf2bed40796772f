"""A training run as a program does it: images, trainer, signals, and the group left at the end."""

import functools
import os
import sys
from pathlib import Path

from cifar import report
from cifar.accelerator import shortfall_of
from cifar.config import RunConfig, TrainConfig
from cifar.data.sources import load_dataset
from cifar.distributed import then_leave
from cifar.evaluation import Evaluation
from cifar.losses import ComputeLoss
from cifar.lr_finder import find_lr
from cifar.memory import explained_training
from cifar.process import differences
from cifar.range_test import RangeTest
from cifar.session import Session, resume_command
from cifar.signals import StopSignals
from cifar.trainer import Trainer
from cifar.updates import Update


def train(
    config: TrainConfig,
    run: RunConfig,
    folder: Path | None,
    *,
    resume: bool,
    range_test: RangeTest | None = None,
    compute_loss: ComputeLoss | None = None,
    update: Update | None = None,
) -> Evaluation:
    """Train as configured, writing to `folder` (None on processes that write nothing).

    With a range test the learning rate is the one that it finds. Loss and update are those of
    `cifar.trainer`; nothing on disk knows of others, so give them again to resume. Returns the
    evaluation of the final weights on the whole test split: those of the last epoch, or where the
    recipe has patience those of the best one on the validation images.

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
    resume: bool,
    range_test: RangeTest | None,
    compute_loss: ComputeLoss | None,
    update: Update | None,
) -> Evaluation:
    with explained_training(config):
        dataset = load_dataset(config.data)
        lr_files: report.Files = {}
        if range_test is not None:
            config, lr_files = find_lr(
                config, run, dataset, range_test, compute_loss=compute_loss, update=update
            )
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
                _tell_of_speed(trainer)  # after the last check: an error is one line on stderr
            return session.fit()


def _tell_of_speed(trainer: Trainer) -> None:
    """Say what makes this process slower than another one, or another speed than bench measures."""
    name, notes = trainer.config.precision, []
    assert name is not None, "a trainer has resolved it"
    if shortfall := shortfall_of(name, trainer.device):
        notes.append(shortfall)
    if different := differences(os.environ):
        notes.append(f"environment: {', '.join(different)}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
