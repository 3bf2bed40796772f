"""The trainer: one optimiser step, the health of a run, evaluation, and the state to save.

How the loss is computed and how the weights are updated are two functions that can be replaced,
see `ComputeLoss` and `Update`.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.accelerator import start_accelerator
from cifar.checkpoint import ModelCard, Tensors, TrainState, check_same_shapes, load_into
from cifar.config import RunConfig, TrainConfig
from cifar.data.dataset import Dataset, Split
from cifar.data.loader import (
    Batch,
    DeviceImages,
    Normalization,
    Place,
    TrainBatch,
    TrainLoader,
    eval_batch_size,
    eval_batches,
)
from cifar.distributed import broadcast_from_first
from cifar.emulation import emulate_if_needed
from cifar.errors import CheckpointError, ConfigError, TrainingError
from cifar.evaluation import Evaluation, evaluate
from cifar.meter import Meter
from cifar.models import build_model
from cifar.optim import (
    WeightAverage,
    build_optimizer,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
)

ComputeLoss = Callable[[nn.Module, TrainBatch], tuple[Tensor, Tensor]]
"""(model, batch) -> (mean loss, logits `[B, K]`); the batch can load partners to be mixed with."""
Update = Callable[["Trainer", Callable[[], None]], None]
"""(trainer, forward_backward) -> None: fill gradients by `forward_backward`, once or more often
(the metrics count the first time), and change the weights."""


def cross_entropy(label_smoothing: float) -> ComputeLoss:
    """Cross-entropy with hard or soft targets."""

    def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        return F.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing), logits

    return compute_loss


def descend(trainer: "Trainer", forward_backward: Callable[[], None]) -> None:
    """One step along the gradient."""
    trainer.optimizer.zero_grad(set_to_none=True)
    forward_backward()
    trainer.optimizer_step()


class Trainer:
    """A model in training on this process's device.

    `step` counts finished optimiser steps; the learning rate, the samples of a step and their
    augmentation follow from it, so a run that is resumed goes on as if it had never stopped.
    `emulated` tells whether fp32 kernels compute its bf16, see `cifar.emulation`.

    Raises:
        ConfigError: the configuration does not fit the data or the processes that were started.
        UnsupportedError: the device or the stack cannot run it as asked.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunConfig,
        dataset: Dataset,
        *,
        train_samples: int | None = None,
        compute_loss: ComputeLoss | None = None,
        update: Update = descend,
    ) -> None:
        self.accelerator, precision = start_accelerator(config, run)
        self.config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
        self.run, self.dataset = run, dataset
        self.fingerprint = dataset.fingerprint()
        self.device: torch.device = self.accelerator.device
        self.place = Place(self.accelerator.process_index, self.accelerator.num_processes)
        self.compute_loss = compute_loss or cross_entropy(config.recipe.label_smoothing)
        self._update = update
        self._build_data()
        self._build_model()
        self.total_steps = self._plan_steps(train_samples)
        self.step = 0
        self.meter = Meter(self.device)
        self.check_every = run.check_every or self._default_interval()

    def _build_data(self) -> None:
        recipe, dataset = self.config.recipe, self.dataset
        per_device = self.config.per_device_batch_size(self.place.count)
        if recipe.global_batch_size > len(dataset.train):
            raise ConfigError(
                f"batch-size: {recipe.global_batch_size}: larger than the {len(dataset.train)} "
                f"training images of {dataset.name}; give at most that many"
            )
        self.normalization = Normalization.of(dataset.train)

        def on_device(split: Split) -> DeviceImages:
            nhwc = self.config.channels_last
            return DeviceImages(split, self.normalization, self.device, channels_last=nhwc)

        self.loader = TrainLoader(
            on_device(dataset.train),
            recipe,
            per_device_batch_size=per_device,
            accumulation_steps=self.config.accumulation_steps,
            place=self.place,
            seed=self.config.seed,
        )
        self.test_images = on_device(dataset.test)
        self._eval_batch_size = eval_batch_size(self.test_images)

    def _build_model(self) -> None:
        config = self.config
        self.model_config = dataclasses.replace(
            config.model,
            num_classes=len(self.dataset.classes),
            in_channels=self.dataset.train.images.shape[1],
        )
        torch.manual_seed(config.seed)
        self.module = build_model(self.model_config).to(self.device)
        if config.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.emulated = emulate_if_needed(self.module, config.precision, self.device)
        with warnings.catch_warnings():
            # torch 2.15 renames the option, Accelerate knows the old name alone
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            wrapped = self.accelerator.prepare_model(self.module)
        self.wrapped = wrapped
        self._no_sync = getattr(wrapped, "no_sync", contextlib.nullcontext)
        if config.compile:
            wrapped = cast(nn.Module, torch.compile(wrapped, mode=config.compile_mode))
        self.model: nn.Module = wrapped
        # Not prepared: Accelerate's wrapper costs more than a small net's optimiser step.
        self.optimizer = build_optimizer(self.module, config.recipe)
        self.scaler = self.accelerator.scaler
        decay = config.recipe.ema_decay
        self.average = WeightAverage(self.weights(), decay) if decay else None

    def _default_interval(self) -> int:
        """Steps between checks: processes on CPUs agree at every one, for theirs are long."""
        if self.device.type == "cuda":
            return 20
        return 10 if self.place.count == 1 else 1

    def _plan_steps(self, train_samples: int | None) -> int:
        if train_samples is None:
            return self.config.recipe.epochs * self.loader.steps_per_epoch
        return train_samples // self.loader.global_batch_size

    @property
    def samples_seen(self) -> int:
        """Training samples over all processes since the start of the run."""
        return self.step * self.loader.global_batch_size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.place.index == 0

    def weights(self) -> Tensors:
        """The full weights and buffers by name, without wrapper prefixes; views, not copies."""
        return self.module.state_dict()

    def eval_weights(self) -> Tensors:
        """The weights to evaluate and publish: their average where there is one."""
        return self.average.weights if self.average else self.weights()

    def lr_of(self, step: int) -> float:
        """The learning rate of the 0-based optimiser step `step`."""
        return lr_at(step, self.total_steps, self.loader.steps_per_epoch, self.config.recipe)

    def batches_of(self, step: int) -> list[TrainBatch]:
        """This process's augmented micro-batches of the 0-based optimiser step `step`."""
        epoch, position = divmod(step, self.loader.steps_per_epoch)
        if epoch != self.loader.epoch:
            self.loader.set_epoch(epoch)
        return list(self.loader.micro_batches(position))

    def train_step(self) -> None:
        """Load the next global batch and take one optimiser step.

        Reads nothing from the device, but whether a step of Muon overflowed in fp16.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_of(self.step)
        if self.model_config.dropout:
            # The generators' state then needs no saving, on any number of processes.
            torch.manual_seed(hash((self.config.seed, self.step, self.place.index)) % 2**63)
        batches = self.batches_of(self.step)
        passes = iter(range(2**31))
        self._update(self, lambda: self._forward_backward(batches, record=next(passes) == 0))
        self.step += 1
        if self.average:
            self.average.update()

    def _forward_backward(self, batches: list[TrainBatch], *, record: bool) -> None:
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                loss, logits = self.compute_loss(self.model, batch)
                self.accelerator.backward(loss / len(batches) if len(batches) > 1 else loss)
            if record:
                self.meter.add(loss.detach(), logits.detach(), batch.targets, self.step)

    def optimizer_step(self) -> None:
        """Apply the gradients; in fp16 unscale them first and skip the step if they overflowed."""
        if self.scaler is None:
            self.optimizer.step()
            return
        before = self.scaler._scale.clone()  # get_scale() would wait for the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.meter.add_skip(self.scaler._scale < before)

    def check(self, signal: int = 0) -> int:
        """Agree with all processes on the state of the run; returns the signal to stop for, or 0.

        Raises:
            TrainingError: a loss was not finite, or too many fp16 steps in a row were skipped.
        """
        health = self.meter.health(signal)
        if health.bad_step is not None:
            raise TrainingError(
                f"loss: not finite in step {health.bad_step + 1}: training stopped; lower --lr or "
                "change --precision"
            )
        if health.skipped_in_a_row >= self.run.max_skipped_steps:
            raise TrainingError(
                f"fp16: {health.skipped_in_a_row} steps in a row were skipped by step {self.step}: "
                "training stopped; use --precision bf16"
            )
        return health.signal

    @torch.no_grad()
    def evaluate(self, between_batches: Callable[[], object] = lambda: None) -> Evaluation:
        """Score the test split with the published weights and this run's precision and layout.

        `between_batches` is called equally often on all processes, so it may be a collective call.
        """
        self.synchronize_buffers()
        self.module.eval()
        weights = self.eval_weights()

        def forward(images: Tensor) -> Tensor:
            if self.average is None:
                return self.module(images)  # type: ignore[no-any-return]
            return torch.func.functional_call(self.module, weights, (images,))  # type: ignore[no-any-return]

        result = evaluate(
            forward,
            self._eval_batches(between_batches),
            num_classes=len(self.dataset.classes),
            device=self.device,
        )
        self.module.train()
        assert result.samples == len(self.test_images), "every test sample counts once"
        return result

    def _eval_batches(self, between: Callable[[], object]) -> Iterator[Batch]:
        everywhere = len(self.test_images) // self.place.count // self._eval_batch_size
        batches = eval_batches(self.test_images, self._eval_batch_size, self.place)
        for number, batch in enumerate(batches):
            if 0 < number < everywhere:
                between()
            yield batch

    def synchronize_buffers(self) -> None:
        """Give every process the first one's BatchNorm statistics."""
        tensors = [*self.module.buffers()]
        if self.average:
            tensors += [self.average.weights[name] for name, _ in self.module.named_buffers()]
        broadcast_from_first(tensors)

    def card(self, *, averaged: bool = False) -> ModelCard:
        """What the weights are, for the folder they are saved in (`averaged`: see `ModelCard`)."""
        return ModelCard(
            config=dataclasses.replace(self.config, model=self.model_config),
            averaged=averaged,
            dataset=self.dataset.name,
            fingerprint=self.fingerprint,
            classes=self.dataset.classes,
            image_size=tuple(self.dataset.train.images.shape[2:]),
            mean=self.normalization.mean,
            std=self.normalization.std,
            step=self.step,
            samples_seen=self.samples_seen,
        )

    @property
    def tensor_groups(self) -> tuple[str, ...]:
        """The groups of tensors in a state."""
        return ("model", "optimizer", "ema") if self.average else ("model", "optimizer")

    def state(self, epoch_seconds: float = 0.0) -> tuple[dict[str, Tensors], TrainState]:
        """Everything that the rest of the run depends on: tensors by group, and counters.

        Raises:
            TrainingError: a weight is not finite, so the state is not worth keeping.
        """
        self.synchronize_buffers()
        tensors = {"model": self.weights(), "optimizer": optimizer_tensors(self.optimizer)}
        if self.average:
            tensors["ema"] = self.average.weights
        for name, tensor in tensors["model"].items():
            if not bool(tensor.isfinite().all()):
                raise TrainingError(
                    f"weights: {name} is not finite after step {self.step}: training stopped; "
                    "lower --lr or change --precision"
                )
        return tensors, TrainState(
            format=1,
            step=self.step,
            total_steps=self.total_steps,
            fingerprint=self.fingerprint,
            meter=self.meter.state(),
            ema_updates=self.average.updates if self.average else 0,
            scaler=self.scaler.state_dict() if self.scaler is not None else None,
            epoch_seconds=epoch_seconds,
        )

    def load_state(self, tensors: dict[str, Tensors], state: TrainState) -> None:
        """Take up a saved state.

        Raises:
            CheckpointError: it is of another model, data set, precision or length of run.
        """
        if state.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"data: {self.dataset.name}: not the images this run was started with "
                f"(fingerprint {self.fingerprint}, must be {state.fingerprint}); put them back, or "
                "start a new run"
            )
        if state.total_steps != self.total_steps:
            raise CheckpointError(
                f"steps: {self.total_steps}: the run to resume has {state.total_steps}; "
                "resume with the same epochs and batch size"
            )
        load_into(self.module, tensors["model"], "model")
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        if self.average:
            check_same_shapes(self.average.weights, tensors["ema"], "ema")
            for name, average in self.average.weights.items():
                average.copy_(tensors["ema"][name])
            self.average.updates = state.ema_updates
        if self.scaler is not None:
            if not state.scaler:
                raise CheckpointError("checkpoint: scaler: absent; start a new run")
            self.scaler.load_state_dict(state.scaler)
        self.meter.load(state.meter, first=self.is_main)
        self.step = state.step
