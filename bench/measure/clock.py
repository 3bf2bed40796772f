"""Clocks that mark moments in a device's work without waiting for it."""

import time
from collections.abc import Callable
from typing import Protocol

import torch


class Clock(Protocol):
    """Marks moments in the device's work without waiting for it."""

    def mark(self) -> None:
        """This moment."""

    def seconds(self) -> list[float]:
        """Between neighbouring moments; waits for the device."""


class HostClock:
    """For devices that compute while the program waits, as a CPU does."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """This moment."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring moments."""
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


class CudaClock:
    """Events in the stream of a GPU."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """This moment in the stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between neighbouring events; waits for the last one."""
        self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def make_clock(device: torch.device) -> Clock:
    """The clock for a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def timed(
    clock: Clock,
    work: Callable[[], object],
    count: int,
    at_the_end: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds of each of so many times that some work is done, with nothing between them.

    `at_the_end` is called before the device is waited for.
    """
    clock.mark()
    for _ in range(count):
        work()
        clock.mark()
    at_the_end()
    return clock.seconds()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work took, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
