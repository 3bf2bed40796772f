"""Image folders: `train/<class>/` and `test/<class>/`, read with Pillow."""

import math
import struct
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar.data.dataset import Split
from cifar.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
"""Pillow decides by contents: without this a `.png` could be a format with a riskier reader."""


def read_folder(root: Path, max_bytes: int) -> tuple[tuple[str, ...], Split, Split]:
    """Classes, train and test split of `root/train` and `root/test` (or `root/val`), as RGB.

    Classes and files come in the order of their names. Names that start with a dot and files
    without an image's suffix are left out.

    Raises:
        DataError: a folder without classes, a class without images or in `test` alone, an
            unreadable image, one of another size than the first, more than `max_bytes` of pixels
            in a split; names the file or folder.
    """
    train_files = _class_files(_subfolder(root, "train"))
    test_files = _class_files(_subfolder(root, "test", "val"))
    for name, files in test_files.items():
        if name not in train_files:
            raise DataError(f"data: {files[0].parent}: no such class in {root / 'train'}; add it")
    classes = tuple(train_files)
    shape = _read_image(train_files[classes[0]][0]).shape
    train, test = (
        _read_split(
            [(path, classes.index(name)) for name in files for path in files[name]],
            shape,
            max_bytes,
        )
        for files in (train_files, test_files)
    )
    return classes, train, test


def read_test_folder(
    root: Path, max_bytes: int
) -> tuple[npt.NDArray[np.uint8], list[Path], list[str] | None]:
    """Images `[N, 3, H, W]`, their files, and the name of every one's class.

    The images of `root/CLASS/` folders or, where there are none, those in `root` itself, which have
    no class. Order and what is left out are as in `read_folder`, and so is what it raises.
    """
    entries = [entry for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."]
    files = _class_files(root) if entries else {"": _image_files(root)}
    labelled = [(path, 0) for paths in files.values() for path in paths]
    split = _read_split(labelled, _read_image(labelled[0][0]).shape, max_bytes)
    named = [name for name, paths in files.items() for _ in paths]
    return split.images, [path for path, _ in labelled], named if entries else None


def _subfolder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"data: {root / names[0]}: no such folder; lay images out as "
        f"{root / names[0]}/CLASS/IMAGE.png"
    )


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class of one split, by name."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
    classes = {entry.name: _image_files(entry) for entry in entries if entry.is_dir()}
    if not classes:
        raise DataError(f"data: {folder}: no classes; lay images out as {folder}/CLASS/IMAGE.png")
    return classes


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."
    )
    if not files:
        raise DataError(f"data: {folder}: no images ({' '.join(SUFFIXES)}); add or remove it")
    return files


def _read_split(labelled: list[tuple[Path, int]], shape: tuple[int, ...], max_bytes: int) -> Split:
    """Read every image of one split; `shape` is the `[height, width, 3]` that each must have."""
    if len(labelled) * math.prod(shape) > max_bytes:
        raise DataError(
            f"data: {labelled[0][0].parents[1]}: {len(labelled):,} images of "
            f"{shape[1]}x{shape[0]}: must be at most {max_bytes:,} bytes; scale them down"
        )
    images = np.empty((len(labelled), 3, *shape[:2]), dtype=np.uint8)
    for index, (path, _) in enumerate(labelled):
        image = _read_image(path)
        if image.shape != shape:
            raise DataError(
                f"data: {path}: {image.shape[1]}x{image.shape[0]} pixels: all images must have "
                f"the same size, the first has {shape[1]}x{shape[0]}"
            )
        images[index] = image.transpose(2, 0, 1)
    return Split(images=images, labels=np.array([label for _, label in labelled], dtype=np.int64))


def _read_image(path: Path) -> npt.NDArray[np.uint8]:
    """An image as RGB `[height, width, 3]`; Pillow's limit on pixels is an error."""
    from PIL import Image

    if not path.is_file():
        raise DataError(f"data: {path}: is no file; remove it")
    bad = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # transparency is dropped on purpose
            with Image.open(path, formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits per channel")
                return np.array(image.convert("RGB"))
    except (*bad, Image.DecompressionBombWarning) as error:
        reason = " ".join(str(error).split()).removesuffix(f" '{path}'")
        raise DataError(f"data: {path}: unreadable image: {reason}; replace or remove it") from None
