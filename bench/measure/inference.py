"""Inference: latency and throughput from images on the device to finished logits."""

import contextlib
import copy
import functools
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bench.judge import Labels, inference_mismatches, unproven
from bench.measure.backends import BACKENDS, Factory, Run, Source, cold_caches, compiling_apart
from bench.measure.batches import Timed, time_batches
from bench.measure.clock import synchronize
from bench.measure.comparison import Comparison, Reference, not_reduced, sample_images
from bench.measure.subject import Better, Subject
from bench.observe import InferenceWitness
from bench.record import Label, Measurement
from cifar.distributed import least
from cifar.errors import UnsupportedError
from cifar.trainer import Trainer

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@torch.inference_mode()
def measure_inference(subject: Subject) -> Iterable[Measurement]:
    """Times, start and outputs of the cell's own backend and those the protocol names.

    For the latency every batch is waited for, so at batch 1 it is that of images that come one at a
    time (DAWNBench, https://dawn.cs.stanford.edu/benchmark/); for the throughput batches are
    launched without waiting in between. The number of processes does not matter: each one measures
    on its own device, and the slowest one's throughput is told. What is measured of a further
    backend has its name in the label `backend`; the cell's own is eager, or compiled where it
    trains so. The weights are those that the top-1 is measured of.
    """
    trainer = subject.trainer
    assert trainer.config.precision is not None
    compiles = trainer.config.compile or subject.protocol.inference_backends
    apart = compiling_apart() if compiles else contextlib.nullcontext()
    with evaluating(trainer.bare), apart:
        source = Source(
            module=evaluated_module(trainer),
            precision=trainer.config.precision,
            device=trainer.device,
            compile_mode=trainer.config.compile_mode,
        )
        reference = Reference(trainer, source)
        own = "compiled" if trainer.config.compile else "eager"
        yield from Candidate(subject, source, own, reference).measure()
        for name in subject.protocol.inference_backends:
            if name != own:
                yield from Candidate(subject, source, name, reference, backend=name).measure()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a network infer; afterwards it is in the mode it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.inference_mode(False)
@torch.no_grad()
def evaluated_module(trainer: Trainer) -> nn.Module:
    """The network with the weights to evaluate, a copy where they are not those it trains with.

    A collective call, for they may be shared out.
    """
    if trainer.average is None and trainer.bare is trainer.module:
        return trainer.module
    module = copy.deepcopy(trainer.bare)
    module.load_state_dict(trainer.eval_weights(), assign=trainer.engine.shares_out)
    return module


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A backend that has run its first batch."""

    run: Run
    batch_size: int
    build_seconds: float
    first_seconds: float
    """Of building and the first call together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """Why a backend has no numbers."""

    status: Literal["absent", "failed"]
    reason: str


