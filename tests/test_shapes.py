"""The embedded data set: its bytes, its balance, and that simple models cannot read it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cifar.data.dataset import Dataset, Split
from cifar.data.shapes import load_shapes
from cifar.errors import DataError

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return load_shapes()


def test_the_bytes_never_change(shapes: Dataset) -> None:
    assert shapes.fingerprint() == "db9997b049720994"
    assert load_shapes(7, train=205, test=101).fingerprint() == "6702d03905f37f5e"


def test_the_default_sizes_and_types(shapes: Dataset) -> None:
    assert shapes.name == "shapes"
    assert len(set(shapes.classes)) == 10
    assert shapes.train.images.shape == (10_000, 3, 32, 32)
    assert shapes.test.images.shape == (2_000, 3, 32, 32)
    for split in (shapes.train, shapes.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels).tolist() == [len(split) // 10] * 10


@pytest.mark.parametrize(("train", "test"), [(200, 100), (205, 101), (1, 3)])
def test_any_size_is_balanced_to_within_one_image(train: int, test: int) -> None:
    dataset = load_shapes(train=train, test=test)
    for split, size in ((dataset.train, train), (dataset.test, test)):
        assert len(split) == size
        counts = np.bincount(split.labels, minlength=10)
        assert counts.max() - counts.min() <= 1


def test_classes_are_in_random_order(shapes: Dataset) -> None:
    # Adjacent labels agree by chance in 1 of 10 cases; sorted or cyclic order gives 1 or 0.
    repeats = (np.diff(shapes.train.labels) == 0).mean()
    assert 0.08 < repeats < 0.12


def test_no_image_occurs_twice(shapes: Dataset) -> None:
    every = [image.tobytes() for split in (shapes.train, shapes.test) for image in split.images]
    assert len(set(every)) == len(every) == 12_000


def test_another_seed_draws_other_images() -> None:
    first, second = (load_shapes(seed, train=50, test=50) for seed in (0, 1))
    assert first.fingerprint() != second.fingerprint()
    images = [
        {image.tobytes() for split in (dataset.train, dataset.test) for image in split.images}
        for dataset in (first, second)
    ]
    assert images[0].isdisjoint(images[1])


def test_drawing_leaves_the_global_stream_alone() -> None:
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    load_shapes(train=10, test=10)
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert repr(before) == repr(after)


def pixels(images: Images) -> Features:
    return images.reshape(len(images), -1) / 255


def channel_histograms(images: Images) -> Features:
    """The share of pixels in each of 8 bins per channel."""
    shares = [(images // 32 == level).mean(axis=(2, 3)) for level in range(8)]
    return np.concatenate(shares, axis=1)


def colour_histograms(images: Images) -> Features:
    """The share of pixels in each of 4 x 4 x 4 colours."""
    red, green, blue = np.moveaxis(images // 64, 1, 0)
    colours = (16 * red + 4 * green + blue).reshape(len(images), -1)
    return np.stack([np.bincount(image, minlength=64) / image.size for image in colours])


def ridge_top1(train: Split, test: Split, features: Callable[[Images], Features]) -> float:
    """Top-1 on `test` of the linear least-squares classifier of one-hot labels."""
    x, y = features(train.images), np.eye(10)[train.labels]
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    x = (x - mean) / spread
    weights = np.linalg.solve(x.T @ x + 0.1 * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    guesses = ((features(test.images) - mean) / spread @ weights + y.mean(0)).argmax(axis=1)
    return float((guesses == test.labels).mean())


@pytest.mark.parametrize("features", [pixels, channel_histograms, colour_histograms])
def test_linear_classifiers_fail(shapes: Dataset, features: Callable[[Images], Features]) -> None:
    assert ridge_top1(shapes.train, shapes.test, features) < 0.5


def test_the_linear_classifier_of_these_tests_can_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    images = rng.integers(0, 20, (400, 3, 32, 32), dtype=np.uint8)
    images[np.arange(400), 0, labels] += 200
    split = Split(images=images, labels=labels)
    assert ridge_top1(split, split, pixels) > 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train": 0}, "shapes: train: 0: must be 1 or more"),
        ({"test": -3}, "shapes: test: -3: must be 1 or more"),
        ({"seed": -1}, "shapes: seed: -1: must lie in 0..4294967295"),
        ({"seed": 2**32}, "shapes: seed: 4294967296: must lie in 0..4294967295"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_shapes(**kwargs)


@pytest.mark.slow
def test_the_set_tells_widths_apart(tmp_path: Path) -> None:
    """Three epochs of the default recipe, three seeds of each width: ten minutes on two cores."""
    whole, half = (
        [trained_top1(model, seed, tmp_path / f"{model}-{seed}") for seed in range(3)]
        for model in ("resnet20", "resnet20-w8")
    )
    assert 0.90 <= min(whole) <= max(whole) <= 0.98
    assert max(half) < min(whole)
    assert np.mean(half) < np.mean(whole) - 0.03


def trained_top1(model: str, seed: int, folder: Path) -> float:
    command = ["-m", "cifar", "train", "--model", model, "--epochs", "3", "--channels-last"]
    command += ["--seed", str(seed), "--output-dir", str(folder)]
    subprocess.run([sys.executable, *command], check=True)
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["test_top1"])
