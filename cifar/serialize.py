"""Dataclasses to and from JSON, strictly, and digests of their contents.

Reading refuses unknown keys and wrong types (pydantic's strict mode). A digest covers only the
fields that differ from their default, so that adding an option keeps the digests of old records.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cifar.errors import ConfigError

STRICT = ConfigDict(extra="forbid")
"""Set as `__pydantic_config__` on every dataclass that is read from JSON."""

T = TypeVar("T")

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
        ConfigError: unknown key, missing key, wrong type or bad value; names `source` and the key.
    """
    try:
        value: T = _adapter(cast(Hashable, cls)).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise ConfigError(f"{source}: {key}: {first['msg']}") from None
    return value


def contents(value: Any) -> Any:
    """The fields that enter a digest: those read and not at their default, nested ones likewise."""
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
        enters = field.metadata.get("digest", True)
        if (enters(value) if callable(enters) else enters) and item != default:
            kept[field.name] = contents(item)
    return kept


@functools.lru_cache(maxsize=4096)
def digest(value: Hashable) -> str:
    """16 hexadecimal digits that depend on the contents of a dataclass alone."""
    text = json.dumps(contents(value), sort_keys=True, allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
