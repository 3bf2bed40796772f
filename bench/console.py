"""What the commands that measure share: plans on paper, signals, paths as people read them."""

import contextlib
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from bench.cores import pinned, write_cores
from bench.devices import Machine
from bench.estimate import estimate_seconds
from bench.launchers import argv_for, environment_for
from bench.record import Record
from bench.spec import Task
from cifar.errors import Stopped
from cifar.process import recorded_environment
from cifar.progress import format_duration


def expected_seconds(tasks: Sequence[Task], past: Sequence[Record]) -> float:
    """Seconds for all tasks together."""
    return sum(estimate_seconds(task.cell, task.protocol, history=past) for task in tasks)


def show_plan(
    tasks: Sequence[Task],
    past: Sequence[Record],
    machine: Machine | None = None,
    submitted: Callable[[Task], str] | None = None,
) -> int:
    """Print what would be started, and the time it would take; returns the exit code.

    On a `machine`, side by side if it has several devices, or as jobs that `submitted` describes.
    """
    machine = machine or Machine()
    seconds = {
        cell: estimate_seconds(*cell, history=past)
        for cell in {(task.cell, task.protocol) for task in tasks}
    }
    for number, task in enumerate(tasks, 1):
        about = format_duration(seconds[task.cell, task.protocol])
        repeat = f" repeat {task.repeat}" if task.repeat else ""
        print(f"[{number}/{len(tasks)}] {task.cell.label}{repeat}  about {about}")
        print(f"  {submitted(task) if submitted else _command(task, machine)}")
    total = sum(
        seconds[task.cell, task.protocol] * machine.share(task.cell.num_processes) for task in tasks
    )
    basis = "earlier runs, where they tell, and rules of thumb" if past else "rules of thumb alone"
    source = f" (from {basis})" if tasks else ""
    print(f"{counted(tasks)}, about {format_duration(total)}{source}")
    return 0


def _command(task: Task, machine: Machine) -> str:
    """What a shell would be given, on the first of the devices."""
    count = task.cell.num_processes
    place = machine.first_place(count)
    with pinned(place.cores):
        environment = environment_for(count, os.environ) | place.variables
    settings = recorded_environment(environment)
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    words += ["taskset", "--cpu-list", write_cores(place.cores)] if place.cores else []
    return " ".join([*words, shlex.join(argv_for(task.cell, Path("FOLDER")))])


def counted(tasks: Sequence[Task]) -> str:
    """How many cells, and processes if those are more: `2 cells`, `2 cells in 14 processes`."""
    cells = len({task.key[:2] for task in tasks})
    return plural(cells, "cell") + (f" in {len(tasks)} processes" if len(tasks) > cells else "")


def plural(count: int, noun: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{count} {noun}{'s' * (count != 1)}"


@contextlib.contextmanager
def stoppable(resume: str = "") -> Iterator[None]:
    """While entered, SIGINT, SIGTERM and SIGHUP end the cell's processes as well.

    One that is ignored stays so, as `nohup` wants it of SIGHUP.

    Raises:
        Stopped: one of them came; the message tells that the command `resume`, if any, goes on.
    """
    further = f"; to go on: {resume}" if resume else ""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number, f"stopped by {signal.Signals(number).name}{further}")

    stopping = (signal.SIGTERM, signal.SIGHUP)
    heeded = [each for each in stopping if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in heeded}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, f"interrupted{further}") from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def shown(path: Path) -> str:
    """A path relative to the working folder if it lies in there."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
