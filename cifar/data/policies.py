"""Which operation every sample gets: AutoAugment, RandAugment, TrivialAugment and simpler ones.

The operations and their strengths are those of `torchvision.transforms`. They follow the papers;
the code of AutoAugment's authors has other ranges (stronger colours, shorter shifts). Strengths are
whole steps in all of them, so that a policy is a menu and a draw from it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar.config import Recipe
from cifar.data.draws import EpochDraws, SampleDraws, Table
from cifar.data.operations import Operation, Operations

Choose = Callable[[EpochDraws, int], Tensor]
"""(draws of an epoch, round) -> every sample's place in the menu, `[count]` int64."""

_LEVELS = 31
"""Strengths of RandAugment and TrivialAugment."""
_PER_DEGREE = 4
"""Angles of a rotation."""
_SIGNED = {
    *("shear-x", "shear-y", "translate-x", "translate-y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
}
_FACTORS = {"brightness", "color", "contrast", "sharpness"}


@dataclass(frozen=True, slots=True)
class Policy:
    """A menu of operations, and how every sample chooses from it in each of some rounds."""

    menu: tuple[Operation, ...]
    choose: Choose
    rounds: int = 1


class ByPolicy:
    """An augmentation that follows a policy, which is made for the images' height and width."""

    def __init__(self, name: str, make: Callable[[int, int], Policy]) -> None:
        self._name = name
        self._make = make
        self._made: dict[tuple[int, int, torch.device], tuple[Policy, Operations]] = {}

    def __call__(self, images: Tensor, draws: SampleDraws) -> Tensor:
        """Augment uint8 images `[B, C, H, W]`."""
        policy, operations = self._for(images)
        for number in range(policy.rounds):

            def choose(epoch: EpochDraws, number: int = number) -> Tensor:
                return policy.choose(epoch, number)

            images = operations(images, draws.pick(f"{self._name}.{number}", choose))
        return images

    def _for(self, images: Tensor) -> tuple[Policy, Operations]:
        height, width = images.shape[2:]
        key = (height, width, images.device)
        if key not in self._made:
            policy = self._make(height, width)
            self._made[key] = policy, Operations(policy.menu, height, width, images.device)
        return self._made[key]


class _Menu:
    """Collects operations, each once."""

    def __init__(self) -> None:
        self._places: dict[Operation, int] = {}

    def place(self, name: str, strength: float | None, sign: int = 1) -> int:
        """Where an operation of this strength stands; that of a factor is what it is beyond 1."""
        value = 0.0 if strength is None else float(strength)
        if name in _SIGNED:
            value *= sign
        if name in _FACTORS:
            value += 1.0
        if name in ("posterize", "translate-x", "translate-y"):
            value = float(int(value))
        return self._places.setdefault(Operation(name, value), len(self._places))

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(self._places)


def _steps(most: float, levels: int) -> list[float]:
    """From 0 to the greatest strength."""
    return torch.linspace(0.0, most, levels).tolist()


def _bits(least: int, levels: int) -> list[float]:
    return [8.0 - round(level * (8 - least) / (levels - 1)) for level in range(levels)]


_PLAIN: dict[str, list[float] | None] = {"auto-contrast": None, "equalize": None}


def _strengths(height: int, width: int, levels: int) -> dict[str, list[float] | None]:
    """AutoAugment's and RandAugment's, without inversion."""
    shift = 150.0 / 331.0
    return {
        **{name: _steps(0.3, levels) for name in ("shear-x", "shear-y")},
        "translate-x": _steps(shift * width, levels),
        "translate-y": _steps(shift * height, levels),
        "rotate": _steps(30.0, levels),
        **{name: _steps(0.9, levels) for name in ("brightness", "color", "contrast", "sharpness")},
        "posterize": _bits(4, levels),
        "solarize": _steps(255.0, levels)[::-1],
        **_PLAIN,
    }


def rand_augment(height: int, width: int, operations: int, magnitude: int) -> Policy:
    """So many operations of one strength, out of 0 to 30, each drawn anew from 14.

    Cubuk et al. 2019 (https://arxiv.org/abs/1909.13719).
    """
    space = {"identity": None, **_strengths(height, width, _LEVELS)}
    menu = _Menu()
    places = Table(
        torch.tensor(
            [
                [menu.place(name, steps[magnitude] if steps else None, sign) for sign in (1, -1)]
                for name, steps in space.items()
            ]
        )
    )

    def choose(epoch: EpochDraws, number: int) -> Tensor:
        which = epoch.integers(f"rand-augment.{number}.operation", len(space))
        sign = epoch.integers(f"rand-augment.{number}.sign", 2)
        return places.on(epoch.device)[which, sign]

    return Policy(menu.operations, choose, operations)


def trivial_augment() -> Policy:
    """One operation of 14 at one strength of 31, each equally likely; the "wide" range.

    Müller and Hutter 2021 (https://arxiv.org/abs/2103.10158).
    """
    space: dict[str, list[float] | None] = {
        "identity": None,
        **{name: _steps(0.99, _LEVELS) for name in ("shear-x", "shear-y")},
        **{name: _steps(32.0, _LEVELS) for name in ("translate-x", "translate-y")},
        "rotate": _steps(135.0, _LEVELS),
        **{name: _steps(0.99, _LEVELS) for name in ("brightness", "color", "contrast")},
        "sharpness": _steps(0.99, _LEVELS),
        "posterize": _bits(2, _LEVELS),
        "solarize": _steps(255.0, _LEVELS)[::-1],
        **_PLAIN,
    }
    menu = _Menu()
    places = Table(
        torch.tensor(
            [
                [
                    [menu.place(name, steps[level] if steps else None, sign) for sign in (1, -1)]
                    for level in range(_LEVELS)
                ]
                for name, steps in space.items()
            ]
        )
    )

    def choose(epoch: EpochDraws, _number: int) -> Tensor:
        which = epoch.integers("trivial-augment.operation", len(space))
        level = epoch.integers("trivial-augment.level", _LEVELS)
        sign = epoch.integers("trivial-augment.sign", 2)
        return places.on(epoch.device)[which, level, sign]

    return Policy(menu.operations, choose)


Step = tuple[str, int, int | None]
"""An operation, its probability in tenths, its strength of 0 to 9 (None: it has none)."""
CIFAR10_POLICY: tuple[tuple[Step, Step], ...] = (
    (("invert", 1, None), ("contrast", 2, 6)),
    (("rotate", 7, 2), ("translate-x", 3, 9)),
    (("sharpness", 8, 1), ("sharpness", 9, 3)),
    (("shear-y", 5, 8), ("translate-y", 7, 9)),
    (("auto-contrast", 5, None), ("equalize", 9, None)),
    (("shear-y", 2, 7), ("posterize", 3, 7)),
    (("color", 4, 3), ("brightness", 6, 7)),
    (("sharpness", 3, 9), ("brightness", 7, 9)),
    (("equalize", 6, None), ("equalize", 5, None)),
    (("contrast", 6, 7), ("sharpness", 6, 5)),
    (("color", 7, 7), ("translate-x", 5, 8)),
    (("equalize", 3, None), ("auto-contrast", 4, None)),
    (("translate-y", 4, 3), ("sharpness", 2, 6)),
    (("brightness", 9, 6), ("color", 2, 8)),
    (("solarize", 5, 2), ("invert", 0, None)),
    (("equalize", 2, None), ("auto-contrast", 6, None)),
    (("equalize", 2, None), ("equalize", 6, None)),
    (("color", 9, 9), ("equalize", 6, None)),
    (("auto-contrast", 8, None), ("solarize", 2, 8)),
    (("brightness", 1, 3), ("color", 7, 0)),
    (("solarize", 4, 5), ("auto-contrast", 9, None)),
    (("translate-y", 9, 9), ("translate-y", 7, 9)),
    (("auto-contrast", 9, None), ("solarize", 8, 3)),
    (("equalize", 8, None), ("invert", 1, None)),
    (("translate-y", 7, 9), ("auto-contrast", 9, None)),
)
"""Table 7 of Cubuk et al. 2018 (https://arxiv.org/abs/1805.09501)."""


def auto_augment(height: int, width: int) -> Policy:
    """One of the 25 sub-policies that were found for CIFAR-10: two operations, each with its own
    probability and strength."""
    strengths = _strengths(height, width, levels=10)
    menu = _Menu()
    nothing = menu.place("identity", None)

    def place(step: Step, sign: int) -> int:
        name, _, level = step
        steps = strengths.get(name)
        return menu.place(name, None if steps is None or level is None else steps[level], sign)

    places = Table(
        torch.tensor([[[place(s, sign) for sign in (1, -1)] for s in p] for p in CIFAR10_POLICY])
    )
    tenths = Table(torch.tensor([[step[1] for step in pair] for pair in CIFAR10_POLICY]))

    def choose(epoch: EpochDraws, number: int) -> Tensor:
        pair = epoch.integers("auto-augment.pair", len(CIFAR10_POLICY))
        sign = epoch.integers(f"auto-augment.{number}.sign", 2)
        drawn = epoch.integers(f"auto-augment.{number}.probability", 10)
        applied = drawn < tenths.on(epoch.device)[pair, number]
        return torch.where(applied, places.on(epoch.device)[pair, number, sign], nothing)

    return Policy(menu.operations, choose, rounds=2)


def rotation(most: float) -> Policy:
    """Turn by an angle of `-most` to `most` degrees about the centre, each as likely."""
    count = 2 * max(1, round(most * _PER_DEGREE)) + 1
    angles = torch.linspace(-most, most, count).tolist()
    menu = tuple(Operation("rotate", angle) for angle in angles)
    return Policy(menu, lambda epoch, _: epoch.integers("rotate.angle", count))


def color_jitter(most: float, hue: float = 0.0, levels: int = 41) -> Policy:
    """Change brightness, contrast and saturation in a random order, by factors of 1 +- `most`.

    The hue too, unless `hue` is 0: by +- so much of the circle of colours. As torchvision's
    `ColorJitter(most, most, most, hue)`.
    """
    factors = torch.linspace(1 - most, 1 + most, levels).tolist()
    values = dict.fromkeys(("brightness", "contrast", "color"), factors)
    if hue:
        values["hue"] = torch.linspace(-hue, hue, levels).tolist()
    names = tuple(values)
    menu = tuple(Operation(name, value) for name in names for value in values[name])
    orders = Table(torch.tensor(list(itertools.permutations(range(len(names))))))

    def choose(epoch: EpochDraws, number: int) -> Tensor:
        order = epoch.integers("color-jitter.order", len(orders.on(epoch.device)))
        name = orders.on(epoch.device)[order, number]
        level = torch.stack([epoch.integers(f"color-jitter.{each}", levels) for each in names])
        return name * levels + level.gather(0, name.unsqueeze(0)).squeeze(0)

    return Policy(menu, choose, rounds=len(names))


def get_policy(name: str, recipe: Recipe) -> Callable[[int, int], Policy]:
    """A recipe's policy of that name, for images of a height and a width."""
    return {
        "rotate": lambda _height, _width: rotation(recipe.rotate_degrees),
        "color-jitter": lambda _height, _width: color_jitter(recipe.jitter, recipe.hue),
        "auto-augment": auto_augment,
        "rand-augment": lambda height, width: rand_augment(
            height, width, recipe.rand_operations, recipe.rand_magnitude
        ),
        "trivial-augment": lambda _height, _width: trivial_augment(),
    }[name]


POLICIES = ("rotate", "color-jitter", "auto-augment", "rand-augment", "trivial-augment")
