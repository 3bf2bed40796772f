"""Where the jobs of a run are measured: its machine's devices side by side, as one of the ways.

A pool starts jobs as long as it has room and tells which have ended; whoever uses it decides what
is started, and alone writes records. No torch.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from bench.cores import pinned
from bench.devices import Machine, Place
from bench.job import Job
from bench.launchers import Watch
from bench.processes import kill_own
from bench.record import Record
from bench.spec import Task


class Ended(NamedTuple):
    """A job that has ended, and what became of it."""

    job: Job
    record: Record


class Pool(Protocol):
    """Measures jobs, one or several at a time.

    Jobs run while it is entered. What becomes of those that still run when it is left, it says
    itself; records that had come by then can still be taken from it (`ended`).
    """

    side_by_side: bool
    """Whether jobs run at the same time."""

    def start(self, job: Job, folder: Path) -> str | None:
        """Start a job if there is room for it: the name of its place, empty if there is but one.

        None: there is none as long as no other one ends.
        """

    def wait(self) -> Sequence[Ended]:
        """Wait until jobs have ended.

        Raises:
            OSError: the folder of one cannot be written.
        """

    def ended(self) -> Sequence[Ended]:
        """Jobs that had ended, and nobody has taken, when the pool was left."""

    def share(self, task: Task) -> float | None:
        """What part of the pool a task takes while it runs; None: the pool does not know."""

    def __enter__(self) -> "Pool": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


@contextlib.contextmanager
def entered(pool: Pool, keep: Callable[[Sequence[Ended]], None]) -> Iterator[None]:
    """While entered the pool measures; what has ended by the time it is cut short is kept."""
    try:
        with pool:
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            keep(pool.ended())
        raise


class LaunchInPlace(Protocol):
    """Measures a job in fresh processes with these variables; see `bench.launchers.launch`."""

    def __call__(
        self, job: Job, folder: Path, *, variables: Mapping[str, str], watch: Watch
    ) -> Record:
        """Its record."""


def unwatched(_job: Job) -> Watch:
    """Nothing ends a job early."""
    return lambda _folder: ""


class Slots:
    """The devices of this machine: each measures one job at a time, a thread waits for it.

    A job of several processes takes as many. Jobs are started in the order in which they come: one
    that finds too few free devices is refused, and whoever asks waits with all others, so it will
    get them. `watch` gives what looks at a job while it runs, in that job's thread.
    """

    def __init__(
        self,
        machine: Machine,
        launch: LaunchInPlace,
        watch: Callable[[Job], Watch] = unwatched,
    ) -> None:
        self.side_by_side = len(machine.slots) > 1
        self._machine, self._launch, self._watch = machine, launch, watch
        self._free = list(machine.slots)
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()
        self._done: queue.SimpleQueue[tuple[Job, Place, Record | BaseException]] = (
            queue.SimpleQueue()
        )

    def has_room(self, task: Task) -> bool:
        """Whether a task could be started now."""
        return self._machine.needs(task.cell.num_processes) <= len(self._free)

    def start(self, job: Job, folder: Path) -> str | None:
        """See `Pool.start`."""
        if not self.has_room(job.task):
            return None
        count = self._machine.needs(job.task.cell.num_processes)
        place = self._machine.place(self._free[:count])
        thread = threading.Thread(target=self._measure, args=(job, folder, place), name="slot")
        thread.start()
        self._threads.add(thread)
        del self._free[:count]
        return place.label

    def wait(self) -> Sequence[Ended]:
        """See `Pool.wait`; what a job's thread has raised goes on up."""
        job, place, result = self._done.get()
        free = {*self._free, *place.devices}
        self._free = [each for each in self._machine.slots if each in free]
        if isinstance(result, BaseException):
            raise result
        return [Ended(job, result)]

    def ended(self) -> Sequence[Ended]:
        """See `Pool.ended`; a job that was ended early is none."""
        found = []
        while not self._done.empty():
            job, _, result = self._done.get()
            if isinstance(result, Record):
                found.append(Ended(job, result))
        return found

    def share(self, task: Task) -> float:
        """See `Pool.share`."""
        return self._machine.share(task.cell.num_processes)

    def __enter__(self) -> "Slots":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        try:
            self._join()
        except BaseException:  # a second Ctrl-C: no more grace
            kill_own()
            self._join()
            raise

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _measure(self, job: Job, folder: Path, place: Place) -> None:
        """What a job's thread does."""
        result: Record | BaseException
        further = self._watch(job)

        def watch(folder: Path) -> str:
            if self._stopping.is_set():
                raise CancelledError
            return further(folder)

        try:
            with pinned(place.cores):
                result = self._launch(job, folder, variables=place.variables, watch=watch)
        except BaseException as error:
            result = error
        self._done.put((job, place, result))
