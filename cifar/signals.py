"""Signals as a wish to stop: the first is noted, a second one stops the process at once."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

ECHO_SECONDS = 1.0
"""A launcher passes on the Ctrl-C that the terminal has sent to all processes of the job already;
within this time after the first signal another one is taken for that."""


class StopSignals:
    """While entered, `received` is the number of the first stopping signal, else 0."""

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            os._exit(128 + number)
