"""One process's part in a training run: the loop, its files, and its progress."""

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cifar import checkpoint, report, run_folder
from cifar.config import TrainConfig
from cifar.data.config import DataConfig
from cifar.device_memory import explained_training, reset_peak_memory
from cifar.distributed import barrier, broadcast_from_first, explained_peers
from cifar.errors import CheckpointError, CifarError, Stopped, TrainingError
from cifar.evaluation import Evaluation
from cifar.outcome import Outcome
from cifar.progress import TrainingProgress
from cifar.pulse import PULSE
from cifar.serialize import contents
from cifar.signals import StopSignals
from cifar.sync_batch_norm import batch_norm_of
from cifar.trainer import Trainer
from cifar.training_state import card_of, load_state, state_of, tensor_groups
from cifar.weights import list_checkpoints


def resume_command(folder: Path | None) -> str:
    """What to do about a run that was stopped; nothing where that is not known."""
    return f"continue with: cifar train --resume {shlex.quote(str(folder))}" if folder else ""


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CifarError(
            f"checkpoint: {folder}: cannot be written: {error.strerror}; make room, then continue "
            "with --resume"
        ) from None


def _but_for_images(config: TrainConfig) -> Any:
    """What a configuration holds, without where its images lie: a fingerprint tells them apart."""
    return contents(dataclasses.replace(config, data=DataConfig()))


