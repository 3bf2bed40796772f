"""Mixing of samples with partners: mixup and CutMix, one decision per sample."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cifar.config import Recipe
from cifar.data.draws import EpochDraws, SampleDraws, Table

Mask = Callable[[SampleDraws, int, int], Tensor]
"""(draws, height, width) -> how much of each pixel is a sample's own, the rest its partner's:
`[B, H, W]` float32, or `[B, 1, 1]` if that is the same for all pixels."""

_LEVELS = 4096
"""Shares that a draw chooses from."""
_GRID = 100_000
"""Points at which a distribution is integrated."""


class Mixup:
    """Every pixel in the same proportion, drawn from Beta(alpha, alpha).

    Zhang et al. 2017 (https://arxiv.org/abs/1710.09412).
    """

    def __init__(self, alpha: float) -> None:
        self._shares = Table(torch.from_numpy(beta_quantiles(alpha, _LEVELS)).float())

    def __call__(self, draws: SampleDraws, _height: int, _width: int) -> Tensor:
        """See `Mask`."""

        def draw(epoch: EpochDraws) -> Tensor:
            return self._shares.on(epoch.device)[epoch.integers("mixup", _LEVELS)]

        return draws.pick("mixup", draw).view(-1, 1, 1)


class CutMix:
    """A rectangle of the partner's at a random place, of the image's proportions.

    Its share of the pixels is drawn from Beta(alpha, alpha), before what lies beyond the edge is
    lost: Yun et al. 2019 (https://arxiv.org/abs/1905.04899).
    """

    def __init__(self, alpha: float) -> None:
        self._lengths = Table(torch.from_numpy(np.sqrt(beta_quantiles(alpha, _LEVELS))))

    def __call__(self, draws: SampleDraws, height: int, width: int) -> Tensor:
        """See `Mask`."""
        inside = [
            self._inside(draws, edge, size) for edge, size in (("top", height), ("left", width))
        ]
        rows, columns = inside
        return 1 - (rows.unsqueeze(2) & columns.unsqueeze(1)).float()

    def _inside(self, draws: SampleDraws, edge: str, size: int) -> Tensor:
        """Which rows or columns the rectangle covers, `[B, size]`."""

        def halves(epoch: EpochDraws) -> Tensor:
            level = epoch.integers("cutmix.share", _LEVELS)
            return (self._lengths.on(epoch.device)[level] * size).long() // 2

        def centres(epoch: EpochDraws) -> Tensor:
            return epoch.integers(f"cutmix.{edge}", size)

        half = draws.pick(f"cutmix.{edge}.half", halves).unsqueeze(1)
        centre = draws.pick(f"cutmix.{edge}", centres).unsqueeze(1)
        places = torch.arange(size, device=half.device)
        return (places >= centre - half) & (places < centre + half)


class Mixer:
    """Mixes samples in the ways of a recipe, each of them in one that is drawn for it."""

    def __init__(self, masks: list[Mask]) -> None:
        self._masks = masks

    def __call__(
        self, images: Tensor, partners: Tensor, draws: SampleDraws
    ) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` float32 mixed with their partners, and how much of each is its own.

        That is `[B]`, a fraction of the pixels.
        """
        own = self._chosen(draws, *images.shape[2:])
        return torch.lerp(partners, images, own.unsqueeze(1)), own.mean((1, 2))

    def _chosen(self, draws: SampleDraws, height: int, width: int) -> Tensor:
        """The only mask, or for every sample a random one of two."""
        made = [mask(draws, height, width) for mask in self._masks]
        if len(made) == 1:
            return made[0]
        second = draws.pick("mix", lambda epoch: epoch.integers("mix", 2)).bool()
        return torch.where(second.view(-1, 1, 1), made[1], made[0])


def get_mixer(recipe: Recipe) -> Mixer | None:
    """What mixes the samples of a recipe, None if nothing does."""
    masks: list[Mask] = []
    if recipe.mixup:
        masks.append(Mixup(recipe.mixup))
    if recipe.cutmix:
        masks.append(CutMix(recipe.cutmix))
    return Mixer(masks) if masks else None


def beta_quantiles(alpha: float, count: int) -> np.ndarray:
    """Of Beta(alpha, alpha), at the middles of `count` equal parts of the probability, float64.

    The lower half of the distribution is integrated, the upper half mirrors it. Below an alpha of
    1 the density has a pole at 0, but none as a function of `x**alpha`.
    """
    if alpha < 1:
        grid = np.linspace(0.0, 0.5**alpha, _GRID)
        places, density = grid ** (1 / alpha), (1 - grid ** (1 / alpha)) ** (alpha - 1)
    else:
        grid = places = np.linspace(0.0, 0.5, _GRID)
        density = (4 * places * (1 - places)) ** (alpha - 1)
    steps = np.diff(grid) * (density[1:] + density[:-1]) / 2
    cumulated = np.concatenate(([0.0], np.cumsum(steps)))
    middles = (np.arange(count) + 0.5) / count
    lower = np.interp(np.minimum(middles, 1 - middles) * 2 * cumulated[-1], cumulated, places)
    return np.asarray(np.where(middles < 0.5, lower, 1 - lower))
