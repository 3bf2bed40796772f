"""Fewer training images, and images held out to choose by."""

import numpy as np
import pytest
from conftest import make_dataset

from cifar.config import Recipe, TrainConfig
from cifar.data.dataset import Dataset, Split
from cifar.data.division import divide
from cifar.errors import ConfigError


def labelled(labels: list[int]) -> Dataset:
    """Images that hold their own number."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    split = Split(images=images, labels=np.array(labels, dtype=np.int64))
    return Dataset(name="toy", classes=("a", "b", "c"), train=split, test=split)


def numbers(split: Split | None) -> list[int]:
    return [] if split is None else split.images.flatten().tolist()


def test_nothing_is_divided_unless_asked() -> None:
    dataset = make_dataset()
    whole = divide(dataset, None, 0.0)
    assert whole.train is dataset.train and whole.validation is None


@pytest.mark.parametrize("count", [1, 3, 10, 29, 30])
def test_every_class_keeps_its_share(count: int) -> None:
    dataset = labelled([0] * 15 + [1] * 10 + [2] * 5)
    limited = divide(dataset, count, 0.0).train
    found = np.bincount(limited.labels, minlength=3)
    assert found.sum() == count
    assert np.abs(found - count * np.array([15, 10, 5]) / 30).max() <= 1
    assert numbers(limited) == sorted(numbers(limited)), "in their order"


def test_what_is_held_out_is_not_trained_on() -> None:
    dataset = labelled([0, 1, 2, 0] * 25)
    divided = divide(dataset, 80, 0.25)
    held_out, train = numbers(divided.validation), numbers(divided.train)
    assert (len(held_out), len(train)) == (20, 60)
    assert not {*held_out} & {*train}
    assert {*held_out, *train} == {*numbers(divide(dataset, 80, 0.0).train)}
    labels = dict(zip(numbers(dataset.train), dataset.train.labels.tolist(), strict=True))
    assert divided.validation is not None
    assert divided.validation.labels.tolist() == [labels[number] for number in held_out]
    assert np.bincount(divided.validation.labels).tolist() == [10, 5, 5]


def test_the_images_are_random_and_always_the_same() -> None:
    found = numbers(divide(labelled([0] * 60 + [1] * 40), 20, 0.0).train)
    assert found == [2, 4, 6, 10, 27, 28, 30, 31, 37, 39, 48, 52, 61, 62, 76, 78, 79, 81, 89, 99]


@pytest.mark.parametrize(
    ("limit", "validation", "message"),
    [
        (97, 0.0, r"limit-train: 97: toy has 96 training images; give at most that many"),
        (2, 0.1, r"validation: 0\.1: leaves 0 of 2 training images to choose by and 2 to train"),
        (None, 0.999, r"validation: 0\.999: leaves 96 of 96 training images .* and 0 to train on"),
    ],
)
def test_too_few_images_are_refused(limit: int | None, validation: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divide(make_dataset(), limit, validation)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(validation=1.0), r"validation: 1\.0: give 0 <= share < 1"),
        (lambda: Recipe(validation=-0.1), r"validation: -0\.1: give 0 <= share < 1"),
        (lambda: Recipe(patience=3), r"patience: 3: needs images to choose by; hold some out"),
        (lambda: Recipe(patience=-1, validation=0.1), r"patience: -1: give 0 to"),
        (lambda: TrainConfig(limit_train=0), r"limit-train: 0: give 1 or more"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
