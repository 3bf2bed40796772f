"""The training of a learning-rate range test, see `cifar.range_test`."""

import dataclasses
import gc
import os

import torch
from torch import Tensor, nn

from cifar.accelerator import meet
from cifar.config import RunConfig, TrainConfig
from cifar.data.dataset import Dataset
from cifar.data.sources import load_dataset
from cifar.device_memory import explained_training
from cifar.distributed import barrier, explained_peers, reduce_sum, then_leave
from cifar.errors import Stopped
from cifar.losses import ComputeLoss
from cifar.meter import Meter
from cifar.progress import TrainingProgress
from cifar.pulse import PULSE
from cifar.range_test import Curve, RangeTest, told, tuned
from cifar.ranks import is_first
from cifar.report import Files, range_test_files
from cifar.signals import StopSignals
from cifar.trainer import Trainer
from cifar.updates import Update


class Losses(Meter):
    """Keeps the loss of every micro-batch on the device, instead of sums."""

    def __init__(self, device: torch.device, processes: int, parts: int) -> None:
        """Of steps with `parts` micro-batches on each of so many processes."""
        super().__init__(device)
        self._processes, self._parts = processes, parts
        self._kept: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, step: int) -> None:  # noqa: ARG002
        """Keep the mean loss of one micro-batch."""
        self._kept.append(loss)

    def read(self) -> list[float]:
        """The mean losses of the steps since the last reading, over all processes.

        A collective call that waits for the device.
        """
        losses = torch.stack(self._kept).double().view(-1, self._parts).mean(1)
        self._kept = []
        with PULSE.waiting():
            means: list[float] = (reduce_sum(losses) / self._processes).tolist()
        return means


class Guessing(nn.Module):
    """A network that finds all classes equally likely."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, C, H, W]`."""
        return images.new_zeros(len(images), self._num_classes)


class RisingTrainer(Trainer):
    """A trainer whose learning rate rises as in a range test; nothing else has a schedule.

    Nor is anything frozen, for the rate is that of the whole network.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunConfig,
        dataset: Dataset,
        test: RangeTest,
        *,
        compute_loss: ComputeLoss | None = None,
        update: Update | None = None,
    ) -> None:
        """See `Trainer`."""
        recipe = dataclasses.replace(
            config.recipe, schedule="constant", ema_decay=0.0, frozen_epochs=0
        )
        config = dataclasses.replace(config, recipe=recipe)
        super().__init__(config, run, dataset, compute_loss=compute_loss, update=update)
        self.test = test
        self.total_steps = test.steps
        self.meter = self.losses = Losses(self.device, self.place.count, config.accumulation_steps)

    def lr_of(self, step: int) -> float:
        """The learning rate of the 0-based optimiser step `step`."""
        return self.test.lr_of(step)

    @torch.no_grad()
    def loss_of_guessing(self) -> float:
        """The loss of the first step's images if the network knew nothing; a collective call."""
        guessing = Guessing(self.model_config.num_classes)
        for batch in self.batches_of(0):
            loss, logits = self.compute_loss(guessing, batch)
            self.losses.add(loss, logits, batch.targets, 0)
        (loss_of_step,) = self.losses.read()
        return loss_of_step


def find_curve(
    config: TrainConfig,
    run: RunConfig,
    dataset: Dataset,
    test: RangeTest,
    *,
    compute_loss: ComputeLoss | None = None,
    update: Update | None = None,
) -> Curve:
    """Make a range test with a network of its own; all processes get the same curve.

    Its steps are those of a training with this configuration, seed included, but for the learning
    rate and the momentum, which stays the recipe's. Of Muon the step of the convolutions rises in
    proportion. SAM's loss is that of its first pass; in fp16 a loss counts though its step is
    skipped.

    Raises:
        UserError: the configuration does not fit the data, the processes or the device.
        Stopped: by a signal.
    """
    trainer = RisingTrainer(config, run, dataset, test, compute_loss=compute_loss, update=update)
    with StopSignals() as signals:
        curve = _follow(trainer, signals)
    del trainer
    gc.collect()  # it may refer to itself, and the next one needs its memory
    return curve


def _follow(trainer: RisingTrainer, signals: StopSignals) -> Curve:
    """Train until the curve is over; losses are read as often as a training is checked."""
    test, curve = trainer.test, Curve(trainer.test, trainer.loss_of_guessing())
    alone = trainer.place.count == 1
    batch = trainer.loader.global_batch_size
    with TrainingProgress(test.steps, test.steps, batch, enabled=trainer.is_main) as progress:
        progress.say(
            f"range test of {trainer.model_config.label} on {trainer.dataset.name}: {test.steps} "
            f"steps, learning rates {test.lowest:g} to {test.highest:g}, global batch {batch}"
        )
        while not curve.is_over:
            trainer.train_step()
            due = trainer.step % trainer.check_every == 0 or trainer.step == test.steps
            if due or (alone and signals.received):
                if stop := trainer.losses.health(signals.received).signal:
                    _stop(stop, trainer.step)
                for loss in trainer.losses.read():
                    curve.add(loss)
            progress.update(trainer.step)
    return curve


def _stop(signal: int, step: int) -> None:
    """Leave together with all processes, which have agreed on it."""
    barrier()  # a launcher ends the others as soon as one is gone
    raise Stopped(
        signal, f"stopped by signal {signal} after step {step} of the range test; nothing is kept"
    )


def find_lr(
    config: TrainConfig,
    run: RunConfig,
    dataset: Dataset,
    test: RangeTest,
    *,
    compute_loss: ComputeLoss | None = None,
    update: Update | None = None,
) -> tuple[TrainConfig, Files]:
    """The configuration with the learning rate that a range test suggests, and its curve's files.

    The first process alone gets files. Raises as `find_curve` and `cifar.range_test.tuned`.
    """
    curve = find_curve(config, run, dataset, test, compute_loss=compute_loss, update=update)
    found = tuned(config, curve)
    if not is_first(os.environ):
        return found, {}
    print(f"range test: trains with {told(found)}", flush=True)
    return found, range_test_files(curve, config, found, _what(config, dataset))


def explore(config: TrainConfig, run: RunConfig, test: RangeTest) -> tuple[Curve, str]:
    """A range test by itself: its curve, and which model on which images it is of.

    Raises:
        UserError: bad input.
        TrainingError: there is too little memory.
        Stopped: by a signal.
    """

    def found() -> tuple[Curve, str]:
        with explained_training(config), explained_peers():
            meet(config, run)
            dataset = load_dataset(config.data)
            return find_curve(config, run, dataset, test), _what(config, dataset)

    return then_leave(found)


def _what(config: TrainConfig, dataset: Dataset) -> str:
    return f"{config.model.label} on {dataset.name}"