class Candidate:
    """One backend on this cell's weights, built and measured at one batch size after the other.

    The cell's own backend has no labels: what breaks it breaks the cell.
    """

    def __init__(
        self, subject: Subject, source: Source, name: str, reference: Reference, **labels: Label
    ) -> None:
        self._subject, self._source, self._name = subject, source, name
        self._reference, self._labels = reference, labels
        self._comparisons: list[Comparison] = []
        self._trouble: Trouble | None = None

    def measure(self) -> Iterator[Measurement]:
        """Times at every batch size, then what the start took, then how right the outputs are."""
        first: Started | None = None
        for size in self._subject.protocol.inference_batch_sizes:
            images = sample_images(self._subject.trainer, size)
            started = self._start(images, cold=first is None)
            first = first or started
            yield from self._times(self._time(started, images) if started else None, size)
        if first:
            yield from self._beginning(first)
        if self._comparisons or (first and self._compare_once(first)):
            yield from self._outputs()

    def _start(self, images: Tensor, *, cold: bool) -> Started | None:
        """Build it and run its first batch; None, and the trouble noted, where that fails."""
        if self._trouble and self._trouble.status == "absent":
            return None
        started, trouble = None, None
        self._witness = InferenceWitness(self._source.module, compiled=not self._is_eager)
        try:
            with cold_caches() if cold and not self._is_eager else contextlib.nullcontext():
                started = _begin(BACKENDS[self._name], self._source, images)
            if self._name == "compiled" and self._source.compile_mode != "default":
                self._witness.record(functools.partial(started.run, images))
        except UnsupportedError as error:
            trouble = Trouble(status="absent", reason=str(error))
        except Exception as error:  # a library's, of any kind: it costs this number, not the cell
            if not self._labels:
                raise
            trouble = Trouble(status="failed", reason=_one_line(error))
        self._trouble = self._agree(trouble)
        return None if self._trouble else started

    def _agree(self, mine: Trouble | None) -> Trouble | None:
        """The worst trouble of all processes, which have to go on together; a collective call."""
        order = ("absent", "failed", "ok")
        worst = order[least(order.index(mine.status if mine else "ok"), self._subject.device)]
        if worst == "ok" or (mine and mine.status == worst):
            return mine
        status: Literal["absent", "failed"] = "absent" if worst == "absent" else "failed"
        return Trouble(status=status, reason=f"{status} in another process")

    def _times(self, timed: Timed | None, size: int) -> Iterator[Measurement]:
        """Latency, and the throughput of a device that is kept busy where it was asked for."""
        each = [value / size for value in timed.each] if timed else None
        yield self._found("inference_latency", "s/sample", "lower", each, batch_size=size)
        if self._subject.protocol.throughput_seconds:
            row = [timed.row] if timed and timed.row else None
            count = size * timed.in_row if timed else size
            labels: dict[str, Label] = {"batch_size": size, "samples_per_step": count}
            yield self._found("inference_throughput", "samples/s", "higher", row, **labels)

    def _time(self, started: Started, images: Tensor) -> Timed | None:
        """Time its batches; None, and the trouble noted, if the outputs are wrong."""
        if not self._is_eager:
            comparison = self._reference.compare(started.run, len(images))
            self._comparisons.append(comparison)
            floor = self._reference.floor(comparison, self._source.precision, len(images))
            fault = comparison.fault(floor)
            if not self._shows:
                fault = fault or not_reduced(comparison, self._source.precision)
            self._trouble = self._agree(Trouble(status="failed", reason=fault) if fault else None)
        if self._trouble:
            return None
        backend = f" {self._name}" if self._labels else ""
        where = f"inference{backend} b{len(images)}"
        before = self._observe(started, images)
        unseen = unproven(self._subject.trainer.config, before)
        self._subject.invalid += [f"{where}: {each}" for each in unseen]
        timed = time_batches(started.run, images, self._subject, where)
        fault = self._mismatch(before, self._observe(started, images))
        self._trouble = self._agree(Trouble(status="failed", reason=fault) if fault else None)
        return None if self._trouble else timed

    def _observe(self, started: Started, images: Tensor) -> Labels:
        """What runs in a batch; nothing of a library that computes out of torch's sight."""
        if not self._shows:
            return {}
        seen = self._witness.observe(functools.partial(started.run, images))
        return {**seen, "emulated": self._subject.trainer.emulated}

    def _mismatch(self, before: Labels, after: Labels) -> str:
        """How the timed batches were not those asked for; empty if they were, or nothing tells."""
        if not before:
            return ""
        config = self._subject.trainer.config
        compiled = not self._is_eager
        return "; ".join(inference_mismatches(config, before, after, compiled=compiled))

    def _compare_once(self, started: Started) -> bool:
        """Compare eager, one program for all batch sizes; False in fp32, as that is the reference.

        What is found is the precision's own difference from fp32 and no fault.
        """
        if not self._is_eager or self._source.precision == "fp32":
            return False
        self._comparisons.append(self._reference.compare(started.run, self._reference.samples))
        return True

    def _beginning(self, first: Started) -> Iterator[Measurement]:
        """Seconds to build and run the first batch, and those of them before the first call.

        It is the first call at this batch size in a process that has trained, so libraries are
        loaded and memory is there. What compiles does so from empty caches.
        """
        size = first.batch_size
        for name, seconds in (
            ("first_inference", first.first_seconds),
            ("inference_build", first.build_seconds),
        ):
            labels: dict[str, Label] = {"batch_size": size, "after_training": True}
            yield self._found(name, "s", "lower", [seconds], **labels)

    def _outputs(self) -> Iterator[Measurement]:
        """How far from fp32 eager, at the batch size where it is farthest."""
        finite = all(math.isfinite(each.difference) for each in self._comparisons)
        trouble = Trouble(status="failed", reason="wrong outputs: a logit is not finite")
        self._trouble = self._agree(None if finite else trouble)
        difference = [max(each.difference for each in self._comparisons)]
        agreement = [min(each.agreement for each in self._comparisons)]
        samples = self._reference.samples
        for name, unit, better, values in (
            ("output_max_difference", "1", "lower", None if self._trouble else difference),
            ("output_agreement", "fraction", "higher", agreement),
        ):
            yield self._found(name, unit, cast(Better, better), values, samples=samples)

    @property
    def _shows(self) -> bool:
        """Whether torch sees what it runs."""
        return self._name in ("eager", "compiled")

    @property
    def _is_eager(self) -> bool:
        return self._name == "eager"

    def _found(
        self, name: str, unit: str, better: Better, values: list[float] | None, **labels: Label
    ) -> Measurement:
        """A measurement of this backend, or that there is none because of its trouble."""
        labels |= self._labels
        if values is not None:
            return self._subject.measurement(name, unit, better, values, **labels)
        assert self._trouble
        status, reason = self._trouble.status, self._trouble.reason
        return Measurement(
            name=name, unit=unit, better=better, labels=labels, status=status, reason=reason
        )


def _begin(factory: Factory, source: Source, images: Tensor) -> Started:
    """Build a backend and run the first batch, waited for."""
    synchronize(source.device)
    start = time.perf_counter()
    run = factory(source, images)
    built = time.perf_counter()
    run(images)
    synchronize(source.device)
    end = time.perf_counter()
    return Started(
        run=run, batch_size=len(images), build_seconds=built - start, first_seconds=end - start
    )


def _one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, without a terminal's colours."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
