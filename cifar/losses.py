"""What a training step minimises: cross-entropy, of images that may be mixed with others."""

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.config import Recipe
from cifar.data.loader import TrainBatch

ComputeLoss = Callable[[nn.Module, TrainBatch], tuple[Tensor, Tensor]]
"""(model, batch) -> (mean loss, logits `[B, K]`); the batch can load partners to be mixed with."""


def build_loss(recipe: Recipe) -> ComputeLoss:
    """The loss of a recipe."""
    return cross_entropy(recipe.label_smoothing)


def cross_entropy(label_smoothing: float) -> ComputeLoss:
    """Cross-entropy with hard or soft targets.

    The target of a sample that was mixed counts as much as its own share, its partner's the rest.
    """

    def compute_loss(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        if batch.mixed is None:
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing)
            return loss, logits
        own, other = (
            F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
            for targets in (batch.targets, batch.mixed.targets)
        )
        return (batch.mixed.share * own + (1 - batch.mixed.share) * other).mean(), logits

    return compute_loss
