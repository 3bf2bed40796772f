"""Arrays of `.npz` and `.npy` files, without pickle, every size checked before memory is taken.

`numpy.load` allocates the shape that a member declares before it looks whether the data are there.
"""

import contextlib
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from cifar.errors import DataError
from cifar.files import check_data_file

_MALFORMED = (
    EOFError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path, max_bytes: int) -> dict[str, npt.NDArray[Any]]:
    """Every array of the file by its name, writable.

    Format, versions 1 and 2:
    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.

    Raises:
        DataError: missing, damaged, more than `max_bytes` when unpacked, an array of objects, or
            one whose declared shape is not the size of its data; names the file and the array.
    """
    check_data_file(path, "write npz:FILE")
    with _refused_if_malformed(path, ".npz"), zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > max_bytes:
            raise DataError(
                f"data: {path}: {total:,} bytes unpacked: must be at most {max_bytes:,}; "
                "leave out images"
            )
        return {
            member.filename.removesuffix(".npy"): _read_member(path, archive, member)
            for member in archive.infolist()
        }


@contextlib.contextmanager
def _refused_if_malformed(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever reading raises into a DataError."""
    try:
        yield
    except DataError:  # is a ValueError
        raise
    except _MALFORMED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data: {path}: not an {kind} file, or damaged: {reason[:200]}; write it again"
        ) from None


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    where = f"data: {path}: {' '.join(member.filename.split()).removesuffix('.npy')}"
    with archive.open(member) as file:
        return _read_array(file, member.file_size, where)


def read_npy(path: Path, max_bytes: int) -> npt.NDArray[Any]:
    """The array of the file, writable.

    Raises:
        DataError: as `read_npz` does.
    """
    check_data_file(path, "give another one")
    size = path.stat().st_size
    if size > max_bytes:
        raise DataError(
            f"data: {path}: {size:,} bytes: must be at most {max_bytes:,}; leave out images"
        )
    with _refused_if_malformed(path, ".npy"), path.open("rb") as file:
        return _read_array(file, size, f"data: {path}")


def _read_array(file: IO[bytes], size: int, where: str) -> npt.NDArray[Any]:
    """The array of a file of `size` bytes."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{where}: .npy version {version}: write plain arrays of numbers")
    read_header = npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise DataError(f"{where}: an array of objects; write plain arrays of numbers")
    declared = math.prod(shape) * dtype.itemsize
    if declared != size - file.tell():
        raise DataError(
            f"{where}: {dtype} {list(shape)} needs {declared:,} bytes, "
            f"the file has {size - file.tell():,}; write it again"
        )
    data = bytearray(file.read(declared))
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
