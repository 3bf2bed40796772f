"""What a run's weights are worth: scores after every epoch, the best one, and what is left of it.

All processes call these together, for evaluation is shared among them.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cifar import report
from cifar.checkpoint import ModelCard, Tensors
from cifar.comparison import Comparison
from cifar.device_memory import peak_memory
from cifar.errors import TrainingError
from cifar.evaluation import Evaluation
from cifar.latency import latency
from cifar.network import load_network
from cifar.predictions import Predictions
from cifar.selection import Selection
from cifar.trainer import Trainer
from cifar.training_state import card_of


class Outcome:
    """The scores of a run; `between_batches` is called in evaluations, see `Trainer.evaluate`."""

    def __init__(self, trainer: Trainer, between_batches: Callable[[], object]) -> None:
        self.selection = Selection(trainer.config.recipe.patience)
        self._trainer = trainer
        self._between_batches = between_batches
        self._scored: tuple[Evaluation, torch.Tensor] | None = None
        self._scored_step = -1

    @property
    def is_over(self) -> bool:
        """Whether the epoch that was scored last is the run's last one."""
        trainer = self._trainer
        ends = trainer.step >= trainer.total_steps or self.selection.is_over(trainer.epoch)
        return ends and self._scored_step == trainer.step

    def score(self) -> dict[str, float]:
        """Score the weights that an epoch has ended with, for its line in the metrics.

        Raises:
            TrainingError: a loss is not finite.
        """
        trainer = self._trainer
        held_out = self._validate()
        result = self._evaluate()
        self._scored_step = trainer.step
        return {
            **held_out,
            "test_loss": result.loss,
            "test_top1": result.top1,
            "test_top5": result.top5,
            "test_samples": result.samples,
        }

    def _validate(self) -> dict[str, float]:
        """The scores on the images held out, if any; they choose the best epoch."""
        trainer = self._trainer
        if trainer.validation_images is None:
            return {}
        result = trainer.evaluate(self._between_batches, images=trainer.validation_images)
        self._check_finite(result, "validation")
        self.selection.offer(trainer.epoch, result.top1, trainer.eval_weights())
        return {"val_loss": result.loss, "val_top1": result.top1}

    def _evaluate(self, weights: Tensors | None = None) -> Evaluation:
        """Score the test split with the published weights, or these."""
        trainer = self._trainer
        shape = len(trainer.test_images), len(trainer.dataset.classes)
        probabilities = torch.zeros(shape, device=trainer.device)
        result = trainer.evaluate(
            self._between_batches, weights=weights, probabilities=probabilities
        )
        self._check_finite(result, "test")
        self._scored = result, probabilities
        return result

    def _check_finite(self, result: Evaluation, split: str) -> None:
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"loss: not finite on the {split} images after step {self._trainer.step}: training "
                "stopped; lower --lr or change --precision"
            )

    def settle(self, say: Callable[[str], object]) -> Evaluation:
        """Go back to the best epoch's weights where the recipe chooses one; their evaluation."""
        trainer, best = self._trainer, self.selection.best
        if best is not None:
            say(
                f"epoch {best.epoch} was the best on the {len(trainer.validation_images or ()):,} "
                f"validation images (top-1 {best.top1:.2%}); its weights are kept"
            )
            if best.epoch < trainer.epoch:
                self._evaluate(self.selection.weights)
        assert self._scored is not None, "an epoch has ended"
        return self._scored[0]

    def final(self) -> tuple[dict[str, Tensors], ModelCard]:
        """The weights to publish, and what they are; a collective call."""
        trainer, best = self._trainer, self.selection.best
        card = card_of(trainer, averaged=trainer.average is not None)
        if best is None:
            return {"model": trainer.eval_weights()}, card
        step = best.epoch * trainer.loader.steps_per_epoch
        seen = step * trainer.loader.global_batch_size
        return (
            {"model": self.selection.weights},
            dataclasses.replace(card, step=step, samples_seen=seen),
        )

    def report(self, metrics: Sequence[Mapping[str, Any]]) -> report.Files:
        """Pictures and tables of the run, and of what its final weights make of the test split."""
        assert self._scored is not None, "an epoch has ended"
        result, probabilities = self._scored
        trainer, test = self._trainer, self._trainer.dataset.test
        what = f"{trainer.model_config.label} on {trainer.dataset.name}"
        height, width = test.images.shape[2:]
        made = report.training_files(metrics, trainer.model_config, (height, width), what)
        predictions = Predictions(probabilities=probabilities.cpu().numpy(), labels=test.labels)
        return made | report.evaluation_files(
            result,
            predictions,
            images=test.images,
            samples=tuple(map(str, range(len(test)))),
            classes=trainer.dataset.classes,
            what=what,
        )

    def compare(self, final: Path, metrics: Sequence[Mapping[str, Any]]) -> Comparison:
        """The run in a line: its scores, and what its weights in `final` cost, in this process."""
        assert self._scored is not None, "an epoch has ended"
        trainer, config = self._trainer, self._trainer.config
        assert config.precision is not None, "a trainer has resolved it"
        peak = peak_memory(trainer.device)
        network = load_network(final, precision=config.precision, device=trainer.device)
        found = {}
        for size in INFERENCE_BATCH_SIZES:
            samples = torch.arange(size, device=trainer.device) % len(trainer.test_images)
            found[size] = latency(network.logits, trainer.test_images.batch(samples).images)
        return Comparison(
            model=trainer.model_config.label,
            precision=config.precision,
            batch_size=config.recipe.global_batch_size,
            num_processes=trainer.place.count,
            top1=self._scored[0].top1,
            checkpoint_bytes=network.file.stat().st_size,
            param_count=sum(each.numel() for each in network.module.parameters()),
            inference_latency=found,
            train_throughput=statistics.median(line["train_images_per_s"] for line in metrics),
            training_seconds=math.fsum(line["train_seconds"] for line in metrics),
            peak_memory_bytes=peak,
        )


INFERENCE_BATCH_SIZES = (1, 64)
"""Of a run's own comparison; see `cifar.latency`."""
