"""Image folders: `train/<class>/` and `test/<class>/`."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar.data.dataset import Split
from cifar.data.images import SUFFIXES, read_image, read_split
from cifar.errors import DataError


def read_folder(root: Path, max_bytes: int) -> tuple[tuple[str, ...], Split, Split]:
    """Classes, train and test split of `root/train` and `root/test` (or `root/val`), as RGB.

    Classes and files come in the order of their names. Names that start with a dot and files
    without an image's suffix are left out.

    Raises:
        DataError: a folder without classes, or with images beside them; a class without images,
            with folders of them, or in `test` alone; and what `cifar.data.images.read_split`
            raises; names the file or folder.
    """
    train, test = _subfolder(root, "train"), _subfolder(root, "test", "val")
    train_files, test_files = _class_files(train), _class_files(test)
    for name, files in test_files.items():
        if name not in train_files:
            raise DataError(f"data: {files[0].parent}: no such class in {train}; add it")
    classes = tuple(train_files)
    numbers = {name: number for number, name in enumerate(classes)}
    shape = read_image(train_files[classes[0]][0]).shape
    splits = [
        read_split(
            folder,
            [(path, numbers[name]) for name in files for path in files[name]],
            shape,
            max_bytes,
        )
        for folder, files in ((train, train_files), (test, test_files))
    ]
    return classes, splits[0], splits[1]


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
    split = read_split(root, labelled, read_image(labelled[0][0]).shape, max_bytes)
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
    for entry in entries:
        if entry.name not in classes and _is_image(entry):
            raise DataError(
                f"data: {entry}: an image beside the classes; move it into one of them or remove it"
            )
    return classes


def _image_files(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
    for entry in entries:
        if entry.is_dir() and any(_is_image(file) for file in entry.rglob("*")):
            raise DataError(
                f"data: {entry}: a folder of images in that of a class; move them into {folder}"
            )
    files = [entry for entry in entries if _is_image(entry)]
    if not files:
        raise DataError(f"data: {folder}: no images ({' '.join(SUFFIXES)}); add or remove it")
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES
