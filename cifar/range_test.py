"""The learning-rate range test without its training: the ramp, the curve, and what it suggests.

A network is trained while the learning rate grows from one that is far too low to one that is far
too high; where the loss falls and where it breaks tells which ones train it (Smith 2015,
https://arxiv.org/abs/1506.01186, and 2018, https://arxiv.org/abs/1803.09820). No torch in here.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cifar.config import TrainConfig, option_name, require
from cifar.errors import TrainingError

LEAST_STEPS, MOST_STEPS = 20, 100_000
BROKEN = 4.0
"""A test ends with a loss that is so many times the lowest one, and worse than guessing."""
_PARTS = 10
"""The loss is averaged over about this part of the steps, whatever their number."""
_LEARNT, _WORSE = 0.98, 1.1
"""What the loss of guessing is multiplied by: below, something is learnt; above, it is worse."""
LONGEST_STEP = 0.25
"""Of Muon, relative to the weights: airbench's longest, at its batches of 2,000."""
_ABOVE, _BELOW = 4.0, 10.0
"""How far above the beginning of learning, and below the break, a suggestion is at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeTest:
    """Which learning rates are tried, one a step."""

    lowest: float = 1e-4
    """Learning rate of the first step, far too low."""
    highest: float = 10.0
    """Learning rate of the last step, far too high."""
    steps: int = 200
    """Steps from the one to the other; each multiplies the learning rate by the same factor."""

    def __post_init__(self) -> None:
        require(0 < self.lowest < math.inf, "lowest", self.lowest, "give a positive number")
        above = self.lowest < self.highest < math.inf
        require(above, "highest", self.highest, f"give more than the lowest, {self.lowest:g}")
        enough = LEAST_STEPS <= self.steps <= MOST_STEPS
        require(enough, "steps", self.steps, f"give {LEAST_STEPS} to {MOST_STEPS}")

    def lr_of(self, step: int) -> float:
        """The learning rate of the 0-based step `step`."""
        return float(self.lowest * (self.highest / self.lowest) ** (step / (self.steps - 1)))

    @property
    def span(self) -> float:
        """Steps that the loss is averaged over."""
        return self.steps / _PARTS


class Curve:
    """The losses of a range test, step by step, until one has broken or the range is through.

    `smoothed` is their exponential moving average over about `RangeTest.span` steps, corrected for
    its start at 0 (Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, section 3). `guess` is the
    loss of a network that finds all classes equally likely.
    """

    def __init__(self, test: RangeTest, guess: float) -> None:
        self.test = test
        self.guess = guess
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.is_broken = False
        self._average = 0.0

    @property
    def lrs(self) -> list[float]:
        """The learning rate of every step that is in the curve."""
        return [self.test.lr_of(step) for step in range(len(self.losses))]

    @property
    def is_over(self) -> bool:
        """Whether further losses would not be added."""
        return self.is_broken or len(self.losses) == self.test.steps

    def add(self, loss: float) -> None:
        """Add the next step's loss, but none that is not finite, nor any after the break."""
        if self.is_over:
            return
        if not math.isfinite(loss):
            self.is_broken = True
            return
        self.losses.append(loss)
        decay = 1 - 1 / self.test.span
        self._average = decay * self._average + (1 - decay) * loss
        self.smoothed.append(self._average / (1 - decay ** len(self.losses)))
        bound = max(BROKEN * min(self.smoothed), _WORSE * self.guess)
        self.is_broken = self.smoothed[-1] > bound

    def suggest(self) -> float:
        """See `suggest`; where the loss has broken it is infinite from there on."""
        broken = [math.inf] * self.is_broken
        lrs = [self.test.lr_of(step) for step in range(len(self.losses) + len(broken))]
        return suggest(lrs, [*self.smoothed, *broken], self.guess)


def suggest(lrs: Sequence[float], smoothed: Sequence[float], guess: float) -> float:
    """The highest learning rate for a schedule, from smoothed losses and that of guessing.

    Four times the one at which half of all was learnt that is learnt in the test, but a tenth at
    most of the one from which on the loss is worse than guessing. So Smith 2015: a network learns
    from some learning rate on, and the highest one of a schedule is three to four times that; and
    common practice: an order of magnitude below the break. Either alone errs: Adam, and networks
    with BatchNorm, break far above what trains them; and where nothing is learnt for long, the
    first half is learnt late, however low a learning rate would do. The place of the lowest loss
    tells little: it may lie in one of several valleys. The way down to guessing is not counted, on
    which a network learns hardly more than the scale of its logits.

    Found on CIFAR-10 in batches of 64: 0.07 to 0.15 for SGD, 0.19 for Muon and 0.019 for AdamW, for
    ResNet-20 (SGD) or one of half its width.

    Raises:
        TrainingError: nothing is learnt, or only at the highest of the learning rates.
    """
    lowest = min(smoothed)
    tried = f"learning rates {lrs[0]:.2g} to {lrs[-1]:.2g}"
    if lowest > _LEARNT * guess:
        raise TrainingError(
            f"range test: the loss does not fall below {guess:.3g}, that of guessing, at {tried}; "
            "try cifar lr-find with more --steps, or others from --lowest to --highest"
        )
    half = (lowest + guess) / 2
    learns = next(lr for lr, loss in zip(lrs, smoothed, strict=True) if loss <= half)
    good = max(step for step, loss in enumerate(smoothed) if loss <= _WORSE * guess)
    breaks = lrs[min(good + 1, len(lrs) - 1)]
    if good == len(lrs) - 1 and breaks < _BELOW * _ABOVE * learns:
        raise TrainingError(
            f"range test: the loss falls late and does not break at {tried}; try cifar lr-find "
            "with a higher --highest"
        )
    return min(_ABOVE * learns, breaks / _BELOW)


def tuned(config: TrainConfig, curve: Curve) -> TrainConfig:
    """A configuration with the learning rate that a curve suggests, in two digits.

    Muon's step follows the learning rate in the test, so it stays in proportion to it; both are
    lowered where the step would be longer than any that is known to be of use.

    Raises:
        TrainingError: the curve suggests none.
    """
    recipe, lr = config.recipe, curve.suggest()
    step = recipe.muon_step
    if recipe.optimizer == "muon":
        lr = min(lr, LONGEST_STEP * recipe.lr / step)
        step = _rounded(step * lr / recipe.lr)
    recipe = dataclasses.replace(recipe, lr=_rounded(lr), muon_step=step)
    return dataclasses.replace(config, recipe=recipe)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def suggested(config: TrainConfig) -> dict[str, float]:
    """What a test has found for a recipe, by the names of its fields."""
    recipe = config.recipe
    found = {"lr": recipe.lr}
    return found | {"muon_step": recipe.muon_step} if recipe.optimizer == "muon" else found


def told(config: TrainConfig) -> str:
    """The same in words."""
    return ", ".join(f"{option_name(name)} {value:g}" for name, value in suggested(config).items())
