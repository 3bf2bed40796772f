"""A job's processes on this machine: how they are told from all others, and ended."""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil

GRACE_SECONDS = 10.0
"""Between asking processes to end and ending them."""
MARK = "BENCH_JOB"
"""Environment variable that tells a job's processes, whatever group or session they moved to."""


def end(mark: str, grace: float) -> None:
    """Ask all of a job's processes to end, then make them."""
    try:
        if not _gone(mark, signal.SIGTERM, grace):
            _gone(mark, signal.SIGKILL, grace)
    except BaseException:  # a second Ctrl-C: no more grace
        _gone(mark, signal.SIGKILL, grace)
        raise


def _gone(mark: str, number: signal.Signals, grace: float) -> bool:
    """Signal a job's processes; whether all of them ended within `grace` seconds."""
    deadline = time.monotonic() + grace
    alive = _alive(mark)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = _alive(mark)
    return not alive


def _alive(mark: str) -> list[psutil.Process]:
    """The processes of a job that have not ended.

    Process groups do not tell: torchrun gives every worker a session of its own.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
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
    for mark in marks:
        end(mark, grace)


def oom_kills() -> int:
    """Processes that this Linux kernel has killed for lack of memory since it started."""
    with contextlib.suppress(OSError):
        match = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0
