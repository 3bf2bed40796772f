"""A test set of the user's own, apart from any training data, with labels or without.

It is read for the classes and the size of images that a model was trained with. No torch in here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar.data.arrays import read_npy, read_npz
from cifar.data.folder import read_test_folder
from cifar.data.sources import MAX_DATASET_BYTES, as_labels, channels_first
from cifar.errors import DataError

_KEYS = {"images": "labels", "test_images": "test_labels", "x_test": "y_test", "data": "labels"}
"""Names of arrays of images, and of their labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSet:
    """Images `[N, C, H, W]` uint8; labels `[N]` int64, or None; a name for every image."""

    __test__ = False  # for pytest, which takes it for tests

    name: str
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    samples: tuple[str, ...]


def read_test_set(
    path: Path,
    labels: Path | None,
    classes: Sequence[str],
    shape: tuple[int, int, int],
    *,
    any_size: bool = False,
) -> TestSet:
    """Read the images at `path`, which must have this `shape` (channels, height, width).

    With `any_size` the channels alone count: the network resizes what it is given. Grey images in
    files are of one channel where the model's are.

    - a `.npz` file with `images` and, or not, `labels` (or `test_images`, `x_test`; `test_labels`,
      `y_test`), which number `class_names` if it has them, else the model's classes;
    - a `.npy` file of images, such as CIFAR-10.1's
      (https://github.com/modestyachts/CIFAR-10.1), and `labels` in another one, or none;
    - a folder of `CLASS/` folders with images, or of images alone, which then have no labels.

    Raises:
        DataError: missing, damaged, of another size or class than the model's; names the file.
    """
    try:
        found = _read(path, labels, classes)
    except DataError as error:
        raise DataError(re.sub(r"\Adata: ", "images: ", str(error))) from None
    except OSError as error:
        where, reason = error.filename or path, error.strerror or error
        raise DataError(f"images: {where}: cannot be read: {reason}; make it readable") from None
    if shape[0] == 1 and _is_grey(found.images):
        found = replace(found, images=np.ascontiguousarray(found.images[:, :1]))
    if any_size:
        shape = (shape[0], *found.images.shape[2:])
    _check(found, path, labels or path, classes, shape)
    return found


def _is_grey(images: npt.NDArray[np.uint8]) -> bool:
    """Whether three channels `[N, 3, H, W]` are the same."""
    alike = images.shape[1] == 3
    return alike and bool((images[:, :1] == images[:, 1:]).all())


def _read(path: Path, labels: Path | None, classes: Sequence[str]) -> TestSet:
    suffix = path.suffix.lower()
    if labels is not None and suffix != ".npy":
        raise DataError(f"labels: {labels}: are for images in an .npy file; leave them out")
    if path.is_dir():
        return _read_folder(path, classes)
    if suffix == ".npz":
        return _read_npz(path, classes)
    if suffix == ".npy":
        return _read_npy(path, labels)
    raise DataError(f"data: {path}: no folder, .npz or .npy file; give one")


def _read_folder(path: Path, classes: Sequence[str]) -> TestSet:
    images, files, named = read_test_folder(path, MAX_DATASET_BYTES)
    unknown = sorted(set(named or ()) - set(classes))
    if unknown:
        raise DataError(
            f"data: {path / unknown[0]}: no class of the model, which are "
            f"{_listed(classes)}; rename the folder"
        )
    numbers = None if named is None else np.array([classes.index(name) for name in named])
    return TestSet(
        name=path.resolve().name,
        images=images,
        labels=numbers,
        samples=tuple(str(file.relative_to(path)) for file in files),
    )


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes[:10]) + ", ..." * (len(classes) > 10)


def _read_npz(path: Path, classes: Sequence[str]) -> TestSet:
    arrays = read_npz(path, MAX_DATASET_BYTES)
    images_key = next((key for key in _KEYS if key in arrays), None)
    if images_key is None:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(
            f"data: {path}: holds {held}, but no {' or '.join(_KEYS)}; call the array of images so"
        )
    labels_key = _KEYS[images_key]
    images = channels_first(f"data: {path}: {images_key}", arrays[images_key])
    if labels_key not in arrays:
        return _numbered(path, images, None)
    labels = as_labels(f"data: {path}: {labels_key}", arrays[labels_key], len(images))
    if "class_names" in arrays:
        labels = _renumbered(f"data: {path}: ", labels, arrays["class_names"], classes)
    return _numbered(path, images, labels)


def _renumbered(
    where: str, labels: npt.NDArray[np.int64], names: npt.NDArray[Any], classes: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Labels that number these names as those of the same names among the model's classes."""
    if names.dtype.kind != "U" or names.ndim != 1 or labels.max() >= len(names):
        raise DataError(
            f"{where}class_names: {names.dtype} {list(names.shape)}: must be at least "
            f"{labels.max() + 1} texts, the largest label is {labels.max()}; add names"
        )
    used = [str(names[label]) for label in labels]
    unknown = sorted(set(used) - set(classes))
    if unknown:
        raise DataError(
            f"{where}class_names: {unknown[0]!r}: no class of the model, which are "
            f"{_listed(classes)}; rename it, or leave class_names out if its numbers are theirs"
        )
    return np.array([classes.index(name) for name in used], dtype=np.int64)


def _read_npy(path: Path, labels: Path | None) -> TestSet:
    images = channels_first(f"data: {path}", read_npy(path, MAX_DATASET_BYTES))
    if labels is None:
        return _numbered(path, images, None)
    try:
        found = as_labels(f"data: {labels}", read_npy(labels, MAX_DATASET_BYTES), len(images))
    except DataError as error:
        raise DataError(re.sub(r"\Adata: ", "labels: ", str(error))) from None
    return _numbered(path, images, found)


def _numbered(
    path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64] | None
) -> TestSet:
    samples = tuple(map(str, range(len(images))))
    return TestSet(name=path.name, images=images, labels=labels, samples=samples)


def _check(
    found: TestSet, path: Path, labels: Path, classes: Sequence[str], shape: tuple[int, int, int]
) -> None:
    """Raise a DataError for images or labels that are not the model's."""
    if found.images.shape[1:] != shape:
        has, needs = ("x".join(map(str, each)) for each in (found.images.shape[1:], shape))
        raise DataError(
            f"images: {path}: {has} (channels x height x width): the model was trained with "
            f"{needs}; convert them"
        )
    if found.labels is not None and found.labels.max() >= len(classes):
        raise DataError(
            f"labels: {labels}: {found.labels.max()}: the model has {len(classes)} classes, 0 to "
            f"{len(classes) - 1}; correct them, or evaluate another model"
        )
