"""The trainer: one optimiser step, the health of a run, and evaluation.

How the loss is computed and how the weights are updated are two functions that can be replaced,
see `cifar.losses` and `cifar.updates`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cifar.accelerator import start_accelerator
from cifar.checkpoint import Tensors
from cifar.compilation import compiled
from cifar.config import RunConfig, TrainConfig
from cifar.data.dataset import Dataset
from cifar.data.division import divide
from cifar.data.loader import (
    Batch,
    DeviceImages,
    Place,
    TrainBatch,
    eval_batches,
)
from cifar.distributed import broadcast_from_first, check_same_images
from cifar.emulation import emulate_if_needed
from cifar.engines import build_engine
from cifar.errors import TrainingError
from cifar.evaluation import Evaluation, evaluate
from cifar.exchange import LocalSteps
from cifar.fine_tuning import Backbone
from cifar.interval import CheckInterval
from cifar.losses import ComputeLoss, build_loss
from cifar.meter import Meter
from cifar.models import build_model
from cifar.models.pretrained import start_from_pretrained
from cifar.optim import WeightAverage, build_optimizer, lr_at, schedule_momentum, set_lr
from cifar.pulse import PULSE
from cifar.roles import assign_roles
from cifar.sync_batch_norm import synchronize_norms
from cifar.teacher import load_teacher
from cifar.training_data import place_data
from cifar.updates import Update, build_update


class Trainer:
    """A model in training on this process's device.

    `step` counts finished optimiser steps; the learning rate, the samples of a step and their
    augmentation follow from it, so a run that is resumed goes on as if it had never stopped.
    `emulated` tells whether fp32 kernels compute its bf16, see `cifar.emulation`. Pretrained
    weights are read, or fetched, unless a state `is_resumed` that replaces them.

    Raises:
        ConfigError: the configuration does not fit the data or the processes that were started, or
            there are no such weights to start from.
        CheckpointError: its teacher is missing, not the one it was, or of other classes.
        UnsupportedError: the device or the stack cannot run it as asked, or the recipe has a rule
            for layers that the network does not have.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunConfig,
        dataset: Dataset,
        *,
        train_samples: int | None = None,
        compute_loss: ComputeLoss | None = None,
        update: Update | None = None,
        is_resumed: bool = False,
    ) -> None:
        self.accelerator, precision, self.strategy = start_accelerator(config, run)
        self.config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
        self.run = run
        self.fingerprint = dataset.fingerprint()
        self.dataset = divide(dataset, config.limit_train, config.recipe.validation)
        self.device: torch.device = self.accelerator.device
        check_same_images(self.fingerprint, self.device)
        self.place = Place(self.accelerator.process_index, self.accelerator.num_processes)
        self._update = update or build_update(config.recipe)
        self.model_config = dataclasses.replace(
            config.model,
            num_classes=len(self.dataset.classes),
            in_channels=self.dataset.train.images.shape[1],
        )
        config.parallel.check_launch(self.strategy, self.place.count)
        self._place_data()
        self._build_model(is_resumed)
        self.teacher = load_teacher(self.config, self.dataset, self.normalization, self.device)
        assert self.teacher is None or compute_loss is None, (
            "a teacher is for the recipe's own loss"
        )
        self.compute_loss = compute_loss or build_loss(config, self.teacher)
        self.total_steps = self._plan_steps(train_samples)
        self.step = 0
        self._is_alone = False
        self.meter = Meter(self.device)
        self.rounds = LocalSteps(
            config.parallel.local_steps, self.loader.steps_per_epoch, self.total_steps
        )
        self.rounds.check_intervals(run)
        self._interval = CheckInterval(
            run.check_every, self.device.type, self.place.count, self.rounds.whole
        )

    def _place_data(self) -> None:
        data = place_data(self.config, self.model_config, self.dataset, self.device, self.place)
        self.normalization, self.loader = data.normalization, data.loader
        self.test_images, self.validation_images = data.test_images, data.validation_images
        self._eval_batch_size = data.eval_batch_size

    def _build_model(self, is_resumed: bool) -> None:
        config, recipe = self.config, self.config.recipe
        torch.manual_seed(config.seed)
        self.module = build_model(self.model_config)
        roles = assign_roles(self.module, self.model_config, recipe)
        if not is_resumed:
            start_from_pretrained(self.module, self.model_config, self.dataset.classes)
        if config.parallel.sync_batch_norm:
            synchronize_norms(self.module, self.device)
        self.module = self.module.to(self.device)
        if config.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.emulated = emulate_if_needed(self.module, config.precision, self.device)
        self.engine = build_engine(self.strategy, self.accelerator, self.module, self.config)
        # Not prepared: Accelerate's wrapper costs more than a small net's optimiser step.
        self.optimizer = build_optimizer(self.engine, recipe, roles, self.engine.rows)
        self.engine.adopt(self.optimizer)
        self.scaler = self.accelerator.scaler
        self._backbone = Backbone(self.module, roles.head) if recipe.frozen_epochs else None
        if self._backbone:
            self._backbone.freeze(True)
        self._wrap_model()
        decay = recipe.ema_decay
        self.average = WeightAverage(self.engine.live(), decay) if decay else None

    def _wrap_model(self) -> None:
        self.wrapped: Any = self.engine.wrap()  # has more methods than a module
        wrapped: nn.Module = self.wrapped
        self._compiles = self.config.compile
        if self.config.compile:
            wrapped = compiled(wrapped, self.config.compile_mode)
        self.model: nn.Module = wrapped

    @property
    def check_every(self) -> int:
        """Steps from one `check` to the next, alike on all processes."""
        return self._interval.steps

    def _plan_steps(self, train_samples: int | None) -> int:
        if train_samples is None:
            return self.config.recipe.epochs * self.loader.steps_per_epoch
        return train_samples // self.loader.global_batch_size

    @property
    def samples_seen(self) -> int:
        """Training samples over all processes since the start of the run."""
        return self.step * self.loader.global_batch_size

    @property
    def epoch(self) -> int:
        """The epoch that the last step was in, counted from 1; 0 before the first one."""
        return -(-self.step // self.loader.steps_per_epoch)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.place.index == 0

    @property
    def bare(self) -> nn.Module:
        """The network to infer with weights given to it, see `cifar.engine.Engine`."""
        return self.engine.bare

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes, as far as this process has it, with its gradients."""
        return [parameter for _, parameter in self.engine.named_parameters()]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The length of the gradient that these are this process's parts of."""
        return self.engine.norm(gradients)

    def weights(self) -> Tensors:
        """The full weights and buffers by name, without wrapper prefixes; a collective call.

        Views, not copies, of what this process holds in full.
        """
        return self.engine.gather(self.engine.live())

    def eval_weights(self) -> Tensors:
        """The weights to evaluate and publish: their average where there is one.

        Full ones; a collective call.
        """
        return self.engine.gather(self.average.weights) if self.average else self.weights()

    def lr_of(self, step: int) -> float:
        """The learning rate of the 0-based optimiser step `step`."""
        return lr_at(step, self.total_steps, self.loader.steps_per_epoch, self.config.recipe)

    def batches_of(self, step: int) -> list[TrainBatch]:
        """This process's augmented micro-batches of the 0-based optimiser step `step`."""
        return self.loader.batches_of(step)

    def train_step(self) -> None:
        """Load the next global batch and take one optimiser step.

        Reads nothing from the device, but whether a step of Muon overflowed in fp16, what ZeRO's
        engine asks of its gradients, and under torch's SyncBatchNorm on GPUs.
        """
        if self._backbone:
            self._set_phase(self._backbone)
        set_lr(self.optimizer, self.lr_of(self.step))
        schedule_momentum(self.optimizer, self.step, self.total_steps, self.config.recipe)
        batches = self.batches_of(self.step)
        passes = iter(range(2**31))
        with self._compiling():
            self._update(self, lambda: self._forward_backward(batches, record=next(passes) == 0))
        self.step += 1
        PULSE.at(self.step)
        if self.average:
            self.average.update()
        if not self._is_alone:
            self.rounds.end_if_due(self.step, self.optimizer, self.engine.live, self.average)

    @property
    def is_averaged(self) -> bool:
        """Whether all processes have the same weights after this step, see `LocalSteps`."""
        return self.rounds.end_at(self.step)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, steps average nothing with other processes, whose weights then differ.

        BatchNorm over all processes still does. For engines that share nothing out.
        """
        self._is_alone = True
        try:
            with self.engine.accumulating():
                yield
        finally:
            self._is_alone = False

    def _compiling(self) -> contextlib.AbstractContextManager[None]:
        """Announces the first step of a compiled model, which may take minutes."""
        if not self._compiles or self.model is self.wrapped:
            return contextlib.nullcontext()
        self._compiles = False
        return PULSE.during("compiling")

    def _set_phase(self, backbone: Backbone) -> None:
        """Have the backbone frozen or not as is due in this step, whatever came before it."""
        frozen = self.step < self.config.recipe.frozen_epochs * self.loader.steps_per_epoch
        if frozen != backbone.is_frozen:
            backbone.freeze(frozen)
            if self.place.count > 1:  # DDP averages what needed a gradient when it was made
                self._wrap_model()
        backbone.set_norms()

    def _forward_backward(self, batches: list[TrainBatch], *, record: bool) -> None:
        if self.model_config.is_random:
            # The generators' state then needs no saving, on any number of processes, and what an
            # update computes twice drops the same features.
            torch.manual_seed(hash((self.config.seed, self.step, self.place.index)) % 2**63)
        averages = self.config.parallel.local_steps == 1
        for index, batch in enumerate(batches):
            last = averages and index == len(batches) - 1
            with contextlib.nullcontext() if last else self.engine.accumulating():
                loss, logits = self.compute_loss(self.model, batch)
                self.backward(loss / len(batches) if len(batches) > 1 else loss)
            if record:
                self.meter.add(loss.detach(), logits.detach(), batch.likeliest, self.step)

    def backward(self, loss: Tensor) -> None:
        """As Accelerate's `backward`, which would divide the loss by 1 in every step."""
        self.engine.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def optimizer_step(self) -> None:
        """Apply the gradients; in fp16 unscale them first and skip the step if they overflowed."""
        limit = self.config.recipe.clip_norm
        if self.scaler is not None and (limit or self.engine.shares_out):
            self.scaler.unscale_(self.optimizer)
            self.engine.after_unscaling(self.scaler, self.optimizer)
        if limit:
            self.engine.clip(limit)
        if self.scaler is None:
            self.engine.step(self.optimizer)
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
        health = self.meter.health(signal, self._interval.pace(self.step))
        self._interval.learn(health.pace)
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
    def evaluate(
        self,
        between_batches: Callable[[], object] = lambda: None,
        *,
        images: DeviceImages | None = None,
        weights: Tensors | None = None,
        probabilities: Tensor | None = None,
    ) -> Evaluation:
        """Score images with these weights and this run's precision and layout.

        When not given they are the test split's, and the published ones. `between_batches` is
        called equally often on all processes, so it may be a collective call. `probabilities`: see
        `cifar.evaluation.evaluate`.
        """
        assert self.is_averaged, "processes would score different weights"
        scored = self.test_images if images is None else images
        self.synchronize_buffers()
        self.bare.eval()
        chosen = weights or self.eval_weights()

        def forward(images: Tensor) -> Tensor:
            return torch.func.functional_call(self.bare, chosen, (images,))  # type: ignore[no-any-return]

        result = evaluate(
            forward,
            self._eval_batches(scored, between_batches),
            num_classes=len(self.dataset.classes),
            device=self.device,
            probabilities=probabilities,
        )
        self.bare.train()
        assert result.samples == len(scored), "every sample counts once"
        return result

    def _eval_batches(self, images: DeviceImages, between: Callable[[], object]) -> Iterator[Batch]:
        everywhere = len(images) // self.place.count // self._eval_batch_size
        batches = eval_batches(images, self._eval_batch_size, self.place)
        for number, batch in enumerate(batches):
            if 0 < number < everywhere:
                between()
            yield batch
            PULSE.beat()

    def synchronize_buffers(self) -> None:
        """Give every process the first one's BatchNorm statistics."""
        averages = [self.average.weights] if self.average else []
        live = self.engine.live()
        # What a network does not keep in its state, such as a library's filters, it never changes.
        names = [name for name, _ in self.module.named_buffers() if name in live]
        broadcast_from_first([each[name] for each in (live, *averages) for name in names])
