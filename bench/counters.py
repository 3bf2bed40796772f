"""Counters of this process and its machine, read before and after something that is timed."""

import contextlib
import hashlib
import math
import os
import platform
import resource
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from cifar.process import cpu_groups


class Counters(NamedTuple):
    """Seconds and events that only grow; NaN where this system does not count them."""

    clock: float
    """Of the wall."""
    capacity: float
    """CPU seconds, idle ones included, of the cores that this process may use."""
    busy: float
    """CPU seconds of them in which anything ran, interrupts included."""
    stolen: float
    """CPU seconds of them that the host of a virtual machine gave to other guests."""
    own: float
    """CPU seconds of this process, its threads and its children."""
    throttled: float
    """CPU seconds for which quotas of its control groups have held it back, summed over the cores;
    where an outer group is held back, those in it are not at the same time."""
    cooled: float
    """Times that a core, or the package it is on, was slowed down because of heat."""
    major_faults: float
    """Pages of this process that had to be read from a disk."""
    switches: float
    """Times that this process was ready to go on and another one was let run instead."""

    def since(self, earlier: "Counters") -> "Counters":
        """What was counted after `earlier`."""
        return Counters(*(now - then for now, then in zip(self, earlier, strict=True)))


def read_counters(root: Path = Path("/")) -> Counters:
    """Read all; `root` is where `/proc` and `/sys` are looked for."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Counters(
        time.perf_counter(),
        *_core_seconds(root),
        _own_seconds(usage),
        _throttled_seconds(root),
        _thermal_events(root),
        usage.ru_majflt,
        usage.ru_nivcsw,
    )


def usable_cores() -> frozenset[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def place() -> float:
    """A whole number that processes on the same cores of the same machine share, and no others."""
    text = f"{platform.node()} {sorted(usable_cores())}"
    return float(int(hashlib.sha256(text.encode()).hexdigest()[:12], 16))


def _core_seconds(root: Path) -> tuple[float, float, float]:
    """Capacity, busy and stolen CPU seconds; see proc(5), /proc/stat."""
    cores, tick = usable_cores(), 1 / os.sysconf("SC_CLK_TCK")
    capacity = busy = stolen = 0
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return math.nan, math.nan, math.nan
    for name, *fields in map(str.split, filter(None, lines)):
        if name[3:].isdigit() and name.startswith("cpu") and int(name[3:]) in cores:
            user, nice, system, idle, waiting, irq, softirq, steal = map(int, fields[:8])
            used = user + nice + system + irq + softirq
            busy, stolen = busy + used, stolen + steal
            capacity += used + idle + waiting + steal
    return capacity * tick, busy * tick, stolen * tick


def _own_seconds(usage: resource.struct_rusage) -> float:
    """Of this process and its children, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = usage.ru_utime + usage.ru_stime + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def _throttled_seconds(root: Path) -> float:
    """Over this process's control group and those around it, of version 2 or 1; NaN if none tells.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html and
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    found = []
    for group in cpu_groups(root):
        with contextlib.suppress(OSError):
            lines = (group / "cpu.stat").read_text().splitlines()
            stat = dict(line.split() for line in lines)
            if "throttled_usec" in stat:
                found.append(int(stat["throttled_usec"]) / 1e6)
            elif "throttled_time" in stat:
                found.append(int(stat["throttled_time"]) / 1e9)
    return sum(found) if found else math.nan


def clock_hz(root: Path = Path("/")) -> float:
    """The present clock of the cores that this process may use, their mean; NaN if nothing tells.

    Virtual machines rarely do. See https://docs.kernel.org/admin-guide/pm/cpufreq.html.
    """
    folder, clocks = root / "sys/devices/system/cpu", []
    for core in usable_cores():
        with contextlib.suppress(OSError, ValueError):
            text = (folder / f"cpu{core}/cpufreq/scaling_cur_freq").read_text()
            clocks.append(1000.0 * int(text))
    return math.fsum(clocks) / len(clocks) if clocks else math.nan


def _thermal_events(root: Path) -> float:
    """Over all cores; NaN if this machine counts none, as virtual ones and those of AMD do not."""
    files = (root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
    counts = []
    for file in files:
        with contextlib.suppress(OSError):
            counts.append(int(file.read_text()))
    return float(sum(counts)) if counts else math.nan
