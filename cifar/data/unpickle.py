"""The pickles of CIFAR, read without trusting them.

Only the four names that those files mention are known, and each stands for something harmless of
our own: a pickle that names anything else is refused before anything runs. Arrays are views of
bytes that lie in the file, so that a declared size can never allocate memory.
"""

import io
import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar.errors import DataError
from cifar.files import check_data_file

MAX_FILE_BYTES = 256 * 2**20
"""No file of CIFAR is larger; the largest, CIFAR-100's `train`, has 155,249,918 bytes."""

_MAX_TUPLES = 60_000
"""Python 3 writes one for every byte text in protocol 2, and CIFAR-100 has 50,000 file names."""

_OPCODES = frozenset(
    re.findall(
        r"\w+",
        """
        PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
        NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
        BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINUNICODE SHORT_BINUNICODE
        EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS
        EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL REDUCE BUILD
        """,
    )
)
"""What dictionaries, lists, texts, numbers and arrays are made of in protocols 2 to 4."""

_MALFORMED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _DType:
    """Stands for `numpy.dtype`."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment: they mean nothing for one byte."""


class _Array:
    """Stands for `numpy.ndarray`: bytes of the file seen as `[rows, columns]` uint8."""

    values: npt.NDArray[np.uint8]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        if dtype.name not in ("u1", b"u1"):
            raise ValueError(f"array of {dtype.name!r}, must be uint8")
        if len(data) != math.prod(shape):
            raise ValueError(f"array {list(shape)} with {len(data)} bytes of data")
        flat = np.frombuffer(data, dtype=np.uint8)
        self.values = flat.reshape(shape, order="F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="bytes")
        self._bytes_left = len(raw)

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _DType,
            ("numpy.core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            ("_codecs", "encode"): self._encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no CIFAR file does")
        return known[module, name]

    def _reconstruct(self, *_: object) -> _Array:
        return _Array()

    def _encode(self, text: str, encoding: str) -> bytes:
        """Bytes as Python 3 writes them in protocol 2: a text and latin1, each text once."""
        self._bytes_left -= len(text)
        if encoding not in ("latin1", b"latin1") or self._bytes_left < 0:
            raise pickle.UnpicklingError(f"encodes {encoding!r} or more text than the file has")
        return text.encode("latin1")


def _check_opcodes(raw: bytes) -> None:
    """Refuse strange opcodes, texts beyond the end of the file, huge memo indices, deep nesting.

    `pickle` itself would allocate what a text or an index declares before it looks at the file, and
    hashing tuples nested 200,000 deep overflows the interpreter's stack.
    """
    tuples = 0
    for opcode, arg, _ in pickletools.genops(raw):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}, which no CIFAR file has")
        if opcode.name == "LONG_BINPUT" and (not isinstance(arg, int) or arg > len(raw)):
            raise pickle.UnpicklingError(f"memo index {arg}")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > _MAX_TUPLES:
            raise pickle.UnpicklingError(f"more than {_MAX_TUPLES} tuples")


def unpickle(path: Path) -> dict[str, Any]:
    """The dictionary in a CIFAR file: keys as text, arrays as read-only uint8 `[rows, columns]`.

    Files written by Python 2 (the official ones) and by Python 3, protocols 2 to 4. Format:
    https://www.cs.toronto.edu/~kriz/cifar.html, "Dataset layout"; method:
    https://docs.python.org/3/library/pickle.html#restricting-globals.

    Raises:
        DataError: missing, too large, truncated, damaged, or naming anything but arrays; names
            the file.
    """
    check_data_file(path, "get a fresh copy")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise DataError(f"data: {path}: {size:,} bytes: must be at most {MAX_FILE_BYTES:,}")
    raw = path.read_bytes()
    try:
        _check_opcodes(raw)
        contents = _Unpickler(raw).load()
        if not isinstance(contents, dict):
            raise TypeError(f"holds {type(contents).__name__}, must be a dictionary")
        return {
            key if isinstance(key, str) else key.decode(): (
                value.values if isinstance(value, _Array) else value
            )
            for key, value in contents.items()
        }
    except _MALFORMED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"data: {path}: not a CIFAR file, or damaged: {reason}; get a fresh copy"
        ) from None