class Session:
    """One process's part in a run; only the first process writes and prints."""

    def __init__(self, trainer: Trainer, folder: Path | None, signals: StopSignals) -> None:
        self.trainer = trainer
        self.root = folder
        self.folder = folder if trainer.is_main else None
        self._signals = signals
        self._seconds = 0.0
        self._since = time.monotonic()
        self._outcome = Outcome(trainer, self._stop_if_asked)
        self._progress = TrainingProgress(
            trainer.total_steps,
            trainer.loader.steps_per_epoch,
            trainer.loader.global_batch_size,
            enabled=trainer.is_main,
        )

    def begin(self, lr_files: report.Files) -> None:
        """Note the configuration of a new run, and how its learning rate was found."""
        if self.folder is None:
            return
        run_folder.write_config(self.folder, self.trainer.config, self.trainer.run)
        run_folder.rewind_metrics(self.folder, 0)  # of a start none of whose checkpoints is whole
        if lr_files:
            folder = self.folder / "lr-find"
            with _writing(folder):
                report.write_files(folder, lr_files)

    def fit(self) -> Evaluation:
        """Train the remaining steps; every epoch ends with a checkpoint and an evaluation.

        Raises:
            TrainingError: training went wrong; says what the first process has saved.
            Stopped: by a signal, after saving.
        """
        try:
            with explained_training(self.trainer.config), explained_peers():
                return self._fit()
        except TrainingError as error:
            raise type(error)(f"{error}; {self._saved()}") from None

    def _saved(self) -> str:
        if self.folder is None:
            return "what was saved stays"
        found = list_checkpoints(self.folder / "checkpoints")
        if not found:
            return "nothing was saved yet"
        return f"continue from step {checkpoint.step_of(found[-1])} with --resume"

    def _fit(self) -> Evaluation:
        trainer = self.trainer
        with self._progress as progress:
            progress.say(self._headline())
            progress.start_at(trainer.step)
            self._since = time.monotonic()
            reset_peak_memory(trainer.device)
            if trainer.step and self._epoch_is_over():  # its checkpoint precedes its evaluation
                self._end_epoch()
            while not self._outcome.is_over:
                trainer.train_step()
                self._after_step()
                progress.update(trainer.step)
            return self._finish()

    def _headline(self) -> str:
        trainer, config = self.trainer, self.trainer.config
        dataset = trainer.dataset
        held_out = f"{len(dataset.validation):,} validation, " if dataset.validation else ""
        return (
            f"{trainer.model_config.label} on {dataset.name} "
            f"({len(dataset.train):,} train, {held_out}{len(dataset.test):,} test images), "
            + (f"taught by {trainer.teacher.model_config.label}, " if trainer.teacher else "")
            + f"{config.precision}, {trainer.place.count} x {trainer.device.type}"
            + (f" under {trainer.strategy}" if trainer.engine.shares_out else "")
            + f", global batch {trainer.loader.global_batch_size}, "
            f"steps {trainer.step}..{trainer.total_steps}"
            + self._exchange()
            + (f", in {self.root}" if self.root else "")
        )

    def _exchange(self) -> str:
        """What several processes share beside their gradients, and how those are averaged."""
        trainer = self.trainer
        if trainer.place.count == 1:
            return ""
        norms = batch_norm_of(trainer.module)
        how = trainer.config.parallel.label
        return (f", BatchNorm {norms}" if norms else "") + (f", {how}" if how else "")

    def _epoch_is_over(self) -> bool:
        return self.trainer.step % self.trainer.loader.steps_per_epoch == 0

    def _after_step(self) -> None:
        trainer, every = self.trainer, self.trainer.run.save_every
        epoch_ends = self._epoch_is_over()
        saves = epoch_ends or (every is not None and trainer.step % every == 0)
        alone = trainer.place.count == 1
        stop = 0
        if saves or trainer.step % trainer.check_every == 0 or (alone and self._signals.received):
            stop = trainer.check(self._signals.received)
        if saves or stop:
            self._save()
        if stop:
            self._stop(stop)
        if epoch_ends:
            self._end_epoch()
        elif saves:
            self._prune()

    def _stop(self, signal: int) -> None:
        """Leave together with all processes, which have agreed on it and saved."""
        barrier()  # a launcher ends the others as soon as one is gone, also while it writes
        told = [f"stopped by signal {signal} after step {self.trainer.step}"]
        told += [command] if (command := resume_command(self.root)) else []
        raise Stopped(signal, "; ".join(told))

    def _stop_if_asked(self) -> None:
        if stop := self.trainer.check(self._signals.received):
            self._stop(stop)

    def _end_epoch(self) -> None:
        """Evaluate the weights just saved and write the epoch's line."""
        trainer = self.trainer
        self._seconds += time.monotonic() - self._since
        seconds, metrics = trainer.meter.slowest(self._seconds), trainer.meter.train_metrics()
        scores = self._score()
        line = {
            "epoch": trainer.epoch,
            "step": trainer.step,
            "samples_seen": trainer.samples_seen,
            "lr": trainer.lr_of(trainer.step - 1),
            "train_loss": metrics.loss,
            "train_top1": metrics.top1,
            "train_seconds": seconds,
            "train_images_per_s": metrics.samples / seconds,
            **scores,
            "skipped_steps": trainer.meter.skipped_steps,
        }
        trainer.meter.reset()
        if self.folder:
            run_folder.append_metrics(self.folder, line)
        self._prune()
        self._progress.epoch(line)
        self._seconds, self._since = 0.0, time.monotonic()

    def _score(self) -> dict[str, float]:
        """Score the epoch; weights that are no good any more are not kept."""
        try:
            return self._outcome.score()
        except TrainingError:
            if self.folder:
                folder = self._checkpoint_folder()
                with _writing(folder):
                    checkpoint.remove_folder(folder)
            raise

    def _checkpoint_folder(self) -> Path:
        assert self.root is not None
        return checkpoint.checkpoint_folder(self.root / "checkpoints", self.trainer.step)

    def _save(self) -> None:
        """Write a checkpoint; at the end of an epoch its evaluation is still to come."""
        self._seconds += time.monotonic() - self._since
        tensors, state = state_of(self.trainer, self._seconds, self._outcome.selection)
        if self.folder:
            folder = self._checkpoint_folder()
            with _writing(folder), PULSE.during("writing a checkpoint"):
                checkpoint.write_checkpoint(folder, tensors, card_of(self.trainer), state)
        barrier()  # else the others' clocks run while the first process writes
        self._since = time.monotonic()

    def _prune(self) -> None:
        """Delete old checkpoints, once the newest is known to be good."""
        if self.folder:
            folder = self._checkpoint_folder()
            with _writing(folder):
                checkpoint.prune(folder, self.trainer.run.keep_checkpoints)

    def _finish(self) -> Evaluation:
        """Write the final weights and the report on them."""
        result = self._outcome.settle(self._progress.say)
        with PULSE.during("writing the final weights"):
            self._write_final()
        self._stop_if_asked()
        if self.folder and self.trainer.run.report:
            with PULSE.during("writing the report"):
                self._write_report(self.folder)
        barrier()
        return result

    def _write_report(self, folder: Path) -> None:
        metrics = run_folder.read_metrics(folder)
        compared = self._outcome.compare(folder / "final", metrics)
        files = {**self._outcome.report(metrics), **report.comparison_files(compared)}
        with _writing(folder / "report"):
            report.write_files(folder / "report", files)

    def _write_final(self) -> None:
        tensors, card = self._outcome.final()
        if self.folder:
            folder = self.folder / "final"
            with _writing(folder):
                checkpoint.write_checkpoint(folder, tensors, card)

    def resume(self) -> None:
        """Continue from the newest checkpoint that is whole; a damaged one is passed over.

        Raises:
            CheckpointError: there is no whole checkpoint, or it does not fit this run.
        """
        assert self.root is not None
        trainer = self.trainer
        where, files = self._newest_checkpoint(self.root / "checkpoints")
        state, card = checkpoint.read_state(files, where), checkpoint.read_card(files, where)
        own = card_of(trainer)
        same_images = card.fingerprint == own.fingerprint  # else that is what there is to say
        if same_images and _but_for_images(card.config) != _but_for_images(own.config):
            raise CheckpointError(
                f"checkpoint: {where}: of another configuration than {run_folder.CONFIG} of its "
                "run; put back the one it was started with"
            )
        groups = tensor_groups(trainer, state)
        tensors = {group: checkpoint.read_tensors(files, group, where) for group in groups}
        load_state(trainer, tensors, state, self._outcome.selection)
        self._seconds = state.epoch_seconds
        if self.folder:
            # The line of an epoch that is just over is written anew.
            run_folder.rewind_metrics(self.folder, trainer.step - self._epoch_is_over())

    def _newest_checkpoint(self, root: Path) -> tuple[Path, dict[str, bytes]]:
        """Chosen by the first process, for the others may see the folder differently."""
        chosen: tuple[Path, dict[str, bytes]] | None = None
        faults: list[str] = []
        if self.trainer.is_main:
            chosen, faults = checkpoint.newest_whole(list_checkpoints(root))
        step = torch.tensor(
            -1 if chosen is None else checkpoint.step_of(chosen[0]), device=self.trainer.device
        )
        broadcast_from_first([step])
        with PULSE.waiting():
            number = int(step)
        if number < 0:
            reason = "".join(f" ({fault.partition(';')[0]})" for fault in faults[:1])
            raise CheckpointError(
                f"resume: '{root}': no whole checkpoint there{reason}; remove it and start a new "
                "run"
            )
        for fault in faults:
            print(f"warning: {fault}", file=sys.stderr, flush=True)
        if chosen is None:
            folder = checkpoint.checkpoint_folder(root, number)
            chosen = folder, checkpoint.read_folder(folder)
        return chosen
