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


def crop(images: Tensor, draws: SampleDraws, padding: int = 4) -> Tensor:
    """Pad by black pixels and cut the original size at a random place.

    By 4 pixels in He et al. 2015 (https://arxiv.org/abs/1512.03385).
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    shifts = 2 * padding + 1
    top, left = draws.integers("crop.top", shifts), draws.integers("crop.left", shifts)
    return take_windows(padded, top, left, height, width).view(n, channels, height, width)


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
    n = len(images)
    either = torch.cat((images, images.flip(-1)))
    chosen = torch.arange(n, device=images.device) + n * draws.integers("flip", 2)
    return either.index_select(0, chosen)


def get_augmentations(recipe: Recipe) -> tuple[Augmentation, ...]:
    """The functions that a recipe names, in its order."""
    functions: dict[str, Augmentation] = {
        "crop": functools.partial(crop, padding=recipe.crop_padding),
        "flip": flip,
    }
    assert tuple(functions) == AUGMENTATIONS
    return tuple(functions[name] for name in recipe.augment)
