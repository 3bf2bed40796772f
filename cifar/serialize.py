"""Dataclasses to and from JSON, strictly, and digests of their contents.

Reading refuses unknown keys and wrong types (pydantic's strict mode). A digest covers only the
fields that differ from their default, so that adding an option keeps the digests of old records.
"""

import dataclasses
import functools
import hashlib
import json
import reprlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cifar.errors import ConfigError

STRICT = ConfigDict(extra="forbid")
"""Set as `__pydantic_config__` on every dataclass that is read from JSON."""

T = TypeVar("T")

_OTHER_VERSION = "or use the version that wrote it"

NOT_IN_DIGEST = {"digest": False}
"""Field metadata: the field says nothing about what is computed (a label, a path, a time limit)."""


def in_digest_if(is_read: Callable[[Any], bool]) -> dict[str, Any]:
    """Field metadata: the field is read only by such values of its dataclass."""
    return {"digest": is_read}


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def to_dict(value: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, ready for `json.dumps`."""
    return dataclasses.asdict(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """A dataclass as JSON text; raises ValueError for NaN or infinity, which JSON cannot hold."""
    return json.dumps(to_dict(value), indent=indent, allow_nan=False, ensure_ascii=False)


def from_json(cls: type[T], text: str | bytes, *, source: str = "JSON") -> T:
    """Read a `cls` from JSON text.

    Raises:
        ConfigError: unknown key, missing key, wrong type or bad value; names `source`, key, value
            and remedy.
    """
    try:
        value: T = _adapter(cast(Hashable, cls)).validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_problem(error.errors()[0])}") from None
    except ArithmeticError as error:  # of a dataclass's own checks
        raise ConfigError(f"{source}: {error}: a number out of all measure; correct it") from None
    return value


def _problem(first: ErrorDetails) -> str:
    """What pydantic found, as the field, its value and a remedy."""
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] == "value_error":  # a dataclass's own message names its field and remedy
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{key}: missing: add it, {_OTHER_VERSION}"
    if first["type"] == "unexpected_keyword_argument":
        return f"{key}: {reprlib.repr(first['input'])}: no such field: remove it, {_OTHER_VERSION}"
    return f"{key}: {reprlib.repr(first['input'])}: {first['msg']}; correct it, {_OTHER_VERSION}"


def contents(value: Any, *, defaults: bool = False) -> Any:
    """The fields that enter a digest: those read and not at their default, nested ones likewise.

    With `defaults` all that are read.
    """
    if not dataclasses.is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    kept = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if is_read(value, field) and (defaults or item != default):
            kept[field.name] = contents(item, defaults=defaults)
    return kept


def is_read(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass's field says something about what is computed, other fields being so."""
    enters = field.metadata.get("digest", True)
    return bool(enters(value) if callable(enters) else enters)


@functools.lru_cache(maxsize=4096)
def digest(value: Hashable) -> str:
    """16 hexadecimal digits that depend on the contents of a dataclass alone."""
    text = json.dumps(contents(value), sort_keys=True, allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
