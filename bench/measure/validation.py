"""What a recipe reaches on images held out of the training split, epoch by epoch; nothing timed."""

import math
from collections.abc import Iterable, Sequence

from bench.measure.subject import Subject
from bench.measure.training import check_if_due
from bench.record import Label, Measurement
from bench.unfinished import no_validation
from cifar.errors import TrainingError
from cifar.evaluation import Evaluation
from cifar.trainer import Trainer


def measure_validation(subject: Subject) -> Iterable[Measurement]:
    """Train the recipe's epochs; top-1 and loss on the held-out images after each, and at the end.

    The first two steps are observed, see `bench.observe`. After every epoch but the last one the
    scores so far are told, and whoever reads them may end these processes. A training whose loss is
    not finite has reached nothing: that is what there is to know of its settings, and no failure.
    """
    trainer, epochs = subject.trainer, subject.trainer.config.recipe.epochs
    assert trainer.loader.steps_per_epoch >= 2, "see bench.tuning.check_images"
    subject.witness.before_window()
    subject.witness.after_window(0)
    scores: list[Evaluation] = []
    diverged = ""
    try:
        for epoch in range(1, epochs + 1):
            scores.append(_score_epoch(trainer, epoch))
            if epoch < epochs:
                subject.tell(_curve(scores))
    except TrainingError as error:
        diverged = str(error)
    yield from _curve(scores)
    if diverged:
        yield no_validation("diverged", diverged)
    else:
        yield from _reached(trainer, scores[-1])


def _score_epoch(trainer: Trainer, epoch: int) -> Evaluation:
    """Train to the end of an epoch, counted from 1, and score the held-out images.

    Raises:
        TrainingError: a loss was not finite, or too many steps of fp16 were skipped.
    """
    while trainer.step < epoch * trainer.loader.steps_per_epoch:
        trainer.train_step()
        check_if_due(trainer)
    trainer.check()
    assert trainer.validation_images is not None, "the recipe of a trial holds images out"
    result = trainer.evaluate(images=trainer.validation_images)
    if not math.isfinite(result.loss):
        raise TrainingError(f"loss: not finite on the validation images after epoch {epoch}")
    return result


def _curve(scores: Sequence[Evaluation]) -> list[Measurement]:
    """One value per epoch that has ended; nothing before the first one has."""
    if not scores:
        return []
    curves = (
        ("epoch_validation_top1", "fraction", tuple(each.top1 for each in scores)),
        ("epoch_validation_loss", "nats", tuple(each.loss for each in scores)),
    )
    return [
        Measurement(name=name, unit=unit, better="none", samples=(values,))
        for name, unit, values in curves
    ]


def _reached(trainer: Trainer, last: Evaluation) -> list[Measurement]:
    """After the last epoch; of the moving average of the weights where the recipe keeps one."""
    labels: dict[str, Label] = {
        "split": "validation",
        "weights": "average" if trainer.average else "last",
        "samples": last.samples,
        "trained_samples": trainer.samples_seen,
    }
    return [
        Measurement(
            name="validation_top1",
            unit="fraction",
            better="higher",
            labels=labels,
            samples=((last.top1,),),
        ),
        Measurement(
            name="validation_loss",
            unit="nats",
            better="lower",
            labels=labels,
            samples=((last.loss,),),
        ),
    ]
