"""Batches made on the training device, from uint8 images that live there.

No workers and no host copies: a step's input is a handful of batched tensor operations. What a
sample gets depends only on (seed, epoch, sample), see `cifar.data.draws`, and its partner for
mixing on the global batch as well.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cifar.config import ModelConfig, Recipe
from cifar.data.augment import get_augmentations, get_reader
from cifar.data.dataset import Split
from cifar.data.draws import EpochDraws
from cifar.data.mixing import get_mixer

EVAL_PIXELS = 500 * 32 * 32
"""Height x width x images that are evaluated at once at most, so that memory does not grow with the
size of the images."""
_EVAL_IMAGES = 500
_CHUNK = 1000
"""Images counted at once for the statistics."""
_LEAST_STD = 1 / 255
"""A channel that hardly varies is not blown up beyond its steps of one pixel value."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Normalised images `[B, C, H, W]` float32; targets `[B]` int64 or soft `[B, K]`.

    `samples` `[B]` int64 are their indices in the split.
    """

    images: Tensor
    targets: Tensor
    samples: Tensor


@dataclass(frozen=True, slots=True)
class Mixed:
    """What was mixed into a batch: its partners' `targets` `[B]`, and every sample's own `share`.

    That is `[B]` float32, a fraction of the pixels.
    """

    targets: Tensor
    share: Tensor


@dataclass(frozen=True, slots=True)
class TrainBatch(Batch):
    """A micro-batch of training, and a way to as many others to mix it with.

    `load_partners()` gives every sample another one of the same global batch, augmented as there:
    the first of the global batch goes with the last, the second with the last but one (the middle
    of an odd one with itself), so the pairs are the same on any number of processes. It is for use
    within the step; unused it costs nothing. `mixed`: where the recipe mixes, `images` are mixed
    with these partners already.
    """

    load_partners: Callable[[], Batch]
    mixed: Mixed | None = None

    @property
    def likeliest(self) -> Tensor:
        """The target of every sample that has the greater share in it, `[B]` or soft `[B, K]`."""
        if self.mixed is None:
            return self.targets
        return torch.where(self.mixed.share >= 0.5, self.targets, self.mixed.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, split: Split) -> "Normalization":
        """The statistics of a split, exact: from integer sums of pixels and of their squares."""
        pixels = split.images.shape[0] * split.images.shape[2] * split.images.shape[3]
        mean, std = [], []
        for channel in range(split.images.shape[1]):
            counts = np.zeros(256, dtype=np.int64)
            for start in range(0, len(split), _CHUNK):  # bincount needs 8 bytes for every pixel
                pixels_here = split.images[start : start + _CHUNK, channel].reshape(-1)
                counts += np.bincount(pixels_here, minlength=256)
            values = np.arange(256, dtype=np.int64)
            total, squares = int(counts @ values), int(counts @ values**2)
            mean.append(total / pixels / 255)
            variance = (squares * pixels - total * total) / pixels**2 / 255**2
            std.append(max(variance**0.5, _LEAST_STD))
        return cls(mean=tuple(mean), std=tuple(std))


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of how many this is."""

    index: int = 0
    count: int = 1


