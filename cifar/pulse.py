"""What the main thread of this process has got to, for `cifar.watchdog`. No torch in here."""

import contextlib
from collections.abc import Iterator


class Pulse:
    """What the main thread of this process has got to.

    It costs the training loop an assignment and an addition; only the watchdog looks at it.
    """

    __slots__ = ("announced", "count", "is_stopping", "step", "waits")

    def __init__(self) -> None:
        self.count = 0
        self.step = 0
        self.announced = ""
        self.waits = False
        self.is_stopping = False

    def at(self, step: int) -> None:
        """So many optimiser steps are finished."""
        self.step = step
        self.count += 1

    def beat(self) -> None:
        """Something else is, as a batch of an evaluation."""
        self.count += 1

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """While entered, this process does something long that no other one takes part in."""
        before, self.announced = self.announced, what
        self.count += 1
        try:
            yield
        finally:
            self.announced = before
            self.count += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While entered, this process reads what its device has computed, or others send.

        On a GPU it is there, in C, and not in the collective call, that it waits for the others.
        """
        before, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = before


PULSE = Pulse()
"""Of this process: it has one, as it has one default group."""
