"""Archives of published data sets: where they lie, and how what is known of them is unpacked."""

import functools
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from cifar.data import tiny_imagenet
from cifar.data.sources import CIFAR_LAYOUTS, CifarLayout
from cifar.data.unpickle import MAX_FILE_BYTES
from cifar.errors import DataError

MAX_UNPACKED_BYTES = 2**30
"""Of all files of an archive together; the largest data set, Tiny ImageNet, has about 250 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """Where an archive lies, what it must hash to, and what is unpacked from it."""

    url: str
    md5: str
    kind: Literal["tar.gz", "zip"]
    folder: str
    """The folder in it that holds the data set."""
    needed: tuple[str, ...]
    """Paths below that folder without which it cannot be read."""
    is_member: Callable[[str], bool]
    """Whether a path below that folder is unpacked; nothing else is."""


def _cifar(layout: CifarLayout, url: str, md5: str) -> Archive:
    return Archive(
        url=url,
        md5=md5,
        kind="tar.gz",
        folder=layout.folder,
        needed=layout.files,
        is_member=layout.files.__contains__,
    )


ARCHIVES = {
    "cifar10": _cifar(
        CIFAR_LAYOUTS["cifar10"],
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    "cifar100": _cifar(
        CIFAR_LAYOUTS["cifar100"],
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
    ),
    "tiny-imagenet": Archive(
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        kind="zip",
        folder=tiny_imagenet.FOLDER,
        needed=tiny_imagenet.NEEDED,
        is_member=tiny_imagenet.is_member,
    ),
}
"""Source of CIFAR's addresses and checksums: https://www.cs.toronto.edu/~kriz/cifar.html. The
course that made Tiny ImageNet publishes no checksum; this is the one in other projects' loaders,
such as Avalanche's (https://github.com/ContinualAI/avalanche).
"""

Member = tuple[str, int, Callable[[], IO[bytes]]]
"""A regular file of an archive: its path there, its size in bytes, and what opens it."""


def extract(part: Path, folder: Path, archive: Archive) -> None:
    """Write the known files of the archive beside `folder`, then rename: all of them or none.

    Not `extractall`, whose filter can be escaped in Python 3.11 before 3.11.13 (CVE-2025-4517):
    what is not a file of the data set by the whole of its path is passed over.

    Raises:
        DataError: damaged, too much, or not all that is needed; names the file.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
            staging = Path(temporary) / folder.name
            _write_members(part, staging, archive)
            lacking = [name for name in archive.needed if not (staging / name).exists()]
            if lacking:
                paths = ", ".join(f"{archive.folder}/{name}" for name in sorted(lacking))
                raise DataError(f"download: {part}: lacks the files {paths}; remove it")
            staging.rename(folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"download: {part}: damaged: {error}; remove it and run again") from None


def _write_members(part: Path, staging: Path, archive: Archive) -> None:
    """Write the files of the data set into `staging`; the first of two of one path counts."""
    members = _tar_members if archive.kind == "tar.gz" else _zip_members
    total = 0
    for path, size, opened in members(part):
        name = path.removeprefix(f"{archive.folder}/")
        target = staging / name
        if name == path or not archive.is_member(name) or size > MAX_FILE_BYTES or target.exists():
            continue
        total += size
        if total > MAX_UNPACKED_BYTES:
            limit = f"more than {MAX_UNPACKED_BYTES:,} bytes unpacked"
            raise DataError(f"download: {part}: {limit}; remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened() as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isreg():
                opened = functools.partial(_opened, archive, member)
                yield member.name.removeprefix("./"), member.size, opened


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    source = archive.extractfile(member)
    assert source is not None, "extractfile gives None for folders and devices only"
    return source


def _zip_members(path: Path) -> Iterator[Member]:
    """A link is a file that holds its target, and stays one; none gives more than its size."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, functools.partial(archive.open, member)
