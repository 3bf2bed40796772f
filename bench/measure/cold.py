"""The first inference of a fresh process, which no warm one can tell."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.cold import STARTED, Cold, ramp
from bench.judge import inference_mismatches
from bench.measure.backends import Source
from bench.measure.comparison import Comparison, Reference, floor_of
from bench.measure.inference import evaluated_module, evaluating
from bench.measure.subject import Subject
from bench.record import Label, Measurement
from cifar.checkpoint import Tensors, write_checkpoint
from cifar.distributed import barrier
from cifar.training_state import card_of

TIMEOUT = 300.0
"""Seconds for a process to start, load and infer."""


def measure_cold(subject: Subject) -> Iterable[Measurement]:
    """Seconds of a fresh process on this cell's weights, eager, for one image.

    `cold_start` is from its start to its first logits, imports and loading included,
    `cold_first_inference` the first call alone, and `cold_second_inference` the one after it. The
    first rank's device does it while the others wait. They have failed if the process computed in
    another precision or layout than the cell, or other logits than its weights give in fp32 eager.
    """
    found: Cold | None = None
    reason = ""
    weights = subject.trainer.eval_weights()  # a collective call
    with subject.watched("cold"):
        if subject.trainer.is_main:
            try:
                found = _run(subject, weights)
            except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
                reason = f"the process that was to infer: {_why(error)}"
        barrier()
    exact = _exact(subject)  # a collective call
    if found is not None:
        reason = _fault(subject, found, exact)
    for field, name in (
        ("start", "cold_start"),
        ("first", "cold_first_inference"),
        ("second", "cold_second_inference"),
    ):
        if found is None or reason:
            why = reason or "the first process tells"
            yield Measurement(name=name, unit="s", better="lower", status="failed", reason=why)
            continue
        seconds = float(getattr(found, field))
        labels: dict[str, Label] = {"batch_size": 1, "input_dtype": found.seen["input_dtype"]}
        yield Measurement(name=name, unit="s", better="lower", labels=labels, samples=((seconds,),))


@torch.inference_mode()
def _exact(subject: Subject) -> Tensor:
    """Logits `[1, K]` of the same image in fp32 eager in this process; a collective call.

    Without cuDNN, which keeps what its search has found for this shape even where that is off.
    """
    trainer = subject.trainer
    size = trainer.dataset.train.images.shape[1:]
    image = ramp(size, subject.device, channels_last=trainer.config.channels_last)
    with evaluating(trainer.bare), _without_cudnn():
        module = evaluated_module(trainer)
        source = Source(module=module, precision="fp32", device=subject.device)
        return Reference(trainer, source).exact(image)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _fault(subject: Subject, found: Cold, exact: Tensor) -> str:
    """How the process did not run what was asked; "" if it did.

    One image's top-1 may turn where two logits are nearly the same, so it does not count.
    """
    config = subject.trainer.config
    assert config.precision is not None, "a trainer has resolved it"
    seen = {**found.seen, "emulated": subject.trainer.emulated}
    wrong = inference_mismatches(config, seen, seen, compiled=False)
    logits = torch.tensor([found.logits], device=subject.device)
    floor = dataclasses.replace(floor_of(config.precision), agreement=0.0)
    wrong.append(Comparison.of(logits, exact).fault(floor))
    return "; ".join(filter(None, wrong))


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
    return lines[-1] if lines else type(error).__name__
