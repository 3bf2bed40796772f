"""Parts of a data set: fewer training images, and some held out to choose by. No torch in here.

Which images these are depends on the images' order and labels alone, not on the seed of a training.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cifar.data.dataset import Dataset, Split
from cifar.errors import ConfigError

_KEY = 10_000
"""Of the random order; any number would do as well."""


def divide(dataset: Dataset, limit_train: int | None, validation: float) -> Dataset:
    """The data set with `limit_train` training images, a share of which is held out.

    Every class keeps its share, to within one image: in what is left to train on as in what is
    held out. The images keep their order.

    Raises:
        ConfigError: there are fewer images, or too few to hold any out or to leave any.
    """
    train = dataset.train
    if limit_train is not None:
        if limit_train > len(train):
            raise ConfigError(
                f"limit-train: {limit_train}: {dataset.name} has {len(train)} training images; "
                "give at most that many"
            )
        train, _ = _parted(train, limit_train)
    if not validation:
        return replace(dataset, train=train)
    count = round(validation * len(train))
    if not 0 < count < len(train):
        raise ConfigError(
            f"validation: {validation:g}: leaves {count} of {len(train)} training images to choose "
            f"by and {len(train) - count} to train on; give another share"
        )
    held_out, rest = _parted(train, count)
    return replace(dataset, train=rest, validation=held_out)


def _parted(split: Split, count: int) -> tuple[Split, Split]:
    """`count` samples, and the others."""
    order = _spread(split.labels)
    return _taken(split, order[:count]), _taken(split, order[count:])


def _taken(split: Split, samples: npt.NDArray[np.int64]) -> Split:
    chosen = np.sort(samples)
    return Split(images=split.images[chosen], labels=split.labels[chosen])


def _spread(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A random order of the samples in which every beginning holds the classes in proportion.

    Of a class's n samples the k-th comes at (k - 1/2) / n of the way. Only the generator's bits
    are used, which numpy keeps the same in all versions.
    """
    keys = np.random.Philox(_KEY).random_raw(len(labels))
    shuffled = np.argsort(keys, kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    ranks = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (2 * ranks + 1) / (2 * np.repeat(counts, counts))
    return np.asarray(by_class[np.lexsort((keys[by_class], places))], dtype=np.int64)
