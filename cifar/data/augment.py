"""Augmentations: each takes uint8 images `[B, C, H, W]` and the draws of their samples.

They run on the device that holds the images, one decision per sample. Rows are moved with
`index_select`, which copies whole rows: on a CPU several times faster than advanced indexing.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cifar.config import AUGMENTATIONS, Recipe
from cifar.data.draws import SampleDraws

Augmentation = Callable[[Tensor, SampleDraws], Tensor]


def crop(images: Tensor, draws: SampleDraws, padding: int = 4, fill: str = "black") -> Tensor:
    """Pad by black pixels or the image's mirror image, and cut the original size at a random place.

    By 4 black pixels in He et al. 2015 (https://arxiv.org/abs/1512.03385), by 2 mirrored ones in
    airbench (https://arxiv.org/abs/2404.00498).
    """
    n, channels, height, width = images.shape
    padded = reflect(images, padding) if fill == "reflect" else F.pad(images, (padding,) * 4)
    shifts = 2 * padding + 1
    top, left = draws.integers("crop.top", shifts), draws.integers("crop.left", shifts)
    return take_windows(padded, top, left, height, width).view(n, channels, height, width)


def reflect(images: Tensor, padding: int) -> Tensor:
    """Surround `[B, C, H, W]` by `padding` mirrored pixels; the edge itself is not repeated.

    As `F.pad(mode="reflect")`, but padding may be wider than the image.
    """
    for dim in (-2, -1):
        size = images.shape[dim]
        period = max(1, 2 * (size - 1))
        place = torch.arange(-padding, size + padding, device=images.device) % period
        images = images.index_select(dim, torch.minimum(place, period - place))
    return images


def take_windows(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Cut `images[i, :, top[i]:top[i]+height, left[i]:left[i]+width]` for every i.

    Returns the rows of all windows, `[B * C * height, width]`.
    """
    n, channels, full_height, full_width = images.shape
    flat = images.reshape(-1)
    device = images.device
    planes = torch.arange(n * channels, device=device).view(n, channels, 1)
    rows = top.view(n, 1, 1) + torch.arange(height, device=device)
    starts = (planes * full_height + rows) * full_width + left.view(n, 1, 1)
    every_row = flat.as_strided((flat.numel() - width + 1, width), (1, 1))
    return every_row.index_select(0, starts.view(-1))


def flip(images: Tensor, draws: SampleDraws) -> Tensor:
    """Mirror left-right with probability 1/2."""
    return _mirror(images, draws.integers("flip", 2))


def alternating_flip(images: Tensor, draws: SampleDraws) -> Tensor:
    """Mirror left-right in every second epoch, beginning with a random half of the images.

    So every two epochs show each image both ways, which half of random flips do not.
    Source: Jordan 2024, airbench (https://arxiv.org/abs/2404.00498).
    """
    return _mirror(images, (draws.lasting_integers("alternating-flip", 2) + draws.epoch) % 2)


def _mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images whose entry in `mirrored`, `[B]` of 0 and 1, is 1."""
    n = len(images)
    either = torch.cat((images, images.flip(-1)))
    return either.index_select(0, torch.arange(n, device=images.device) + n * mirrored)


def get_augmentations(recipe: Recipe) -> tuple[Augmentation, ...]:
    """The functions that a recipe names, in its order."""
    functions: dict[str, Augmentation] = {
        "crop": functools.partial(crop, padding=recipe.crop_padding, fill=recipe.crop_fill),
        "flip": flip,
        "alternating-flip": alternating_flip,
    }
    assert tuple(functions) == AUGMENTATIONS
    return tuple(functions[name] for name in recipe.augment)
