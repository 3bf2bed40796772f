"""Learning from the answers of a trained network as well as from the labels."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from cifar.config.checks import option_name, require
from cifar.errors import CheckpointError
from cifar.files import user_path
from cifar.serialize import NOT_IN_DIGEST, STRICT
from cifar.weights import find_weights, sha256_of

arg = tyro.conf.arg

WEIGHT, TEMPERATURE = 0.9, 4.0
"""Tian et al. 2019 (https://arxiv.org/abs/1910.10699) for CIFAR-100: an example in the README and
the default of their code, https://github.com/HobbitLong/RepDistiller."""
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 1000.0
"""Below it an answer is one class, above it all classes alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """Trained weights to learn from, known by the SHA-256 sum of their file.

    `path` only says where that lies, so it does not enter the digest.
    """

    __pydantic_config__: ClassVar = STRICT

    sha256: str
    path: str = field(metadata=NOT_IN_DIGEST)

    def __post_init__(self) -> None:
        is_sum = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        require(is_sum, "teacher.sha256", self.sha256, "give 64 hexadecimal digits")


def find_teacher(path: Path) -> Teacher:
    """The weights that `path` means, as `cifar evaluate` takes it; their own path is absolute.

    Raises:
        UserError: none there, or not to be read.
    """
    file = find_weights(path, "teacher")
    sha256 = sha256_of(file, "teacher")
    return Teacher(sha256=sha256, path=str(file.parent.resolve() / file.name))


def check_teacher(teacher: Teacher) -> None:
    """Raise a UserError unless the weights are where a teacher says, and are still the same."""
    try:
        found = find_teacher(Path(teacher.path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if they have moved, tell where with --teacher") from None
    if found.sha256 != teacher.sha256:
        raise CheckpointError(
            f"teacher: {teacher.path}: other weights than those that were learnt from (SHA-256 "
            f"{found.sha256[:16]}..., must be {teacher.sha256[:16]}...); put them back, or tell "
            "where they are with --teacher"
        )


def check_same_teacher(now: Teacher | None, before: Teacher | None) -> None:
    """Raise a UserError unless a resumed run finds its teacher's weights, wherever they are now."""
    if now is not None and before is not None:
        check_teacher(replace(now, sha256=before.sha256))


TeacherOption = Annotated[
    Teacher | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="CHECKPOINT",
        instance_from_str=lambda words: find_teacher(user_path(words[0], "teacher")),
        is_instance=lambda value: value is None or isinstance(value, Teacher),
        str_from_instance=lambda value: ["None" if value is None else value.path],
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """Knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    The loss is (1 - weight) x that of the recipe + weight x temperature^2 x the divergence of the
    student's answers from the teacher's, see `cifar.losses`.
    """

    __pydantic_config__: ClassVar = STRICT

    teacher: TeacherOption = None
    """Trained weights to learn from as well as from the labels; what `cifar evaluate` takes."""
    weight: Annotated[float, arg(name="distillation-weight")] = WEIGHT
    """Share of the teacher's answers in the loss, 0 to 1; the labels have the rest."""
    temperature: Annotated[float, arg(name="distillation-temperature")] = TEMPERATURE
    """What the logits of teacher and student are divided by, so that small probabilities count."""

    def __post_init__(self) -> None:
        for name, least, most, default in (
            ("weight", 0.0, 1.0, WEIGHT),
            ("temperature", LEAST_TEMPERATURE, MOST_TEMPERATURE, TEMPERATURE),
        ):
            value, option = getattr(self, name), option_name(f"distillation.{name}")
            require(least <= value <= most, option, value, f"give {least:g} to {most:g}")
            is_read = self.teacher is not None or value == default
            require(is_read, option, value, "needs --teacher")
