"""What a search varies: how its options are written, and which values a trial may have. No torch.

Fields are those of `Recipe`, and the model's dropout. `LOW..HIGH` are all numbers in between;
`A,B,C` these values alone, of augmentations `A|B C|D`; a single value is the same in all trials.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from cifar.config import READ_BY, Recipe, TrainConfig, option_name, require
from cifar.errors import ConfigError
from cifar.serialize import STRICT, is_read

Value = float | str | tuple[str, ...]
Values = Mapping[str, Value]
"""Of a trial, by the field's name."""

SHARED = ("epochs", "validation")
"""Fields of which all trials have the same value: what a trial costs, and what it is judged by."""
_FIELDS = {field.name: field for field in fields(Recipe)}
KINDS: dict[str, Any] = {
    name: kind
    for name, kind in {**get_type_hints(Recipe), "dropout": float}.items()
    if kind in (int, float) or get_origin(kind) in (Literal, tuple)
    if name != "patience"  # whether a trial ends early is the search's to say
}
"""What may be searched, and what it is: a number, one of several words, or augmentations."""
LOGARITHMIC = 9.99
"""From this ratio of its ends on a range is on a logarithmic scale: from a tenth to all of it, but
for rounding."""
STEPS = 100
"""Of any other range of fractions: nobody can tell finer ones apart, nor would read them."""
DIGITS = 3
"""Of a number on a logarithmic scale, for the same reason."""
MOST_CORNERS = 10_000
"""Combinations that are looked at for one that a recipe can have."""
NONE = "none"
"""How no augmentation at all is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """All numbers between two, which are whole ones where the field is.

    Raises:
        ConfigError: a field without numbers, or that all trials share, or ends the wrong way round.
    """

    __pydantic_config__: ClassVar = STRICT

    field: str
    low: float
    high: float

    def __post_init__(self) -> None:
        name, text = option_name(self.field), f"{self.low:g}..{self.high:g}"
        _check_varied(self.field, text)
        require(KINDS[self.field] in (int, float), name, text, "is for numbers; name the values")
        ordered = -math.inf < self.low < self.high < math.inf
        require(ordered, name, text, "is no range; give LOW..HIGH, the lower one first")

    @property
    def whole(self) -> bool:
        """Whether the field holds whole numbers."""
        return KINDS[self.field] is int

    @property
    def logarithmic(self) -> bool:
        """Whether a step up is a factor, not a difference."""
        return self.low > 0 and self.high >= LOGARITHMIC * self.low

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values furthest apart."""
        return (self.settle(self.low), self.settle(self.high))

    @property
    def size(self) -> int | None:
        """How many values there are; None: more than anyone tries."""
        return int(self.high) - int(self.low) + 1 if self.whole else None

    def settle(self, number: float) -> float:
        """The nearest value that people can read; between the ends."""
        if self.whole:
            return round(number)
        if self.logarithmic:
            near = float(f"{number:.{DIGITS}g}")
        else:
            step = (self.high - self.low) / STEPS
            near = float(f"{self.low + step * round((number - self.low) / step):.6g}")
        return min(max(near, self.low), self.high)

    def holds(self, value: Value) -> bool:
        """Whether a trial may have it."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def values(self) -> Iterator[Value]:
        """All of them, if they are whole."""
        return iter(range(int(self.low), int(self.high) + 1))

    def __str__(self) -> str:
        scale = ", on a logarithmic scale" if self.logarithmic else ""
        return f"{show(self.ends[0])} to {show(self.ends[1])}{scale}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Some values, as they are written; one alone is a field that all trials share.

    Raises:
        ConfigError: an unknown word, no number where there must be one, or a value twice.
    """

    __pydantic_config__: ClassVar = STRICT

    field: str
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        values, name = self.ends, option_name(self.field)
        if len(values) > 1:
            _check_varied(self.field, ",".join(self.texts))
        twice = [show(value) for value in values if values.count(value) > 1]
        require(not twice, name, twice[0] if twice else "", "give each value once")

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values."""
        return tuple(read_value(self.field, text) for text in self.texts)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.texts)

    def holds(self, value: Value) -> bool:
        """Whether it is one of them."""
        return value in self.ends

    def values(self) -> Iterator[Value]:
        """All of them."""
        return iter(self.ends)

    def __str__(self) -> str:
        *most, last = self.texts
        return f"{', '.join(most)} or {last}" if most else last


Parameter = Range | Choice


def _check_varied(field: str, text: str) -> None:
    remedy = "is the same in all trials of a search; give one value"
    require(field not in SHARED, option_name(field), text, remedy)


def read_parameter(field: str, text: str) -> Parameter:
    """What an option says of a field.

    Raises:
        ConfigError: it does not follow the grammar.
    """
    low, dots, high = text.partition("..")
    if dots and KINDS[field] in (int, float):
        return Range(field=field, low=_number(field, low), high=_number(field, high))
    parts = text.split("|" if get_origin(KINDS[field]) is tuple else ",")
    return Choice(field=field, texts=tuple(show(read_value(field, part)) for part in parts))


def read_value(field: str, text: str) -> Value:
    """One value of a field as it is written.

    Raises:
        ConfigError: it is none.
    """
    kind, name, word = KINDS[field], option_name(field), text.strip()
    if kind in (int, float):
        return _number(field, word)
    if get_origin(kind) is Literal:
        known = get_args(kind)
        require(word in known, name, word, f"choose from {', '.join(known)}")
        return word
    require(bool(word), name, text, f"name augmentations, or write {NONE}")
    return () if word == NONE else tuple(word.split())


def _number(field: str, text: str) -> float:
    """A number of the field's kind."""
    whole, name = KINDS[field] is int, option_name(field)
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    remedy = f"give {'whole ' if whole else ''}numbers, as in 1, in 1,2,3 or in 1..3"
    require(math.isfinite(number), name, text, remedy)
    return number


