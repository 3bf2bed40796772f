"""What a training step minimises: cross-entropy, of images that may be mixed with others."""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.config import Recipe
from cifar.data.draws import EpochDraws, SampleDraws
from cifar.data.loader import Batch, TrainBatch

ComputeLoss = Callable[[nn.Module, TrainBatch], tuple[Tensor, Tensor]]
"""(model, batch) -> (mean loss, logits `[B, K]`); the batch can load partners to be mixed with."""
Mask = Callable[[SampleDraws, int, int], Tensor]
"""(draws, height, width) -> how much of each pixel is a sample's own, the rest its partner's:
`[B, H, W]` float32, or `[B, 1, 1]` if that is the same for all pixels."""

_LEVELS = 4096
"""Shares that a draw chooses from."""
_GRID = 100_000
"""Points at which a distribution is integrated."""


def build_loss(recipe: Recipe) -> ComputeLoss:
    """The loss of a recipe."""
    masks: list[Mask] = []
    if recipe.mixup:
        masks.append(Mixup(recipe.mixup))
    if recipe.cutmix:
        masks.append(CutMix(recipe.cutmix))
    if not masks:
        return cross_entropy(recipe.label_smoothing)
    return mixed_cross_entropy(masks, recipe.label_smoothing)


def cross_entropy(label_smoothing: float) -> ComputeLoss:
    """Cross-entropy with hard or soft targets."""

    def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        return F.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing), logits

    return compute_loss


def mixed_cross_entropy(masks: list[Mask], label_smoothing: float) -> ComputeLoss:
    """Cross-entropy of samples that are mixed with their partners, each in one of these ways.

    A sample's target counts as much as its own share of the pixels, its partner's the rest.
    """
    entropies = functools.partial(
        F.cross_entropy, reduction="none", label_smoothing=label_smoothing
    )

    def compute_loss(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        partners = batch.load_partners()
        own = _chosen(masks, batch.draws, *batch.images.shape[2:])
        logits = model(torch.lerp(partners.images, batch.images, own.unsqueeze(1)))
        share = own.mean((1, 2))
        losses = share * entropies(logits, batch.targets)
        losses = losses + (1 - share) * entropies(logits, partners.targets)
        return losses.mean(), logits

    return compute_loss


def _chosen(masks: list[Mask], draws: SampleDraws, height: int, width: int) -> Tensor:
    """The only mask, or for every sample a random one of two."""
    made = [mask(draws, height, width) for mask in masks]
    if len(made) == 1:
        return made[0]
    second = draws.pick("mix", lambda epoch: epoch.integers("mix", 2)).bool()
    return torch.where(second.view(-1, 1, 1), made[1], made[0])


class Mixup:
    """Every pixel in the same proportion, drawn from Beta(alpha, alpha).

    Zhang et al. 2017 (https://arxiv.org/abs/1710.09412).
    """

    def __init__(self, alpha: float) -> None:
        self._shares = torch.from_numpy(beta_quantiles(alpha, _LEVELS)).float()

    def __call__(self, draws: SampleDraws, _height: int, _width: int) -> Tensor:
        """See `Mask`."""
        level = draws.pick("mixup", lambda epoch: epoch.integers("mixup", _LEVELS))
        return self._shares.to(level.device)[level].view(-1, 1, 1)


class CutMix:
    """A rectangle of the partner's at a random place, of the image's proportions.

    Its share of the pixels is drawn from Beta(alpha, alpha), before what lies beyond the edge is
    lost: Yun et al. 2019 (https://arxiv.org/abs/1905.04899).
    """

    def __init__(self, alpha: float) -> None:
        self._lengths = torch.from_numpy(np.sqrt(beta_quantiles(alpha, _LEVELS)))

    def __call__(self, draws: SampleDraws, height: int, width: int) -> Tensor:
        """See `Mask`."""
        level = draws.pick("cutmix.share", lambda epoch: epoch.integers("cutmix.share", _LEVELS))
        inside = [
            self._inside(draws, level, edge, size)
            for edge, size in (("top", height), ("left", width))
        ]
        rows, columns = inside
        return 1 - (rows.unsqueeze(2) & columns.unsqueeze(1)).float()

    def _inside(self, draws: SampleDraws, level: Tensor, edge: str, size: int) -> Tensor:
        """Which rows or columns the rectangle covers, `[B, size]`."""

        def draw(epoch: EpochDraws) -> Tensor:
            return epoch.integers(f"cutmix.{edge}", size)

        half = (self._lengths * size).long().to(level.device)[level] // 2
        centre = draws.pick(f"cutmix.{edge}", draw)
        places = torch.arange(size, device=level.device)
        low, high = (centre - half).unsqueeze(1), (centre + half).unsqueeze(1)
        return (places >= low) & (places < high)


def beta_quantiles(alpha: float, count: int) -> np.ndarray:
    """Of Beta(alpha, alpha), at the middles of `count` equal parts of the probability, float64.

    The lower half of the distribution is integrated over `x**alpha`, in which its density has no
    pole at 0; the upper half mirrors it.
    """
    grid = np.linspace(0.0, 0.5**alpha, _GRID)
    density = (1 - grid ** (1 / alpha)) ** (alpha - 1)
    steps = np.diff(grid) * (density[1:] + density[:-1]) / 2
    cumulated = np.concatenate(([0.0], np.cumsum(steps)))
    middles = (np.arange(count) + 0.5) / count
    lower = np.interp(np.minimum(middles, 1 - middles) * 2 * cumulated[-1], cumulated, grid)
    lower **= 1 / alpha
    return np.asarray(np.where(middles < 0.5, lower, 1 - lower))
