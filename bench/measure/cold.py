"""The first inference of a fresh process, which no warm one can tell."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench.cold import STARTED, Cold
from bench.measure.subject import Subject
from bench.record import Measurement
from cifar.checkpoint import Tensors, write_checkpoint
from cifar.distributed import barrier
from cifar.training_state import card_of

TIMEOUT = 300.0
"""Seconds for a process to start, load and infer."""


def measure_cold(subject: Subject) -> Iterable[Measurement]:
    """Seconds of a fresh process on this cell's weights, eager, for one image.

    `cold_start` is from its start to its first logits, imports and loading included,
    `cold_first_inference` the first call alone, and `cold_second_inference` the one after it. The
    first rank's device does it while the others wait.
    """
    found: Cold | None = None
    reason = ""
    weights = subject.trainer.eval_weights()  # a collective call
    if subject.trainer.is_main:
        try:
            found = _run(subject, weights)
        except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
            reason = _why(error)
    barrier()
    for field, name in (
        ("start", "cold_start"),
        ("first", "cold_first_inference"),
        ("second", "cold_second_inference"),
    ):
        seconds = None if found is None else float(getattr(found, field))
        yield _measurement(name, seconds, reason or "the first process tells")


def _measurement(name: str, seconds: float | None, reason: str) -> Measurement:
    if seconds is None:
        return Measurement(name=name, unit="s", better="lower", status="failed", reason=reason)
    return Measurement(
        name=name, unit="s", better="lower", labels={"batch_size": 1}, samples=((seconds,),)
    )


def _run(subject: Subject, weights: Tensors) -> Cold:
    trainer = subject.trainer
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "weights")
        card = card_of(trainer, averaged=trainer.average is not None)
        write_checkpoint(folder, {"model": weights}, card)
        command = [sys.executable, "-m", "bench.cold", str(folder), str(trainer.device)]
        environment = {**os.environ, STARTED: str(time.monotonic())}
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT,
        )
    return Cold(**json.loads(done.stdout.splitlines()[-1]))


def _why(error: Exception) -> str:
    told = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    lines = (told or str(error)).strip().splitlines()
    return f"the process that was to infer: {lines[-1] if lines else type(error).__name__}"
