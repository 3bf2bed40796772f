"""What a training step minimises: cross-entropy, of images that may be mixed, and distillation.

It is the loss that the metrics of the training show.
"""

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.config import TrainConfig
from cifar.data.loader import TrainBatch

ComputeLoss = Callable[[nn.Module, TrainBatch], tuple[Tensor, Tensor]]
"""(model, batch) -> (mean loss, logits `[B, K]`); the batch can load partners to be mixed with."""
Answer = Callable[[Tensor], Tensor]
"""Images `[B, C, H, W]` as the student sees them -> a teacher's logits `[B, K]`, no gradient."""


def build_loss(config: TrainConfig, teacher: Answer | None) -> ComputeLoss:
    """The loss of a configuration, whose teacher this is."""
    loss = cross_entropy(config.recipe.label_smoothing)
    if teacher is None:
        return loss
    distillation = config.distillation
    return distilled(
        loss, teacher, weight=distillation.weight, temperature=distillation.temperature
    )


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


def distilled(
    labels_loss: ComputeLoss, teacher: Answer, *, weight: float, temperature: float
) -> ComputeLoss:
    """`labels_loss`, and how far the student's answers are from a teacher's to the same images.

    (1 - weight) x labels_loss + weight x T^2 x KL(softmax(teacher / T) || softmax(student / T)),
    the mean over the samples; T^2 keeps the gradient's size whatever T is (Hinton et al. 2015,
    section 2, https://arxiv.org/abs/1503.02531).
    """

    def compute_loss(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        answers = teacher(batch.images)  # first, while the student holds nothing for going back
        loss, logits = labels_loss(model, batch)
        divergence = F.kl_div(
            (logits / temperature).log_softmax(1),
            (answers / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * loss + weight * temperature**2 * divergence, logits

    return compute_loss
