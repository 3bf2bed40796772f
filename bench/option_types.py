"""Types of options: flags, and several values separated by commas."""

from typing import Annotated

import tyro

Flag = tyro.conf.FlagCreatePairsOff[bool]


def _split(words: list[str]) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in words[0].split(","))
    if not all(parts):
        raise ValueError(f"{words[0]!r}: give one or more, separated by commas")
    return parts


def _integers(words: list[str]) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in _split(words)):
        raise ValueError(f"{words[0]!r}: give whole numbers, separated by commas")
    return tuple(map(int, _split(words)))


CommaList = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME[,NAME...]",
        instance_from_str=_split,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]


CommaIntegers = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N[,N...]",
        instance_from_str=_integers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]
