"""In which order a run's processes start, and which of them are still needed. No torch."""

import random
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from bench.record import Environment, Record
from bench.spec import Task
from bench.stats import reach
from cifar.data.config import DataConfig

Key = tuple[str, str, int]
"""Of a task and its record: digests of cell and protocol, and the repeat."""
Fingerprints = Mapping[DataConfig, str]
"""Of the data sets as they are now, see `cifar.data.dataset.Dataset.fingerprint`; one that is not
in here is taken to be as it was."""
UNCHANGED: Fingerprints = MappingProxyType({})
"""Every data set is taken to be as it was."""


def interleaved(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The order to measure in, so that a machine that drifts does not favour a cell.

    Repeat by repeat over all cells, and where cells are repeated, in another random order each
    time; the same for the same tasks.
    """
    generator = random.Random(0)
    rounds: dict[int, list[Task]] = {}
    for task in tasks:
        rounds.setdefault(task.repeat, []).append(task)
    if len(rounds) > 1:
        for each in rounds.values():
            generator.shuffle(each)
    return tuple(task for repeat in sorted(rounds) for task in rounds[repeat])


def is_from_here(record: Record, environment: Environment, fingerprints: Fingerprints) -> bool:
    """Whether a record was taken in the circumstances, and of the images, of here and now."""
    return (
        record.environment is not None
        and record.environment.key() == environment.key()
        and is_of_images(record, fingerprints)
    )


def is_of_images(record: Record, fingerprints: Fingerprints) -> bool:
    """Whether a record is of the images that there are now.

    One that died before it read any tells of whichever there are.
    """
    images = fingerprints.get(record.cell.train.data)
    return images is None or record.data is None or record.data.fingerprint == images


class Repeats:
    """The training throughput of every cell's finished processes, one value each.

    All records that are ok count, disturbed ones too: they do in the tables whose interval this
    is. A cell's seeds are cells of their own here, although
    they share a row in tables. Stopping once the interval happens to be narrow costs coverage:
    simulated for a target of 1 % and processes that spread by 1 to 2 %, the interval of those that
    were started holds the true median in 92 to 94 % of the cases instead of 95 %.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._values: dict[tuple[str, str], list[float]] = {}
        self._reach: dict[tuple[str, str], float | None] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """A process more."""
        rate = record.value("train_throughput")
        if record.status == "ok" and rate is not None:
            self._values.setdefault(record.key[:2], []).append(rate)
            self._reach.pop(record.key[:2], None)

    def known_within(self, task: Task) -> float | None:
        """How far the interval of the task's cell reaches, as a fraction of the median.

        None if that is further than the protocol asks for, or it asks for nothing.
        """
        target = task.protocol.target_interval
        if target is None:
            return None
        cell = task.key[:2]
        if cell not in self._reach:
            self._reach[cell] = reach(self._values.get(cell, ()))
        found = self._reach[cell]
        return found if found is not None and found <= target else None


class Standing:
    """What a run has and what it still needs.

    `latest` holds the last record of every task that has one, `kept` those of them that can be
    used again.
    """

    def __init__(self, latest: Mapping[Key, Record], kept: Mapping[Key, Record]) -> None:
        self.kept = kept
        self._repeats = Repeats(kept.values())
        self._broken = {
            key for key, record in latest.items() if not (record.finished and record.valid)
        }

    def add(self, record: Record) -> None:
        """A task was measured."""
        self._repeats.add(record)

    def needs(self, task: Task) -> bool:
        """Whether a task is to be measured."""
        return task.key not in self.kept and self.known_within(task) is None

    def known_within(self, task: Task) -> float | None:
        """See `Repeats.known_within`; what broke down is tried again whatever is known."""
        return None if task.key in self._broken else self._repeats.known_within(task)
