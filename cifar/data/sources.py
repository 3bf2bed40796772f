"""Data sources: each reads its files into a `Dataset` of uint8 arrays.

A new source is one function from `DataConfig` to `Dataset` and its entry in `SOURCES`.
"""

import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar.data.arrays import read_npz
from cifar.data.config import DataConfig
from cifar.data.dataset import Dataset, Split
from cifar.data.folder import read_folder
from cifar.data.shapes import load_shapes
from cifar.data.tiny_imagenet import CLASSES_FILE, FOLDER, read_tiny_imagenet
from cifar.data.unpickle import unpickle
from cifar.errors import DataError
from cifar.files import user_path

MAX_DATASET_BYTES = 4 * 2**30
"""Largest data set that is read, as uint8 pixels: it has to fit the training device."""


def load_dataset(config: DataConfig) -> Dataset:
    """Read the data set that `config` names.

    Raises:
        DataError: missing, damaged or of the wrong form; names the file or folder.
        ConfigError: the default folder of CIFAR names a user that does not exist.
    """
    try:
        return SOURCES[config.source](config)
    except OSError as error:
        where, reason = error.filename or config, error.strerror or error
        raise DataError(
            f"data: {where}: cannot be read: {reason}; make it readable or name another --data"
        ) from None


def default_data_dir() -> Path:
    """Where `cifar download` writes: `$CIFAR_DATA_DIR`, else `cifar` in the user's cache folder."""
    if chosen := os.environ.get("CIFAR_DATA_DIR"):
        return user_path(chosen, "CIFAR_DATA_DIR")
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "cifar"