class DeviceImages:
    """A split on a device, with the normalisation that turns its pixels into network input."""

    def __init__(
        self,
        split: Split,
        normalization: Normalization,
        device: torch.device,
        *,
        channels_last: bool = False,
    ) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(split.images)).to(device)
        self.labels = torch.from_numpy(np.ascontiguousarray(split.labels)).to(device)
        self.device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        mean = torch.tensor(normalization.mean, dtype=torch.float64)
        std = torch.tensor(normalization.std, dtype=torch.float64)
        self._scale = (1 / (255 * std)).float().view(1, -1, 1, 1).to(device)
        self._shift = (-mean / std).float().view(1, -1, 1, 1).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` to float32 of zero mean and unit variance, in the run's layout."""
        pixels = images.to(torch.float32, memory_format=self._format)
        return pixels.mul_(self._scale).add_(self._shift)

    def batch(self, samples: Tensor) -> Batch:
        """The samples with these indices as they are, `[B]` int64."""
        images = self.normalize(self.images.index_select(0, samples))
        return Batch(images, self.labels.index_select(0, samples), samples)


class TrainLoader:
    """Training batches of one process: its share of every global batch, epoch by epoch.

    A global batch is `accumulation_steps x processes x per_device_batch_size` consecutive samples
    of the epoch's order; the last incomplete one is dropped.
    """

    def __init__(
        self,
        images: DeviceImages,
        recipe: Recipe,
        *,
        per_device_batch_size: int,
        accumulation_steps: int = 1,
        place: Place = Place(),
        seed: int = 0,
    ) -> None:
        self._images = images
        self._read = get_reader(recipe, images.images)
        self._augmentations = get_augmentations(recipe)
        self._mixer = get_mixer(recipe)
        self._accumulation_steps = accumulation_steps
        self._per_device_batch_size = per_device_batch_size
        self._place = place
        self._seed = seed
        self.global_batch_size = accumulation_steps * place.count * per_device_batch_size
        self.steps_per_epoch = len(images) // self.global_batch_size
        self.set_epoch(0)

    def with_recipe(self, recipe: Recipe) -> "TrainLoader":
        """Another loader of the same batches, augmented as this recipe says."""
        return TrainLoader(
            self._images,
            recipe,
            per_device_batch_size=self._per_device_batch_size,
            accumulation_steps=self._accumulation_steps,
            place=self._place,
            seed=self._seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the augmentations of this epoch."""
        self.epoch = epoch
        self._draws = EpochDraws(self._seed, epoch, len(self._images), self._images.device)
        used = self._draws.order()[: self.steps_per_epoch * self.global_batch_size]
        steps = used.view(-1, self.global_batch_size)
        self._samples, self._partners = self._share(steps), self._share(steps.flip(1))

    def _share(self, steps: Tensor) -> Tensor:
        """This process's part of global batches `[steps, B]`: `[steps, accumulation, B]`."""
        parts = (self._accumulation_steps, self._place.count, self._per_device_batch_size)
        return steps.view(-1, *parts)[:, :, self._place.index]

    def samples(self, step: int) -> Tensor:
        """Indices of this process's samples in step `step` of the epoch, `[accumulation, B]`."""
        return self._samples[step]

    def batches_of(self, step: int) -> list[TrainBatch]:
        """This process's augmented micro-batches of step `step` of the training, all its epochs
        counted through."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.set_epoch(epoch)
        return list(self.micro_batches(position))

    def micro_batches(self, step: int) -> Iterator[TrainBatch]:
        """The augmented micro-batches of this process in step `step` of the epoch."""
        for samples, partners in zip(self._samples[step], self._partners[step], strict=True):
            batch = self.load(samples)
            load_partners = functools.partial(self.load, partners)
            if self._mixer is None:
                yield TrainBatch(batch.images, batch.targets, samples, load_partners)
            else:
                other = self._mirrored(batch) if self._is_whole else load_partners()
                draws = self._draws.of(samples)
                images, share = self._mixer(batch.images, other.images, draws)
                mixed = Mixed(other.targets, share)
                yield TrainBatch(images, batch.targets, samples, load_partners, mixed)

    @property
    def _is_whole(self) -> bool:
        """Whether a micro-batch is a whole global batch, and so holds its own partners."""
        return self._accumulation_steps == self._place.count == 1

    @staticmethod
    def _mirrored(batch: Batch) -> Batch:
        return Batch(batch.images.flip(0), batch.targets.flip(0), batch.samples.flip(0))

    def load(self, samples: Tensor) -> Batch:
        """The augmented images and labels of any samples of this epoch, `[B]` int64."""
        draws = self._draws.of(samples)
        images = self._read(draws)
        for augmentation in self._augmentations:
            images = augmentation(images, draws)
        labels = self._images.labels.index_select(0, samples)
        return Batch(self._images.normalize(images), labels, samples)


def eval_batch_size(images: DeviceImages, model: ModelConfig) -> int:
    """Images to evaluate at once: 500, or of large ones as many as have `EVAL_PIXELS`.

    That is of the size which the model gets. Libraries' networks, made for large images, begin with
    a layer that leaves a quarter of the pixels or fewer.
    """
    first, second = images.images.shape[2:]
    height, width = model.input_size((first, second))
    pixels = height * width // (4 if model.library else 1)
    return max(1, min(_EVAL_IMAGES, EVAL_PIXELS // max(1, pixels)))


def eval_batches(images: DeviceImages, batch_size: int, place: Place) -> Iterator[Batch]:
    """This process's share of a split, every sample on exactly one process, none padded."""
    mine = torch.arange(len(images), device=images.device)[place.index :: place.count]
    for start in range(0, len(mine), batch_size):
        yield images.batch(mine[start : start + batch_size])
