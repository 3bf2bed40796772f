"""How often the processes of a training agree on the state of the run. No torch in here."""

import time
from collections.abc import Callable

SECONDS = 2.0
"""From one time to the next, about: a launcher that has passed a signal on kills 30 s later what
has not saved and ended by then, and a step may take seconds."""
MOST_STEPS = {"cuda": 20, "cpu": 10}
"""By device: reading its state makes a GPU wait."""


class CheckInterval:
    """The steps from one time to the next: those given, or else as many as suit the device.

    One process alone sees its signals at every step. Several on CPUs agree at every one, for theirs
    are long, and on GPUs as often as their steps' seconds ask for. `whole` makes a number of steps
    one at which all have the same weights, see `cifar.exchange.LocalSteps`.
    """

    def __init__(
        self, given: int | None, device: str, processes: int, whole: Callable[[int], int]
    ) -> None:
        self._whole, self._most = whole, MOST_STEPS[device]
        self._adapts = given is None and device == "cuda" and processes > 1
        self._last: tuple[int, float] | None = None
        self.steps = given or whole(1 if processes > 1 else self._most)

    def pace(self, step: int) -> float:
        """This process's seconds per step since it was last asked, in this step; 0 at first."""
        now, last = time.monotonic(), self._last
        self._last = step, now
        return (now - last[1]) / (step - last[0]) if last is not None and step > last[0] else 0.0

    def learn(self, pace: float) -> None:
        """Suit the next interval to the slowest process's seconds per step."""
        if self._adapts and pace > 0:
            self.steps = self._whole(min(self._most, max(1, int(SECONDS / pace))))
