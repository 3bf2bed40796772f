"""Weights that a training starts from, and how `--pretrained` writes them. No torch in here."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from cifar.config.checks import require
from cifar.errors import ConfigError
from cifar.files import user_path
from cifar.serialize import NOT_IN_DIGEST, STRICT
from cifar.weights import CARD, WEIGHTS

IMAGENET = "imagenet"
"""The name of a library's default weights, whatever they were trained on."""
SUFFIXES = (".safetensors", ".pt", ".pth")
"""Of files of weights."""
_OF_A_RUN = Path("final", WEIGHTS)
_GRAMMAR = "write imagenet, the name of weights, FILE, FILE@SHA256 or the folder of a run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """Weights to start from, written `imagenet | NAME | FILE[@SHA256] | RUN`.

    Either the `name` that a library knows them by, or the `sha256` of a file. Of a run's weights
    `mean` and `std` tell what its images were normalised with, `classes` what they were of. `path`
    only says where the file lies, so it does not enter the digest; a run that is resumed does not
    read it.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str | None = None
    sha256: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    path: str | None = field(default=None, metadata=NOT_IN_DIGEST)

    def __post_init__(self) -> None:
        one = (self.name is None) != (self.sha256 is None)
        require(one, "pretrained", str(self), "give a name or a file")
        alike = len(self.mean or ()) == len(self.std or ())
        require(alike, "pretrained", str(self), "must have as many means as deviations")

    def __str__(self) -> str:
        return self.path or self.identity

    @property
    def identity(self) -> str:
        """What tells these weights from others: their name, or the checksum of their file."""
        return self.name or self.sha256 or ""


def parse_pretrained(text: str) -> Pretrained:
    """Read the grammar of `Pretrained`: one word that is no run's folder is a name.

    Everything else is a path.

    Raises:
        ConfigError: no such file, it cannot be read, has another checksum or no suffix of weights;
            or the card beside it is damaged.
    """
    if re.fullmatch(r"\w+", text) and not (Path(text) / _OF_A_RUN).is_file():
        return Pretrained(name=text)
    named, expected = _split(text)
    path = user_path(named, "pretrained").absolute()
    if os.path.isdir(path):  # noqa: PTH112 - which is false where nobody can tell
        path /= _OF_A_RUN
        lacks = f"has no {_OF_A_RUN}; give a run that has ended, or a file of weights"
        require(path.is_file(), "pretrained", text, lacks)
    require(path.suffix in SUFFIXES, "pretrained", text, f"is no {', '.join(SUFFIXES)}; {_GRAMMAR}")
    found = _sha256(path, text)
    remedy = f"the SHA-256 of the file is {found}; give that one, or the right file"
    require(found.startswith(expected), "pretrained", text, remedy)
    return Pretrained(sha256=found, path=os.path.realpath(path), **_told_by_card(path, text))


def _split(text: str) -> tuple[str, str]:
    """The path, and what its checksum must begin with: the digits behind the last @, if any."""
    match = re.fullmatch(r"(.+)@([0-9a-fA-F]{8,64})", text, re.DOTALL)
    return (match[1], match[2].lower()) if match else (text, "")


def _sha256(path: Path, text: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ConfigError(f"pretrained: {text!r}: no such file; {_GRAMMAR}") from None
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise ConfigError(f"pretrained: {text!r}: {reason}; give another file") from None


def _told_by_card(path: Path, text: str) -> dict[str, Any]:
    """What the card beside a run's weights tells of its images; nothing without a card."""
    try:
        card = json.loads(path.with_name(CARD).read_bytes())
        told: dict[str, Any] = {name: tuple(map(float, card[name])) for name in ("mean", "std")}
        return told | {"classes": tuple(map(str, card["classes"]))}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        reason = f"{CARD} beside it is damaged; take it away, or give other weights"
        raise ConfigError(f"pretrained: {text!r}: {reason}") from None


PretrainedOption = Annotated[
    Pretrained | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="WEIGHTS",
        instance_from_str=lambda words: parse_pretrained(words[0]),
        is_instance=lambda value: value is None or isinstance(value, Pretrained),
        str_from_instance=lambda value: [str(value)],
    ),
]