def show(value: Value) -> str:
    """A value as it is written, so that the same is read again."""
    if isinstance(value, tuple):
        return " ".join(value) or NONE
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


def value_of(train: TrainConfig, field: str) -> Value:
    """What a configuration has of a field."""
    value: Value = getattr(train.model if field == "dropout" else train.recipe, field)
    return value


def with_values(train: TrainConfig, values: Values) -> TrainConfig:
    """A configuration with these values.

    Raises:
        ConfigError: they do not go together.
    """
    own = {name: value for name, value in values.items() if name != "dropout"}
    model = train.model
    if "dropout" in values:
        model = replace(model, dropout=values["dropout"])  # type: ignore[arg-type]
    recipe = replace(train.recipe, **own)  # type: ignore[arg-type]
    return replace(train, model=model, recipe=recipe)


def reads(train: TrainConfig, field: str) -> bool:
    """Whether a field changes anything about a training."""
    return field == "dropout" or is_read(train.recipe, _FIELDS[field])


def size_of(space: Iterable[Parameter]) -> int | None:
    """How many combinations there are; None: more than anyone tries."""
    product = 1
    for parameter in space:
        if parameter.size is None:
            return None
        product *= parameter.size
    return product


def combinations(space: Sequence[Parameter]) -> Iterator[Values]:
    """All combinations of a space of a known size."""
    names = [parameter.field for parameter in space]
    for values in itertools.product(*(parameter.values() for parameter in space)):
        yield dict(zip(names, values, strict=True))


def _corners(space: Sequence[Parameter]) -> Iterator[Values]:
    """The combinations of what is furthest apart."""
    names = [parameter.field for parameter in space]
    products = itertools.product(*(parameter.ends for parameter in space))
    for values in itertools.islice(products, MOST_CORNERS):
        yield dict(zip(names, values, strict=True))


def first_that_works(
    train: TrainConfig, space: Sequence[Parameter], processes: int, own: Values | None = None
) -> TrainConfig:
    """A configuration with some combination of values that go together: `own`, if they do.

    Raises:
        ConfigError: none does; what is wrong with the first.
    """
    problem: ConfigError | None = None
    for values in itertools.chain([] if own is None else [own], _corners(space)):
        try:
            found = with_values(train, values)
            found.per_device_batch_size(processes)
            return found
        except ConfigError as error:
            problem = problem or error
    assert problem is not None, "a space has corners"
    raise problem


def check_space(
    train: TrainConfig, space: Sequence[Parameter], given: Iterable[Parameter], processes: int
) -> None:
    """Refuse an end of the space that can be in no recipe, and a field that no trial would read.

    `given` is what the user has written.

    Raises:
        ConfigError: there is one.
    """
    for parameter in space:
        others = [each for each in space if each is not parameter]
        for value in parameter.ends:
            only = Choice(field=parameter.field, texts=(show(value),))
            first_that_works(train, [only, *others], processes)
    for parameter in given:
        field = parameter.field
        needs = f"{READ_BY[field]} in --augment" if field in READ_BY else "--optimizer muon"
        require(
            any(_may_read(train, space, field)),
            option_name(field),
            ",".join(map(show, parameter.ends)),
            f"is of no use without {needs}",
        )


def _may_read(train: TrainConfig, space: Sequence[Parameter], field: str) -> Iterator[bool]:
    """Whether a field is read, in every corner that a recipe may have."""
    for values in _corners(space):
        try:
            yield reads(with_values(train, values), field)
        except ConfigError:
            continue
