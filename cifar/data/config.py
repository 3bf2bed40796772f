"""Which images, and how `--data` writes them. No torch in here."""

import os
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

import tyro

from cifar.errors import ConfigError
from cifar.files import user_path
from cifar.serialize import NOT_IN_DIGEST, STRICT

Published = Literal["cifar10", "cifar100", "tiny-imagenet"]
"""What `cifar download` gets; users need not say where their copy lies."""
Own = Literal["folder", "npz"]
"""What users have of their own, which is known by its path."""
Source = Literal["shapes", Published, Own]
GRAMMAR = "shapes, cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR], folder:DIR or npz:FILE"
"""How data sets are written."""
DATA_HELP = f"Images: {GRAMMAR}; shapes are embedded."
"""Of the option `--data`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A data set, as `GRAMMAR` says.

    `path` is what a folder or an npz file is known by; `root` only says where a copy of a known
    data set lies, so it does not enter the digest (the fingerprint in a record tells two apart).
    """

    __pydantic_config__: ClassVar = STRICT

    source: Source = "shapes"
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
    if colon and not path:
        raise ConfigError(f"data: {text!r}: no path after the colon; write {GRAMMAR}")
    if source == "shapes" and not path:
        return DataConfig()
    published: tuple[Published, ...] = get_args(Published)
    for name in published:
        if source == name:
            return DataConfig(source=name, root=_absolute(path))
    own: tuple[Own, ...] = get_args(Own)
    for kind in own:
        if source == kind and path:
            return DataConfig(source=kind, path=_absolute(path))
    raise ConfigError(f"data: {text!r}: write {GRAMMAR}")


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
