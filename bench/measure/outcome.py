"""What a cell's weights are worth and how large they are."""

from collections.abc import Iterable
from typing import cast

from safetensors.torch import save

from bench.measure.subject import Better, Subject
from bench.record import Label, Measurement


def measure_accuracy(subject: Subject) -> Iterable[Measurement]:
    """Top-1, top-5 and loss on the whole test split, after the budget.

    Of the moving average of the weights where the recipe keeps one, else of the last ones.
    """
    trainer = subject.trainer
    if not subject.protocol.train_samples:
        reason = "not trained: the protocol's training budget is 0 samples"
        yield Measurement(
            name="top1", unit="fraction", better="higher", status="absent", reason=reason
        )
        return
    result = trainer.evaluate()
    labels: dict[str, Label] = {
        "split": "test",
        "weights": "average" if trainer.average else "last",
        "samples": result.samples,
        "trained_samples": trainer.samples_seen,
    }
    for name, unit, better, value in (
        ("top1", "fraction", "higher", result.top1),
        ("top5", "fraction", "higher", result.top5),
        ("test_loss", "nats", "lower", result.loss),
    ):
        yield Measurement(
            name=name, unit=unit, better=cast(Better, better), labels=labels, samples=((value,),)
        )


def measure_size(subject: Subject) -> Iterable[Measurement]:
    """Parameters, and the bytes of the weights alone as a safetensors file."""
    trainer = subject.trainer
    count = sum(parameter.numel() for parameter in trainer.bare.parameters())
    weights = {name: tensor.cpu().contiguous() for name, tensor in trainer.eval_weights().items()}
    for name, unit, value in (
        ("param_count", "1", count),
        ("checkpoint_bytes", "bytes", len(save(weights))),
    ):
        yield Measurement(name=name, unit=unit, better="lower", samples=((float(value),),))
