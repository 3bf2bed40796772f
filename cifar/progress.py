"""Progress of a training run: a live display on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_INTERVAL = 30.0
"""Seconds between lines within an epoch when the output is no terminal."""


def format_duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class TrainingProgress:
    """Shows steps, images/s and time left; silent unless `enabled` (the first process)."""

    def __init__(
        self, total_steps: int, steps_per_epoch: int, batch_size: int, *, enabled: bool
    ) -> None:
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last_line = time.monotonic()
        self._first_step = 0

    def __enter__(self) -> "TrainingProgress":
        if self._enabled and sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} images/s"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("training", total=self._total_steps, rate="-")
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

    def start_at(self, step: int) -> None:
        """The first step of this process, after a resume."""
        self._first_step = step
        self._start = self._last_line = time.monotonic()

    def update(self, step: int) -> None:
        """`step` optimiser steps are done."""
        if not self._enabled:
            return
        now = time.monotonic()
        rate = (step - self._first_step) * self._batch_size / max(1e-9, now - self._start)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{rate:,.0f}")
        elif now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            left = (self._total_steps - step) * self._batch_size / max(1e-9, rate)
            print(
                f"step {step}/{self._total_steps}  {rate:,.0f} images/s  "
                f"about {format_duration(left)} left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def epoch(self, line: dict[str, Any]) -> None:
        """The metrics of an epoch."""
        epochs = -(-self._total_steps // self._steps_per_epoch)
        scores = "  ".join(
            f"{name} loss {line[f'{key}_loss']:.4f} top-1 {line[f'{key}_top1']:.2%}"
            for key, name in (("train", "train"), ("val", "validation"), ("test", "test"))
            if f"{key}_loss" in line
        )
        rate = f"{line['train_images_per_s']:,.0f} images/s"
        self.say(f"epoch {line['epoch']}/{epochs}  {scores}  {rate}")
