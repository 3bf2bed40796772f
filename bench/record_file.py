"""Files of records: one per line (JSON), read strictly, migrated from older schema versions.

A file only grows, one `write` per record, so that a crash can tear the last line at most.
"""

import fcntl
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bench.record import SCHEMA_VERSION, Record
from cifar.errors import UserError
from cifar.files import sync_folder
from cifar.serialize import from_json, to_json

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: dict,  # version 2 adds `invalid` and fields of the protocol, which have defaults
}
"""From a schema version to the function that turns its records into the next version's."""


class TornLineWarning(UserWarning):
    """The last line of a record file was cut off by a crash and is left out."""


def migrate(fields: dict[str, Any], *, source: str = "record") -> dict[str, Any]:
    """The fields of a record of any schema version up to ours, as those of ours.

    Raises:
        UserError: a newer version, an older one that nothing migrates, or none; names `source`.
    """
    version = fields.get("schema_version")
    if type(version) is not int:
        raise UserError(f"{source}: schema_version: {version!r}: must be an integer; measure anew")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{source}: schema_version: {version}: this program reads up to {SCHEMA_VERSION}; "
            "update it"
        )
    for step in range(version, SCHEMA_VERSION):
        if step not in MIGRATIONS:
            raise UserError(f"{source}: schema_version: {version}: too old to read; measure anew")
        fields = {**MIGRATIONS[step](fields), "schema_version": step + 1}
    return fields


_CONSTANTS = ("NaN", "Infinity")
"""Words that Python's JSON has for floats which are no numbers."""


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name}: is not a number that a record may hold; remove this line")


def parse_record(text: str, *, source: str = "record") -> Record:
    """Read a record of any schema version up to ours from JSON.

    Raises:
        UserError: unknown or missing key, wrong value, NaN, newer schema, numbers or nesting out of
            all measure; names `source`.
        json.JSONDecodeError: not JSON at all.
    """
    return _parse_ours(text) or _parse_any(text, source)


def _parse_ours(text: str) -> Record | None:
    """A sound record of our version; None for all others, which take a second look."""
    if any(constant in text for constant in _CONSTANTS) or '"schema_version"' not in text:
        return None
    try:
        record = from_json(Record, text)
    except UserError:
        return None
    return record if record.schema_version == SCHEMA_VERSION else None


def _parse_any(text: str, source: str) -> Record:
    """As `parse_record`."""
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        raise
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, RecursionError):  # JSON, but of thousands of digits or brackets
        raise UserError(f"{source}: {text[:40]!r}: is no record; remove this line") from None
    if not isinstance(fields, dict):
        raise UserError(f"{source}: {text[:40]!r}: must be a JSON object; remove this line")
    migrated = migrate(fields, source=source)
    return from_json(Record, text if migrated is fields else json.dumps(migrated), source=source)


def read_records(path: Path) -> list[Record]:
    """Read a record file; a last line that is not JSON was torn by a crash and is left out.

    Warns:
        TornLineWarning: the last line was left out; the message is one line.

    Raises:
        UserError: the file cannot be read, or holds a bad line; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"records: {path}: {error.strerror}; give a record file") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records = []
    for number, line in numbered:
        source = f"{path}:{number}"
        try:
            records.append(parse_record(line, source=source))
        except json.JSONDecodeError as error:
            if number != numbered[-1][0]:
                raise UserError(f"{source}: {error.msg}: remove or repair this line") from None
            message = f"{source}: the last line is incomplete and was left out"
            warnings.warn(message, TornLineWarning, stacklevel=2)
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a record to a file, durably, with one `write`; a torn last line is removed first.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    line = to_json(record).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _write_whole(descriptor, _mend(descriptor) + line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def _write_whole(descriptor: int, text: bytes) -> None:
    """Write at the end of an open file, usually at once; if there is no room, nothing is left."""
    size = os.fstat(descriptor).st_size
    try:
        while text:
            text = text[os.write(descriptor, text) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _mend(descriptor: int) -> bytes:
    """Cut a torn last line off an open, locked file; a newline if only that is missing."""
    text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    start = text.rstrip(b"\n").rfind(b"\n") + 1
    last = text[start:]
    try:
        if last.strip():
            json.loads(last)
    except (json.JSONDecodeError, UnicodeDecodeError):
        os.ftruncate(descriptor, start)
        return b""
    except (ValueError, RecursionError):
        pass  # not torn: whole, though no record, for a reader to complain of
    return b"" if not last or last.endswith(b"\n") else b"\n"
