"""Test-set evaluation: every sample exactly once, on any number of processes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cifar.data.loader import Batch
from cifar.distributed import reduce_sum
from cifar.pulse import PULSE


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a model scores on a labelled split.

    `top1` and `top5` are fractions, `loss` the mean cross-entropy in nats without label smoothing,
    `confusion[i][j]` the number of samples of class i that were predicted as j.
    """

    samples: int
    loss: float
    top1: float
    top5: float
    confusion: tuple[tuple[int, ...], ...]

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Accuracy of each class, None for a class without samples."""
        return tuple(
            row[i] / sum(row) if sum(row) else None for i, row in enumerate(self.confusion)
        )


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    num_classes: int,
    device: torch.device,
    probabilities: Tensor | None = None,
) -> Evaluation:
    """Evaluate this process's batches and add up over all processes.

    `forward` maps images `[B, C, H, W]` to logits `[B, num_classes]`. With fewer than five classes
    top-5 counts every one of them. Sums stay on the device until the end. `probabilities`, zeros
    `[N, num_classes]` float32 for a split of N samples, receives what is predicted for each of
    them, on all processes.
    """
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        logits = forward(batch.images).float()
        predicted = logits.argmax(1)
        cells = batch.targets * num_classes + predicted
        with PULSE.waiting():  # which bincount does for its result's size
            confusion += torch.bincount(cells, minlength=num_classes * num_classes)
        best = logits.topk(min(5, num_classes), dim=1).indices
        sums[0] += F.cross_entropy(logits, batch.targets, reduction="sum")
        sums[1] += (best == batch.targets[:, None]).sum()
        if probabilities is not None:
            probabilities[batch.samples] = logits.softmax(1)
    if probabilities is not None:
        reduce_sum(probabilities)  # every sample is one process's, and zero on the others
    confusion = reduce_sum(confusion).view(num_classes, num_classes)
    with PULSE.waiting():
        loss, top5 = reduce_sum(sums).tolist()
        cells_read: list[list[int]] = confusion.tolist()
    samples = sum(map(sum, cells_read))
    return Evaluation(
        samples=samples,
        loss=loss / samples,
        top1=sum(row[k] for k, row in enumerate(cells_read)) / samples,
        top5=top5 / samples,
        confusion=tuple(map(tuple, cells_read)),
    )
