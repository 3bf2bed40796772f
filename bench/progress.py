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
    """Shows which cell runs, what became of the earlier ones, and how long the rest may take."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._line = ""

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
        elif kind is not None and self._line:
            print(file=self._stream, flush=True)

    def start(self, number: int, label: str, seconds_left: float | None) -> None:
        """Cell `number` (from 1) starts; from here `seconds_left` are expected (None: unknown)."""
        self._line = f"[{number}/{self._total}] {label} ..."
        if self._bar is not None:
            left = "" if seconds_left is None else f"about {format_duration(seconds_left)} left"
            self._bar.update(
                self._task, description=self._line, completed=number - 1, left=left, refresh=True
            )
        else:
            print(self._line, end="", file=self._stream, flush=True)

    def finish(self, text: str, seconds_left: float | None) -> None:
        """That became of the cell that started last; the ones after it may take that long."""
        text = f" {text}"
        if seconds_left:
            text += f", about {format_duration(seconds_left)} left"
        if self._bar is not None:
            self._bar.console.print(
                self._line + text, highlight=False, markup=False, soft_wrap=True
            )
        else:
            print(text, file=self._stream, flush=True)
        self._line = ""
