"""A picture of what a recipe's augmentation makes of images."""

import io

import numpy as np
import torch
from PIL import Image

from cifar.config import Recipe
from cifar.data.augment import get_augmentations, get_reader
from cifar.data.dataset import Split
from cifar.data.draws import EpochDraws
from cifar.data.mixing import get_mixer

GAP = 2
"""White pixels between images."""
_LEAST_SIDE = 96
"""Pixels that the shorter side of an image gets at least."""


def gallery(recipe: Recipe, split: Split, *, count: int, epochs: int, seed: int = 0) -> bytes:
    """A PNG with a row per image: as it is, and as it is augmented in each of the first epochs.

    The first `count` images of the split are shown, enlarged by a whole factor. What is mixed with
    others is mixed among these, the first with the last.
    """
    images = torch.from_numpy(np.ascontiguousarray(split.images[:count]))
    samples = torch.arange(len(images))
    read, augmentations = get_reader(recipe, images), get_augmentations(recipe)
    mixer = get_mixer(recipe)
    columns = [images[samples]]
    for epoch in range(epochs):
        draws = EpochDraws(seed, epoch, len(images), images.device).of(samples)
        shown = read(draws)
        for augmentation in augmentations:
            shown = augmentation(shown, draws)
        if mixer is not None:
            pixels = shown.float()
            mixed, _ = mixer(pixels, pixels.flip(0), draws)
            shown = mixed.round().to(torch.uint8)
        columns.append(shown)
    return _png(torch.stack(columns, 1).numpy())


def _png(images: np.ndarray) -> bytes:
    """Images `[rows, columns, C, H, W]` uint8 on a white ground; one channel is grey."""
    rows, columns, channels, height, width = images.shape
    factor = max(1, -(-_LEAST_SIDE // min(height, width)))
    large = images.repeat(factor, 3).repeat(factor, 4)
    padded = np.pad(large, ((0, 0),) * 3 + ((GAP, GAP),) * 2, constant_values=255)
    sheet = padded.transpose(0, 3, 1, 4, 2).reshape(
        rows * padded.shape[3], columns * padded.shape[4], channels
    )
    colours = sheet[..., :3] if channels >= 3 else sheet[..., :1].repeat(3, 2)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, format="png")
    return file.getvalue()
