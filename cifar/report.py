"""What a training, a range test or an evaluation leaves for people: pictures and their numbers.

Everything is made as bytes by file name, then written; every picture has a CSV or JSON file that
holds what it shows, of the same name but for the curves, which are those of `metrics.csv`.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar import figures
from cifar.comparison import Comparison
from cifar.config import ModelConfig, TrainConfig
from cifar.errors import ConfigError
from cifar.evaluation import Evaluation
from cifar.files import write_atomic
from cifar.models.summary import summarize_model, summary_text
from cifar.predictions import Predictions, calibrate, calibration_error
from cifar.range_test import Curve, suggested
from cifar.serialize import to_dict

Files = dict[str, bytes]
"""Contents by name."""


def training_files(
    metrics: Sequence[Mapping[str, Any]], model: ModelConfig, image_size: tuple[int, int], what: str
) -> Files:
    """The curves of a run's epochs, and the layers of its model; `what` was trained on what."""
    summary = summarize_model(model, image_size)
    return {
        "metrics.csv": _csv(list(metrics[0]), [line.values() for line in metrics]),
        "curves.png": figures.curves(metrics, what),
        "layers.csv": _table(summary.to_rows()),
        "layers.png": figures.text_page(summary_text(summary)),
    }


def comparison_files(comparison: Comparison) -> Files:
    """The run as a row of the suite's table."""
    return {
        "comparison.csv": comparison.to_csv().encode(),
        "comparison.md": comparison.to_markdown().encode(),
    }


def range_test_files(
    curve: Curve, config: TrainConfig, found: TrainConfig | None, what: str
) -> Files:
    """The curve of a range test of `config`, and what is `found`: the same with another rate."""
    summary = {
        "suggested": None if found is None else suggested(found),
        **asdict(curve.test),
        "steps_taken": len(curve.losses),
        "is_broken": curve.is_broken,
        "loss_of_guessing": curve.guess,
        "config": to_dict(config),
    }
    rows = enumerate(zip(curve.lrs, curve.losses, curve.smoothed, strict=True), start=1)
    lr = None if found is None else found.recipe.lr
    picture = figures.range_test(curve, lr, what)
    return {
        "lr-find.json": _json(summary),
        "lr-find.csv": _csv(["step", "lr", "loss", "smoothed"], [[n, *row] for n, row in rows]),
        "lr-find.png": picture,
    }


def evaluation_files(
    result: Evaluation | None,
    predictions: Predictions,
    *,
    images: npt.NDArray[np.uint8],
    samples: Sequence[str],
    classes: tuple[str, ...],
    what: str,
) -> Files:
    """What is predicted, and if there are labels scores, confusion, classes and calibration.

    `predictions`, `images` `[N, C, H, W]` and `samples`, their names, are in one order; `what`
    was scored on what.
    """
    count = f"{len(predictions):,} images"
    title = f"{what}\n" + (f"top-1 {result.top1:.2%} of {count}" if result else count)
    files = {
        "predictions.csv": predictions_csv(predictions, classes, samples),
        "predictions.png": figures.prediction_grid(images, predictions, classes, title),
    }
    return files if result is None else files | _scores(result, predictions, classes, title)


def _scores(
    result: Evaluation, predictions: Predictions, classes: tuple[str, ...], title: str
) -> Files:
    confusion = np.array(result.confusion, dtype=np.int64)
    bins = calibrate(predictions)
    by_class = [
        {"class": name, "samples": sum(row), "top1": accuracy}
        for name, row, accuracy in zip(classes, result.confusion, result.per_class, strict=True)
    ]
    scores = {
        "samples": result.samples,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "calibration_error": calibration_error(bins),
    }
    return {
        "scores.json": _json(scores),
        "confusion.csv": _csv(["true class", *classes], _named(classes, confusion.tolist())),
        "confusion.png": figures.confusion(confusion, classes, title),
        "classes.csv": _table(by_class),
        "classes.png": figures.class_accuracy(result.per_class, classes, title),
        "calibration.csv": _table([asdict(each) for each in bins]),
        "calibration.png": figures.calibration(bins, title),
    }


def predictions_csv(
    predictions: Predictions, classes: Sequence[str], samples: Sequence[str]
) -> bytes:
    """A line per sample: its name, its true class if known, what is predicted, and how surely."""
    labels = predictions.labels
    truths = [[]] * len(samples) if labels is None else [[classes[label]] for label in labels]
    head = ["sample", *([] if labels is None else ["true"]), "predicted", "confidence"]
    rows = [
        [sample, *truth, classes[predicted], f"{confidence:.6f}"]
        for sample, truth, predicted, confidence in zip(
            samples, truths, predictions.predicted, predictions.confidence, strict=True
        )
    ]
    return _csv(head, rows)


def _named(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[name, *row] for name, row in zip(names, rows, strict=True)]


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows that have the same columns, at least one."""
    return _csv(list(rows[0]), [row.values() for row in rows])


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _csv(head: Sequence[str], rows: Sequence[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")  # names of files need not be UTF-8


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, which is made if need be; each is whole or absent.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)


def put_files(name: str, folder: Path, files: Mapping[str, bytes]) -> None:
    """`write_files` where a user asked for them with the option `name`.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        write_files(folder, files)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); give another place"
        raise ConfigError(f"{name}: {str(folder)!r}: {reason}") from None
