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
    shifts = 2 * padding + 1
    top, left = draws.integers("crop.top", shifts), draws.integers("crop.left", shifts)
    rows = top.view(n, 1) + torch.arange(height, device=images.device)
    if fill == "reflect":
        rows, padded = mirrored(rows - padding, height), reflect_columns(images, padding)
    else:
        padded = F.pad(images, (padding,) * 4)
    return take_windows(padded, rows, left, width).view(n, channels, height, width)


def mirrored(places: Tensor, size: int) -> Tensor:
    """Where in 0 ... `size` - 1 a place outside lies when the edges are mirrors, not repeated."""
    period = max(1, 2 * (size - 1))
    places = places % period
    return torch.minimum(places, period - places)


def reflect_columns(images: Tensor, padding: int) -> Tensor:
    """Put `padding` mirrored columns on either side: `[B, C, H, W]` to `[B, C, H, W + 2 padding]`.

    As `F.pad(mode="reflect")`, but padding may be wider than the image.
    """
    width = images.shape[-1]
    sources = mirrored(torch.arange(-padding, width + padding), width).tolist()
    padded = images.new_empty((*images.shape[:-1], width + 2 * padding))
    padded[..., padding : padding + width] = images
    for column in (*range(padding), *range(padding + width, width + 2 * padding)):
        padded[..., column] = images[..., sources[column]]
    return padded


def take_windows(images: Tensor, rows: Tensor, left: Tensor, width: int) -> Tensor:
    """Cut `images[i, :, rows[i], left[i]:left[i]+width]` for every i; `rows` is `[B, H]`.

    Returns the rows of all windows, `[B * C * H, width]`.
    """
    n, channels, full_height, full_width = images.shape
    flat = images.reshape(-1)
    planes = torch.arange(n * channels, device=images.device).view(n, channels, 1)
    starts = (planes * full_height + rows.view(n, 1, -1)) * full_width + left.view(n, 1, 1)
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
