"""How a run of a suite is shown: a live line on a terminal, a line per cell in a log."""

import sys
from types import TracebackType
from typing import Any, TextIO

from bench.record import Record
from cifar.progress import format_duration


def outcome(record: Record) -> str:
    """What became of a cell: `ok 412 images/s 35 s`, `failed 8 s: ValueError: ...`.

    What disturbed it is told: `ok 389 images/s 35 s (disturbed: other processes used ...)`.
    """
    duration = format_duration(record.duration_s)
    if record.status != "ok":
        return f"{record.status} {duration}: {record.reason}"
    rate = record.value("train_throughput")
    speed = f" {rate:,.0f} images/s" if rate is not None else ""
    disturbed = f"disturbed: {'; '.join(record.invalid)}" if record.invalid else ""
    notes = "; ".join(filter(None, (record.reason, disturbed)))
    return f"ok{speed} {duration}" + (f" ({notes})" if notes else "")


class SuiteProgress:
    """Shows which cells run, what became of the earlier ones, and how long the rest may take.

    Where cells run `side_by_side` a log has a line for the start of each and one for its end.
    """

    def __init__(
        self, total: int, stream: TextIO | None = None, *, side_by_side: bool = False
    ) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._side_by_side = side_by_side
        self._bar: Any = None
        self._task: Any = None
        self._lines: dict[int, str] = {}
        self._finished = 0

    def __enter__(self) -> "SuiteProgress":
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[left]}", markup=False),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
                refresh_per_second=1,  # this process must not disturb the measurement
            )
            self._task = self._bar.add_task("", total=self._total, left="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is not None and self._lines and not self._side_by_side:
            print(file=self._stream, flush=True)

    def start(
        self, number: int, label: str, seconds_left: float | None, *, begins: bool = True
    ) -> None:
        """Cell `number` (from 1) starts; from here `seconds_left` are expected (None: unknown).

        If it does not begin, as it was measured before, what became of it follows at once.
        """
        self._lines[number] = f"[{number}/{self._total}] {label} ..."
        if self._bar is not None:
            self._show(seconds_left)
        elif not self._side_by_side:
            print(self._lines[number], end="", file=self._stream, flush=True)
        elif begins:
            print(self._lines[number], file=self._stream, flush=True)

    def finish(self, text: str, seconds_left: float | None, number: int | None = None) -> None:
        """What became of a cell, the last that started if no `number` is given.

        Those after it, and those that run, may take that long.
        """
        line = self._lines.pop(next(reversed(self._lines)) if number is None else number)
        self._finished += 1
        text = f" {text}"
        if seconds_left:
            text += f", about {format_duration(seconds_left)} left"
        if self._bar is not None:
            self._bar.console.print(line + text, highlight=False, markup=False, soft_wrap=True)
            if self._lines:
                self._show(seconds_left)
        else:
            print(line + text if self._side_by_side else text, file=self._stream, flush=True)

    def _show(self, seconds_left: float | None) -> None:
        """On the live line: what runs, the last of them if they are several."""
        line, count = next(reversed(self._lines.values())), len(self._lines)
        left = "" if seconds_left is None else f"about {format_duration(seconds_left)} left"
        self._bar.update(
            self._task,
            description=line if count == 1 else f"{line} and {count - 1} beside",
            completed=self._finished if self._side_by_side else min(self._lines) - 1,
            left=left,
            refresh=True,
        )
