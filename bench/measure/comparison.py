"""Whether a backend computes what the network computes: its logits against fp32 eager's."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.measure.backends import Run, Source, plain
from cifar.config import PRECISIONS
from cifar.precision import allow_tf32
from cifar.trainer import Trainer

COMPARED_SAMPLES = 256
"""Test images at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """What a backend has to reach to count as running the same network."""

    agreement: float
    """Least share of images with the same top-1."""
    difference: float
    """Greatest difference of a logit, as a share of the reference's greatest logit."""


EXACT = Floor(agreement=0.99, difference=1e-4)
"""For fp32: another order of summation moves logits by 1e-6 of the greatest, which turns only ties;
reduced arithmetic behind an fp32 name moves them by 5e-4 or more: TF32 does in ResNet-9 to 56. A
GPU's eager fp32 may do so too, see `Reference.floor`."""
REDUCED = Floor(agreement=0.9, difference=0.25)
"""For bf16, fp16 and tf32: rounding to 8 to 11 bits moves logits by about 1 % of the greatest in
ResNet-20; an untrained net has near ties, and agrees on 97 to 100 % of the images."""
OWN_DIFFERENCES = 2.0
"""How many of eager fp32's own differences an fp32 backend may have: it computes in a third way,
which may lie as far to the other side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A backend's logits against the reference's."""

    difference: float
    """Maximum absolute difference of a logit."""
    agreement: float
    """Share of images with the same top-1."""
    scale: float
    """The reference's greatest absolute logit."""

    @classmethod
    def of(cls, logits: Tensor, reference: Tensor) -> "Comparison":
        """Compare `[B, K]` with `[B, K]`."""
        same = logits.argmax(1) == reference.argmax(1)
        return cls(
            difference=(logits - reference).abs().max().item(),
            agreement=same.double().mean().item(),
            scale=reference.abs().max().item(),
        )

    def keeps(self, floor: Floor) -> bool:
        """Whether no logit differs by more than the floor allows; NaN is never less."""
        return self.difference <= floor.difference * self.scale

    def fault(self, floor: Floor) -> str:
        """Why the backend does not run this network; "" if it does."""
        if self.agreement < floor.agreement:
            return (
                f"wrong outputs: the same top-1 as fp32 eager on {self.agreement:.1%} of the "
                f"images, {floor.agreement:.0%} are due"
            )
        if not self.keeps(floor):
            return (
                f"wrong outputs: a logit differs by {self.difference:.3g} from fp32 eager's, whose "
                f"greatest is {self.scale:.3g}"
            )
        return ""


def not_reduced(found: Comparison, precision: str) -> str:
    """That outputs are fp32's though an autocast precision was asked for; "" if that is not so.

    Rounding to 8 or 11 bits moves some logit by more than another order of summation does.
    """
    if PRECISIONS[precision].autocast is None or not found.keeps(EXACT):
        return ""
    return (
        f"computes fp32 where {precision} was asked: no logit differs by more than "
        f"{found.difference:.3g} from fp32 eager's, whose greatest is {found.scale:.3g}"
    )


def floor_of(precision: str) -> Floor:
    """What a backend has to reach in the precision of that name."""
    chosen = PRECISIONS[precision]
    return REDUCED if chosen.autocast or chosen.tf32 else EXACT


class Reference:
    """Logits of the weights in fp32 eager, autocast and TF32 off, on the first test images."""

    def __init__(self, trainer: Trainer, source: Source) -> None:
        self._trainer = trainer
        self._source = replace(source, precision="fp32")
        self._own: dict[int, float] = {}
        self.samples = min(COMPARED_SAMPLES, len(trainer.test_images))

    @cached_property
    def logits(self) -> Tensor:
        """`[B, K]`; computed when first asked for, so that it warms nothing up before."""
        return self.exact(sample_images(self._trainer, self.samples))

    def exact(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` of normalised images `[B, C, H, W]`."""
        with _without_tf32(self._trainer):
            logits: Tensor = plain(self._source)(images)
        return logits

    def compare(self, run: Run, size: int) -> Comparison:
        """Run a backend on the same images, in batches of `size`."""
        starts = range(0, self.samples, size)
        # Cloned: CUDA graphs write every result to the same place.
        batches = [run(sample_images(self._trainer, size, start)).clone() for start in starts]
        return Comparison.of(torch.cat(batches)[: self.samples], self.logits)

    def floor(self, found: Comparison, precision: str, size: int) -> Floor:
        """What a backend had to reach of which this was `found` in batches of `size`.

        cuDNN tries algorithms out and takes others for other batch sizes, some of which (Winograd,
        FFT) round more. So where fp32 is further off than `EXACT`, eager fp32 itself is run in
        batches of that size, once, and the floor lies as many times as far as it is.
        """
        floor = floor_of(precision)
        if floor is not EXACT or found.keeps(floor):
            return floor
        if size not in self._own:
            own = self.compare(self.exact, size)
            self._own[size] = own.difference / own.scale
        return replace(floor, difference=max(floor.difference, OWN_DIFFERENCES * self._own[size]))


def sample_images(trainer: Trainer, size: int, start: int = 0) -> Tensor:
    """`size` normalised test images, `[size, C, H, W]`; from the first again after the last."""
    samples = torch.arange(start, start + size, device=trainer.device) % len(trainer.test_images)
    return trainer.test_images.batch(samples).images


@contextlib.contextmanager
def _without_tf32(trainer: Trainer) -> Iterator[None]:
    assert trainer.config.precision is not None, "a trainer has resolved it"
    allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(PRECISIONS[trainer.config.precision].tf32)
