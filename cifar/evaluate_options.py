"""The command `cifar evaluate`: its options, and what it prints and writes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cifar.cli import parse
from cifar.config import PrecisionName, require
from cifar.data.config import DataOption
from cifar.files import check_place, user_path
from cifar.process import ensure_environment
from cifar.ranks import world_size
from cifar.weights import find_weights

if TYPE_CHECKING:
    from cifar.scoring import Scored

arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """Options of `cifar evaluate`."""

    checkpoint: tyro.conf.Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """A run, a checkpoint folder, or the model.safetensors or ema.safetensors in one."""
    data: DataOption | None = None
    """Images to evaluate on; those that the weights were trained on when not given."""
    split: Literal["test", "train", "validation"] = "test"
    """Which of its splits; validation: the training images that were held out."""
    images: Annotated[str | None, arg(metavar="PATH")] = None
    """A test set of your own instead, with labels or without: an .npz or .npy file, or a folder."""
    labels: Annotated[str | None, arg(metavar="FILE")] = None
    """Labels of images in an .npy file, in another one."""
    report: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Write pictures and tables there: confusion, classes, calibration, predictions."""
    predictions: Annotated[str | None, arg(metavar="FILE")] = None
    """Write a CSV file with the prediction for every image."""
    batch_size: Annotated[int | None, arg(aliases=("-b",))] = None
    """Images per forward pass; 500 of 32 x 32 pixels, or as many pixels, when not given."""
    precision: PrecisionName | None = None
    """Number format; the one the weights were trained in when not given."""
    cpu: bool = False
    """Run on the CPU although there is a GPU."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        size, images = self.batch_size, self.images
        require(size is None or size >= 1, "batch-size", size, "give 1 or more")
        is_alone = images is None or (self.data is None and self.split == "test")
        require(is_alone, "images", images, "are instead of --data and --split; leave those out")
        remedy = "are of images in an .npy file; name those with --images"
        require(self.labels is None or images is not None, "labels", self.labels, remedy)


def run_evaluate(argv: list[str]) -> int:
    """`cifar evaluate CHECKPOINT`."""
    options = parse(
        EvaluateOptions,
        argv,
        prog="cifar evaluate",
        description="Report top-1, top-5, loss, calibration, per-class accuracy and the confusion "
        "matrix; in one process, without a launcher.",
        example="cifar evaluate runs/train/resnet18-cifar10-20260101-120000 --json",
    )
    started = world_size(os.environ)
    remedy = "evaluate runs in one process; start it without a launcher"
    require(started == 1, "processes", started, remedy)
    file = find_weights(user_path(options.checkpoint, "checkpoint"))
    _check_places(options)
    ensure_environment()
    from cifar.scoring import Images, render, score

    images = Images(
        data=options.data,
        split=options.split,
        path=_path(options.images, "images"),
        labels=_path(options.labels, "labels"),
    )
    scored = score(
        file,
        images,
        needs_labels=options.json or (options.predictions is None and options.report is None),
        batch_size=options.batch_size,
        precision=options.precision,
        cpu=options.cpu,
    )
    _write(scored, options)
    if options.json:
        print(json.dumps(scored.to_dict(), allow_nan=False))
    else:
        render(scored)
    return 0


def _path(text: str | None, name: str) -> Path | None:
    return None if text is None else user_path(text, name)


def _check_places(options: EvaluateOptions) -> None:
    """Raise a ConfigError if what is asked for cannot be written, before anything is scored."""
    if options.predictions is not None:
        check_place("predictions", user_path(options.predictions, "predictions"))
    if options.report is not None:
        check_place("report", user_path(options.report, "report"), is_folder=True)


def _write(scored: "Scored", options: EvaluateOptions) -> None:
    """The files that were asked for."""
    from cifar.report import evaluation_files, predictions_csv, put_files

    classes = scored.card.classes
    if options.predictions is not None:
        path = user_path(options.predictions, "predictions")
        content = predictions_csv(scored.predictions, classes, scored.samples)
        put_files("predictions", path.parent, {path.name: content})
    if options.report is not None:
        what = f"{scored.card.config.model.label} on {scored.images}"
        files = evaluation_files(
            scored.evaluation,
            scored.predictions,
            images=scored.pixels,
            samples=scored.samples,
            classes=classes,
            what=what,
        )
        put_files("report", user_path(options.report, "report"), files)
