"""Image files, read with Pillow into the arrays of a split."""

import contextlib
import math
import os
import struct
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar.data.dataset import Split
from cifar.errors import DataError
from cifar.files import check_data_file
from cifar.ranks import is_first

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
"""Pillow decides by contents: without this a `.png` could be a format with a riskier reader."""
SHOWN_FROM = 5_000
"""Images that take about a second to read; the progress of fewer is not shown."""
PLAIN_INTERVAL = 30.0
"""Seconds between lines of progress where stderr is no terminal."""

Labelled = tuple[Path, int]
"""An image file and its class."""


def read_split(
    folder: Path, labelled: Sequence[Labelled], shape: tuple[int, ...], max_bytes: int
) -> Split:
    """Read every image of one split as RGB; `shape` is `[height, width, 3]`, the same for all.

    One after the other: most of a small image's time goes to the interpreter, which one thread has
    at a time. Two on two cores read 1.04 to 1.25 times as many images of 64x64 pixels per second as
    one, and a fraction of that where other programs had the cores.

    Raises:
        DataError: an unreadable image or one of another size, named; more than `max_bytes` of
            pixels in `folder`, where they lie.
    """
    height, width, _ = shape
    if len(labelled) * math.prod(shape) > max_bytes:
        raise DataError(
            f"data: {folder}: {len(labelled):,} images of {width}x{height}: must be at most "
            f"{max_bytes:,} bytes; scale them down"
        )
    images = np.empty((len(labelled), 3, height, width), dtype=np.uint8)
    with _strict(), contextlib.closing(_shown(labelled)) as files:
        for index, (path, _) in enumerate(files):
            image = _read(path)
            if image.shape != shape:
                raise DataError(
                    f"data: {path}: {image.shape[1]}x{image.shape[0]} pixels: must be "
                    f"{width}x{height} like the others; scale or remove it"
                )
            images[index] = image.transpose(2, 0, 1)
    return Split(images=images, labels=np.array([label for _, label in labelled], dtype=np.int64))


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """One image as RGB `[height, width, 3]`; Pillow's limit on pixels is an error.

    Raises:
        DataError: it is none, or damaged; names the file.
    """
    with _strict():
        return _read(path)


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """Warnings of Pillow are errors or nothing; once for many images, as this takes its time."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # transparency is dropped on purpose
        yield


def _read(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    check_data_file(path, "remove it")
    bad = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel")
            return np.array(image.convert("RGB"))
    except (*bad, Image.DecompressionBombWarning) as error:
        reason = " ".join(str(error).split()).removesuffix(f" '{path}'")
        raise DataError(f"data: {path}: unreadable image: {reason}; replace or remove it") from None


def _shown(files: Sequence[Labelled]) -> Generator[Labelled, None, None]:
    """The files, and on stderr how many of them have been read: a bar on a terminal, else lines.

    The first process alone tells.
    """
    if len(files) < SHOWN_FROM or not is_first(os.environ):
        yield from files
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(files, "reading images", console=console, transient=True)
        return
    last_line = time.monotonic()
    for done, file in enumerate(files):
        if time.monotonic() - last_line >= PLAIN_INTERVAL:
            last_line = time.monotonic()
            print(f"read {done:,} of {len(files):,} images", file=sys.stderr, flush=True)
        yield file
