"""Augmentations, batched on the device that holds the images, one decision per sample.

`crop` reads its windows straight from the whole split, so it comes first. Every other one takes
uint8 images `[B, C, H, W]` and the draws of their samples. Rows are moved with `index_select`,
which copies whole rows: on a CPU several times faster than advanced indexing.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cifar.config import AUGMENTATIONS, Recipe
from cifar.data.draws import EpochDraws, SampleDraws
from cifar.data.policies import POLICIES, ByPolicy, get_policy

Augmentation = Callable[[Tensor, SampleDraws], Tensor]
Reader = Callable[[SampleDraws], Tensor]
"""From the draws of samples to their uint8 images `[B, C, H, W]`."""


class Crop:
    """Pad by black pixels or the image's mirror image, and cut the original size at a random place.

    By 4 black pixels in He et al. 2015 (https://arxiv.org/abs/1512.03385), by 2 mirrored ones in
    airbench (https://arxiv.org/abs/2404.00498). The margins are made once, for all of `images`,
    uint8 `[N, C, H, W]`: a copy that is as much larger stays on the device.
    """

    def __init__(self, images: Tensor, padding: int = 4, fill: str = "black") -> None:
        self._shifts = 2 * padding + 1
        self._shape = images.shape[1:]
        padded = reflect(images, padding) if fill == "reflect" else F.pad(images, (padding,) * 4)
        (channels, height, width), device = self._shape, images.device
        _, _, full_height, self._full_width = padded.shape
        self._image = channels * full_height * self._full_width
        planes = torch.arange(channels, device=device).view(-1, 1) * full_height
        rows = planes + torch.arange(height, device=device)
        # Where the rows of an image's top left window begin, from the image's first pixel.
        self._rows = (rows * self._full_width).view(-1)
        flat = padded.view(-1)
        self._every_row = flat.as_strided((flat.numel() - width + 1, width), (1, 1))

    def __call__(self, draws: SampleDraws) -> Tensor:
        """The windows of the samples that these draws are of."""
        starts = draws.pick("crop", self._starts)
        rows = (starts.view(-1, 1) + self._rows).view(-1)
        return self._every_row.index_select(0, rows).view(-1, *self._shape)

    def _starts(self, epoch: EpochDraws) -> Tensor:
        """Where every image's window begins."""
        top, left = (epoch.integers(f"crop.{edge}", self._shifts) for edge in ("top", "left"))
        images = torch.arange(epoch.count, device=epoch.device) * self._image
        return images + top * self._full_width + left


def reflect(images: Tensor, padding: int) -> Tensor:
    """Surround `[B, C, H, W]` by `padding` mirrored pixels; the edge itself is not repeated.

    As `F.pad(mode="reflect")`, but padding may be wider than the image.
    """
    for dim in (-2, -1):
        size = images.shape[dim]
        period = max(1, 2 * (size - 1))
        places = torch.arange(-padding, size + padding, device=images.device) % period
        images = images.index_select(dim, torch.minimum(places, period - places))
    return images


def flip(images: Tensor, draws: SampleDraws) -> Tensor:
    """Mirror left-right with probability 1/2."""
    return _mirror(images, draws.pick("flip", lambda epoch: epoch.integers("flip", 2)))


def alternating_flip(images: Tensor, draws: SampleDraws) -> Tensor:
    """Mirror left-right in every second epoch, beginning with a random half of the images.

    So every two epochs show each image both ways, which half of random flips do not.
    Source: Jordan 2024, airbench (https://arxiv.org/abs/2404.00498).
    """
    name = "alternating-flip"

    def mirrored(epoch: EpochDraws) -> Tensor:
        return (epoch.integers(name, 2, lasting=True) + epoch.epoch) % 2

    return _mirror(images, draws.pick(name, mirrored))


def _mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images whose entry in `mirrored`, `[B]` of 0 and 1, is 1."""
    n = len(images)
    either = torch.cat((images, images.flip(-1)))
    places = torch.arange(n, device=images.device).add_(mirrored, alpha=n)
    return either.index_select(0, places)


GRAY = 128


def cutout(side: int, images: Tensor, draws: SampleDraws) -> Tensor:
    """Paint a square of `side` pixels grey, with its centre anywhere in the image.

    Source: DeVries and Taylor 2017 (https://arxiv.org/abs/1708.04552), who take 16 for CIFAR-10 and
    8 for CIFAR-100; what lies beyond the edge is lost.
    """
    inside = []
    for edge, size in zip(("top", "left"), images.shape[2:], strict=True):
        draw = functools.partial(_place, f"cutout.{edge}", size)
        start = draws.pick(f"cutout.{edge}", draw) - side // 2
        places = torch.arange(size, device=images.device) - start.view(-1, 1)
        inside.append((places >= 0) & (places < side))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], GRAY)


def _place(name: str, size: int, epoch: EpochDraws) -> Tensor:
    """A row or column of every image."""
    return epoch.integers(name, size)


_FUNCTIONS: dict[str, Callable[[Recipe], Augmentation]] = {
    "flip": lambda _: flip,
    "alternating-flip": lambda _: alternating_flip,
    "cutout": lambda recipe: functools.partial(cutout, recipe.cutout_size),
}
assert ("crop", *_FUNCTIONS, *POLICIES) == AUGMENTATIONS


def get_reader(recipe: Recipe, images: Tensor) -> Reader:
    """What gets samples out of a split, cropped if the recipe says so."""
    if "crop" in recipe.augment:
        return Crop(images, recipe.crop_padding, recipe.crop_fill)
    return lambda draws: images.index_select(0, draws.samples)


def get_augmentations(recipe: Recipe) -> tuple[Augmentation, ...]:
    """The other functions that a recipe names, in its order."""
    return tuple(
        _FUNCTIONS[name](recipe) if name in _FUNCTIONS else ByPolicy(name, get_policy(name, recipe))
        for name in recipe.augment
        if name != "crop"
    )
