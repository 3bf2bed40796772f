"""A job's processes on this machine: how they are told from all others, and ended."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

GRACE_SECONDS = 10.0
"""Between asking processes to end and ending them."""
BLAME_SECONDS = 60.0
"""After a kill for lack of memory was noticed; a launcher ends its other processes within them."""
MARK = "BENCH_JOB"
"""Environment variable that tells a job's processes, whatever group or session they moved to."""


def end(marks: Collection[str], grace: float) -> None:
    """Ask all processes of jobs to end, then make them."""
    try:
        if not _gone(marks, signal.SIGTERM, grace):
            _gone(marks, signal.SIGKILL, grace)
    except BaseException:  # a second Ctrl-C: no more grace
        _gone(marks, signal.SIGKILL, grace)
        raise


def _gone(marks: Collection[str], number: signal.Signals, grace: float) -> bool:
    """Signal the processes of jobs; whether all of them ended within `grace` seconds."""
    deadline = time.monotonic() + grace
    alive = _alive(marks)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = _alive(marks)
    return not alive


def _alive(marks: Collection[str]) -> list[psutil.Process]:
    """The processes of jobs that have not ended.

    Process groups do not tell: torchrun gives every worker a session of its own.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_leftovers(folder: Path, grace: float = GRACE_SECONDS) -> None:
    """End the processes of jobs below `folder` that outlived the program which started them."""
    marks = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK, "")
            if mark.partition(":")[2].partition(":")[2].startswith(f"{folder}{os.sep}"):
                marks.add(mark)
    if marks:
        print(f"note: ending what a killed bench has left running in {folder}", file=sys.stderr)
        end(marks, grace)


def kill_own() -> None:
    """Make the processes of all jobs that this program has started end at once."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK, "").startswith(f"{os.getpid()}:"):
                process.kill()


class OomKills:
    """Who was killed for lack of memory: the kernel counts those of the whole machine.

    Each kill is blamed on one of the cells that run side by side, the first that asks for it, and
    on none that ends long after it was noticed.
    """

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._total: int | None = None
        self._noticed: list[float] = []

    def mark(self) -> float:
        """The moment at which a cell starts; kills up to now are none of its own."""
        with self._lock:
            self._look()
            return time.monotonic()

    def claim(self, started: float) -> int:
        """1 if a kill can be blamed on a cell that has just ended, else 0."""
        with self._lock:
            self._look()
            since = max(started, time.monotonic() - BLAME_SECONDS)
            mine = next((moment for moment in self._noticed if moment > since), None)
            if mine is None:
                return 0
            self._noticed.remove(mine)
            return 1

    def _look(self) -> None:
        total = self._read()
        new = 0 if self._total is None else total - self._total
        self._noticed += [time.monotonic()] * new
        self._total = total


def oom_kills() -> int:
    """Processes that this Linux kernel has killed for lack of memory since it started."""
    with contextlib.suppress(OSError):
        match = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


OOM_KILLS = OomKills(oom_kills)
"""Of this machine."""
