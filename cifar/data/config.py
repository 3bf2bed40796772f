"""Which images, and how `--data` writes them. No torch in here."""

import os
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from cifar.errors import ConfigError
from cifar.files import user_path
from cifar.serialize import NOT_IN_DIGEST, STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A data set, written `shapes | cifar10[:DIR] | cifar100[:DIR] | folder:DIR | npz:FILE`.

    `path` is what a folder or an npz file is known by; `root` only says where CIFAR lies, so it
    does not enter the digest (the fingerprint in a record tells two copies apart).
    """

    __pydantic_config__: ClassVar = STRICT

    source: Literal["shapes", "cifar10", "cifar100", "folder", "npz"] = "shapes"
    path: str | None = None
    root: str | None = field(default=None, metadata=NOT_IN_DIGEST)

    def __str__(self) -> str:
        return ":".join(part for part in (self.source, self.path or self.root) if part)


def parse_data(text: str) -> DataConfig:
    """Read the grammar of `DataConfig`; paths become absolute, so that any folder can resume.

    Raises:
        ConfigError: another source, a path too many or too few, or one of a user who does not
            exist.
    """
    source, colon, path = text.partition(":")
    grammar = "write shapes, cifar10[:DIR], cifar100[:DIR], folder:DIR or npz:FILE"
    if colon and not path:
        raise ConfigError(f"data: {text!r}: no path after the colon; {grammar}")
    if source == "shapes" and not path:
        return DataConfig()
    if source == "cifar10":
        return DataConfig(source="cifar10", root=_absolute(path))
    if source == "cifar100":
        return DataConfig(source="cifar100", root=_absolute(path))
    if source == "folder" and path:
        return DataConfig(source="folder", path=_absolute(path))
    if source == "npz" and path:
        return DataConfig(source="npz", path=_absolute(path))
    raise ConfigError(f"data: {text!r}: {grammar}")


def _absolute(path: str) -> str | None:
    """None if empty; `..` is resolved as the file system does, which knows of links."""
    if not path:
        return None
    full = user_path(path, "data").absolute()
    return os.path.realpath(full) if ".." in full.parts else str(full)


DataOption = Annotated[
    DataConfig,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SOURCE[:PATH]",
        instance_from_str=lambda words: parse_data(words[0]),
        is_instance=lambda value: isinstance(value, DataConfig),
        str_from_instance=lambda value: [str(value)],
    ),
]
