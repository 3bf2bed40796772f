"""CPU cores by number: how they are written, shared out, and given to what a thread starts."""

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from bench.counters import usable_cores
from cifar.process import ROOT, available_cores

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LARGEST = 2**16


def read_cores(text: str, separator: str = ",") -> tuple[int, ...]:
    """`0-3,8` as (0, 1, 2, 3, 8).

    Raises:
        ValueError: no numbers or ranges of them.
    """
    found: set[int] = set()
    for part in text.split(separator):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(text)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < _LARGEST:
            raise ValueError(text)
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def write_cores(cores: Collection[int]) -> str:
    """The same in the other direction, as the kernel writes lists of cores."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][-1] + 1:
            ranges[-1].append(core)
        else:
            ranges.append([core])
    return ",".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in ranges)


@contextlib.contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """While entered, this thread, and what it starts, runs on these cores alone; none: on any.

    Other threads of this process stay where they are: sched_setaffinity(2).
    """
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def shares(near: Sequence[Collection[int]], root: Path = ROOT) -> list[tuple[int, ...]] | None:
    """Cores for each of several devices: as many each, and none twice; None: there are too few.

    `near` holds those close to each device, as on its socket; empty: all are. They are left only if
    some device would have none. A physical core's threads stay together, and a CPU quota counts.
    """
    usable = usable_cores()
    groups = [frozenset(cores) & usable or usable for cores in near]
    each = _even(groups, available_cores(root) // len(near), root)
    if not each:
        groups = [usable] * len(near)
        each = _even(groups, available_cores(root) // len(near), root)
    if not each:
        return None
    left = {group: _by_physical_core(group, root) for group in groups}
    taken: list[tuple[int, ...]] = []
    for group in groups:
        taken.append(tuple(sorted(left[group][:each])))
        left[group] = left[group][each:]
    return taken


def _even(groups: Sequence[frozenset[int]], most: int, root: Path) -> int:
    """Cores that every device gets of its group; 0 if groups overlap or some get none."""
    different = set(groups)
    if sum(map(len, different)) > len(frozenset().union(*different)):
        return 0
    each = min(most, *(len(group) // groups.count(group) for group in different))
    together = len(_siblings(min(groups[0]), root))
    return each - each % together if each > together else each


def _by_physical_core(cores: Collection[int], root: Path) -> list[int]:
    return sorted(cores, key=lambda core: (min(_siblings(core, root)), core))


def _siblings(core: int, root: Path) -> tuple[int, ...]:
    """The threads of a core's physical core, itself included."""
    path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
    with contextlib.suppress(OSError, ValueError):
        return read_cores(path.read_text().strip())
    return (core,)