def _path(config: DataConfig) -> Path:
    if not config.path:
        raise DataError(f"data: {config.source}: no path; write {config.source}:PATH")
    return Path(config.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class CifarLayout:
    """The official python version of a CIFAR: its folder, files and keys.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels_key: str
    names_key: str
    num_classes: int

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return (*self.train, self.test, self.meta)


CIFAR_LAYOUTS = {
    "cifar10": CifarLayout(
        name="cifar10",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels_key="labels",
        names_key="label_names",
        num_classes=10,
    ),
    "cifar100": CifarLayout(
        name="cifar100",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels_key="fine_labels",
        names_key="fine_label_names",
        num_classes=100,
    ),
}


def load_cifar(config: DataConfig) -> Dataset:
    """CIFAR-10 or CIFAR-100 (fine labels), images `[N, 3, 32, 32]`, in the official order.

    `config.root` is the folder of the layout or the one that contains it.
    """
    layout = CIFAR_LAYOUTS[config.source]
    folder = _folder_of(layout.name, config.root, layout.folder, layout.meta)
    return Dataset(
        name=layout.name,
        classes=_cifar_classes(folder / layout.meta, layout),
        train=_cifar_split([folder / name for name in layout.train], layout),
        test=_cifar_split([folder / layout.test], layout),
    )


def _folder_of(name: str, root: str | None, folder_name: str, file: str) -> Path:
    """Where a data set lies that can be downloaded: the folder with this file in it."""
    base = Path(root) if root else default_data_dir()
    for folder in (base / folder_name, base):
        if (folder / file).exists():
            return folder
    raise DataError(
        f"data: {base}: no {folder_name} with {file} in it; run `cifar download {name}` or give "
        f"the folder of your copy: --data {name}:DIR"
    )


def _cifar_classes(path: Path, layout: CifarLayout) -> tuple[str, ...]:
    names = unpickle(path).get(layout.names_key)
    if not isinstance(names, list) or len(names) != layout.num_classes:
        raise DataError(
            f"data: {path}: {layout.names_key}: must be a list of {layout.num_classes} names; "
            "replace the file"
        )
    return tuple(
        name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names
    )


def _cifar_split(paths: list[Path], layout: CifarLayout) -> Split:
    images, labels = zip(*(_cifar_batch(path, layout) for path in paths), strict=True)
    for path, batch in zip(paths, images, strict=True):
        if len(batch) != len(images[0]):
            raise DataError(
                f"data: {path}: data: {len(batch)} images: must be {len(images[0])} as in "
                f"{paths[0].name}; replace the file"
            )
    return Split(images=np.concatenate(images), labels=np.concatenate(labels))


def _cifar_batch(
    path: Path, layout: CifarLayout
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    batch = unpickle(path)
    pixels, labels = batch.get("data"), batch.get(layout.labels_key)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3072,) or not len(pixels):
        shape = list(pixels.shape) if isinstance(pixels, np.ndarray) else "missing"
        raise DataError(
            f"data: {path}: data: {shape}: must be an array [N, 3072] of uint8, N not 0; "
            "replace the file"
        )
    if not isinstance(labels, list) or len(labels) != len(pixels):
        count = len(labels) if isinstance(labels, list) else "missing"
        raise DataError(
            f"data: {path}: {layout.labels_key}: {count}: must be a list of {len(pixels)}, "
            "one per image; replace the file"
        )
    for label in labels:
        if type(label) is not int or not 0 <= label < layout.num_classes:
            raise DataError(
                f"data: {path}: {layout.labels_key}: {reprlib.repr(label)}: "
                f"must be an integer in 0..{layout.num_classes - 1}; replace the file"
            )
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def load_tiny_imagenet(config: DataConfig) -> Dataset:
    """Tiny ImageNet, images `[N, 3, 64, 64]`, its `val` as the test split.

    `config.root` is the folder of the layout or the one that contains it.
    """
    folder = _folder_of(config.source, config.root, FOLDER, CLASSES_FILE)
    classes, train, test = read_tiny_imagenet(folder, MAX_DATASET_BYTES)
    return Dataset(name=config.source, classes=classes, train=train, test=test)


def load_folder(config: DataConfig) -> Dataset:
    """Images in folders, one per class; the data set is named after the last part of the path."""
    root = _path(config)
    classes, train, test = read_folder(root, MAX_DATASET_BYTES)
    name = f"folder:{root.resolve().name}"
    return Dataset(name=name, classes=classes, train=train, test=test)


def load_npz(config: DataConfig) -> Dataset:
    """Arrays `train_images`, `train_labels`, `test_images`, `test_labels` of an `.npz` file.

    `x_train`, `y_train`, `x_test`, `y_test` are accepted too. Images are uint8 `[N, H, W, C]` or
    `[N, C, H, W]` with C 1 or 3: whichever of the two places holds 1 or 3 is C, and where both do
    the file is refused. Labels are integers `[N]` or `[N, 1]` of any width. `class_names` is
    optional; without it the classes are called "0", "1", ... up to the largest label.
    """
    path = _path(config)
    arrays = read_npz(path, MAX_DATASET_BYTES)
    splits = {split: _npz_split(path, arrays, split) for split in ("train", "test")}
    trained, tested = (int(splits[name].labels.max(initial=0)) for name in ("train", "test"))
    if "class_names" not in arrays and tested > trained:
        raise DataError(
            f"data: {path}: test labels: {tested}: the largest training label is {trained}; "
            "correct it, or name all classes in class_names"
        )
    highest = max(trained, tested)
    return Dataset(
        name=f"npz:{path.stem}",
        classes=_npz_classes(path, arrays.get("class_names"), highest, len(splits["train"])),
        **splits,
    )


def _npz_split(path: Path, arrays: dict[str, npt.NDArray[Any]], split: str) -> Split:
    images_key, labels_key = f"{split}_images", f"{split}_labels"
    if images_key not in arrays and labels_key not in arrays:
        images_key, labels_key = f"x_{split}", f"y_{split}"
    for key in (images_key, labels_key):
        if key not in arrays:
            raise DataError(
                f"data: {path}: no {split}_images and {split}_labels (or x_{split} and y_{split}), "
                f"it holds {reprlib.repr(sorted(arrays))}; add them"
            )
    images = channels_first(f"data: {path}: {images_key}", arrays[images_key])
    labels = as_labels(f"data: {path}: {labels_key}", arrays[labels_key], len(images))
    return Split(images=images, labels=labels)


def as_labels(where: str, labels: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """`count` integers `[N]` or `[N, 1]` as int64 `[N]`; raises DataError for what is neither."""
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{where}: {labels.dtype} {list(labels.shape)}: "
            f"must be integers [{count}], one per image; write them again"
        )
    if labels.min() < 0 or int(labels.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{where}: {labels.min()}..{labels.max()}: must be 0 or more; correct them")
    return labels.reshape(-1).astype(np.int64)


def channels_first(where: str, images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Images `[N, H, W, C]` or `[N, C, H, W]` as the latter; a DataError for what is neither."""
    found = f"{where}: {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise DataError(
            f"{found}: must be uint8 [N, H, W, C] or [N, C, H, W], none of them 0; write it again"
        )
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first == last:
        problem = "cannot tell which axis holds the channels" if first else "no axis has 1 or 3"
        raise DataError(
            f"{found}: {problem}; C of [N, H, W, C] or [N, C, H, W] must be 1 or 3; write it again"
        )
    return np.ascontiguousarray(images if first else images.transpose(0, 3, 1, 2))


def _npz_classes(
    path: Path, names: npt.NDArray[Any] | None, highest: int, num_images: int
) -> tuple[str, ...]:
    """Class names; as many as there are training images at most, so that a label stays a label."""
    if names is None:
        if highest >= num_images:
            raise DataError(
                f"data: {path}: labels: {highest}: more classes than training images; "
                "number the classes from 0"
            )
        return tuple(str(label) for label in range(highest + 1))
    if names.dtype.kind != "U" or names.ndim != 1 or highest >= len(names):
        raise DataError(
            f"data: {path}: class_names: {names.dtype} {list(names.shape)}: must be at least "
            f"{highest + 1} texts, the largest label is {highest}; add names"
        )
    return tuple(names.tolist())


SOURCES: dict[str, Callable[[DataConfig], Dataset]] = {
    "shapes": lambda _: load_shapes(),
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "tiny-imagenet": load_tiny_imagenet,
    "folder": load_folder,
    "npz": load_npz,
}
