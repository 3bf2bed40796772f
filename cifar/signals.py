"""Signals as a wish to stop: the first is noted, a second one stops the process at once."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, NoReturn

from cifar.errors import PEER_GONE
from cifar.pulse import PULSE
from cifar.ranks import world_size

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

ECHO_SECONDS = 1.0
"""A launcher passes on the Ctrl-C that the terminal has sent to all processes of the job already;
under one, another signal within this time after the first is taken for that."""

SLURM_ECHO_SECONDS = 10.0
"""SLURM signals every process of a step, torchrun passes that on, and a batch script's trap sends
it once more, by way of the controller."""

REPEAT_SECONDS = 0.1
"""Without a launcher: `timeout` signals its child and then the group that it is in."""

_PR_SET_PDEATHSIG = 1
_END = 0
"""Is no signal's number."""


def echo_seconds(environ: Mapping[str, str]) -> float:
    """How long a further signal may be an echo, of SLURM, a launcher or `timeout`.

    Raises:
        ConfigError: `WORLD_SIZE` is no number.
    """
    launched = "TORCHELASTIC_RUN_ID" in environ or world_size(environ) > 1
    if "SLURM_JOB_ID" in environ:
        return SLURM_ECHO_SECONDS
    return ECHO_SECONDS if launched else REPEAT_SECONDS


def end_with_launcher(environ: Mapping[str, str]) -> None:
    """Let this process get a SIGTERM when torchrun, or Accelerate by it, ends without one.

    After a SIGKILL of the launcher a run would go on unseen, and hold its folder against the next
    start.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        end_with_parent()


def end_with_parent() -> None:
    """Let this process get a SIGTERM when the one that started it ends.

    Linux alone can do that (prctl(2), PR_SET_PDEATHSIG). One that ends just before that is told by
    the change of this process's parent.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            signal.raise_signal(signal.SIGTERM)


class StopSignals:
    """While entered, `received` is the number of the first stopping signal, else 0.

    A second one ends the process at once, with a line on stderr that says so and `remedy`, or with
    none if that is empty. Python runs handlers on the main thread, and not while that sits in C, as
    in a collective call whose peer is gone. So a thread counts the signals, by what the handler in
    C writes to a pipe, and lets the watchdog know of the first.

    A SIGTERM of the launcher ends this process after all where another one has ended: the launcher
    says which, and so may that one.
    """

    def __init__(self, remedy: str = "") -> None:
        self.received = 0
        self._remedy = remedy
        self._echo_seconds = echo_seconds(os.environ)
        self._before: dict[signal.Signals, Any] = {}
        self._pipe = (-1, -1)
        self._wakeup_before = -1
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)

    def __enter__(self) -> "StopSignals":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread.start()
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
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._pipe[1], bytes([_END]))
        self._thread.join()
        PULSE.is_stopping = False
        for end in self._pipe:
            os.close(end)
        if self._ended_by_launcher(error):
            signal.raise_signal(self.received)

    def _ended_by_launcher(self, error: BaseException | None) -> bool:
        """Whether the signal was no wish, but what a launcher sends to those whom one has left.

        It comes before the error where a collective call is slow to notice that a peer is gone.
        """
        is_left = error is not None and PEER_GONE.search(str(error)) is not None
        return is_left and self.received == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number

    def _watch(self) -> None:
        first: float | None = None
        while (number := os.read(self._pipe[0], 1)[0]) != _END:
            if number not in STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                PULSE.is_stopping = True
            elif time.monotonic() - first >= self._echo_seconds:
                self._end(number)

    def _end(self, number: int) -> NoReturn:
        if self._remedy:
            text = f"stopped at once by signal {number}, without saving; {self._remedy}\n"
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), text.encode())
        os._exit(128 + number)
