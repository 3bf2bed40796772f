"""Scoring saved weights on a data set, outside of training."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from cifar.checkpoint import ModelCard
from cifar.data.config import DataConfig
from cifar.data.dataset import Dataset, Split
from cifar.data.division import divide
from cifar.data.loader import DeviceImages, Place, eval_batch_size, eval_batches
from cifar.data.sources import load_dataset
from cifar.data.test_set import read_test_set
from cifar.device_memory import explained
from cifar.errors import CheckpointError, ConfigError, DataError, UserError
from cifar.evaluation import Evaluation, evaluate
from cifar.models.meta import check_images
from cifar.network import few, load_network
from cifar.predictions import Predictions, calibrate, calibration_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """What to score weights on: a split of a data set, or a test set of the user's own.

    `data` is the data set that they were trained on where None. Of its training images `train` are
    those that the weights were trained on, and `validation` those that were held out.
    """

    data: DataConfig | None = None
    split: Literal["test", "train", "validation"] = "test"
    path: Path | None = None
    labels: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Images to score on; labels are zeros if `is_labelled` is not set."""

    name: str
    split: Split
    samples: tuple[str, ...]
    is_labelled: bool = True
    note: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Weights, what they are, and what they predict and score for which images.

    `precision` is the one they were scored in, `pixels` `[N, C, H, W]` the images, `samples` their
    names or numbers. There is no `evaluation` of images without labels.
    """

    weights: Path
    card: ModelCard
    precision: str
    images: str
    pixels: npt.NDArray[np.uint8]
    samples: tuple[str, ...]
    predictions: Predictions
    evaluation: Evaluation | None

    @property
    def averaged(self) -> bool:
        """Whether the weights are a moving average."""
        return self.card.averaged or self.weights.stem == "ema"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; needs an evaluation."""
        assert self.evaluation is not None, "of labelled images"
        return {
            **dataclasses.asdict(self.evaluation),
            "calibration_error": calibration_error(calibrate(self.predictions)),
            "classes": self.card.classes,
            "weights": str(self.weights),
            "averaged": self.averaged,
            "precision": self.precision,
            "images": self.images,
        }


def score(
    path: Path,
    images: Images,
    *,
    needs_labels: bool,
    batch_size: int | None,
    precision: str | None,
    cpu: bool,
) -> Scored:
    """Evaluate a checkpoint with the normalisation it was trained with.

    The precision is that of the training where None, the batch size one that fits any memory. Of
    other images than those of the training a line on stderr tells.

    Raises:
        CheckpointError: no weights there, or damaged, or the loss is not finite.
        DataError: the images' classes, channels or size are not the model's, or they have no labels
            although an accuracy is asked for.
        UnsupportedError: the device cannot run the precision.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    network = load_network(path, precision=precision, device=device)
    card = network.card
    found = _find(images, card)
    if needs_labels and not found.is_labelled:
        raise DataError(
            f"images: {images.path}: have no labels, so no accuracy; to write what is predicted "
            "give --predictions FILE or --report FOLDER, without --json"
        )
    if found.note:  # after the last check: an error is one line on stderr, not a second one
        print(found.note, file=sys.stderr)
    on_device = DeviceImages(
        found.split, card.normalization, device, channels_last=card.config.channels_last
    )
    size = batch_size or eval_batch_size(on_device, card.config.model)
    batches = eval_batches(on_device, size, Place())
    classes = len(card.classes)
    probabilities = torch.zeros(len(found.split), classes, device=device)
    what = f"model {card.config.model.label} with batch size {batch_size or len(on_device)}"
    with explained(what, "choose a smaller -b"):
        result = evaluate(
            network.logits, batches, num_classes=classes, device=device, probabilities=probabilities
        )
    if not (math.isfinite(result.loss) and bool(probabilities.isfinite().all())):
        raise CheckpointError(
            f"checkpoint: {network.file}: loss {result.loss} on these images: the weights are "
            "damaged, or their training diverged; give others"
        )
    labels = found.split.labels if found.is_labelled else None
    return Scored(
        weights=network.file,
        card=card,
        precision=network.precision,
        images=found.name,
        pixels=found.split.images,
        samples=found.samples,
        predictions=Predictions(probabilities=probabilities.cpu().numpy(), labels=labels),
        evaluation=result if found.is_labelled else None,
    )


def _find(images: Images, card: ModelCard) -> _Found:
    if images.path is not None:
        return _find_test_set(images.path, images.labels, card)
    dataset = _load(images.data, card)
    note = None
    if dataset.fingerprint() != card.fingerprint:
        note = (
            f"note: data: {dataset.name}: not the data set the weights were trained with, "
            f"{card.dataset} (fingerprint {card.fingerprint})"
        )
    split = dataset.test
    if images.split != "test":
        split = _of_training(dataset, images.split, card)
    samples = tuple(map(str, range(len(split))))
    name = dataset.name if images.split == "test" else f"{dataset.name} ({images.split})"
    return _Found(name=name, split=split, samples=samples, note=note)


def _of_training(dataset: Dataset, split: str, card: ModelCard) -> Split:
    """The images that a model with this card was trained on, or that were held out then."""
    config = card.config
    divided = divide(dataset, config.limit_train, config.recipe.validation)
    if split == "train":
        return divided.train
    if divided.validation is None:
        raise DataError(
            "split: 'validation': no images were held out when these weights were trained; give "
            "test or train"
        )
    return divided.validation


def _find_test_set(path: Path, labels: Path | None, card: ModelCard) -> _Found:
    shape = (card.config.model.in_channels, *card.image_size)
    resizes = card.config.model.resize is not None
    found = read_test_set(path, labels, card.classes, shape, any_size=resizes)
    zeros = np.zeros(len(found.images), dtype=np.int64)
    is_labelled = found.labels is not None
    split = Split(images=found.images, labels=zeros if found.labels is None else found.labels)
    return _Found(name=found.name, split=split, samples=found.samples, is_labelled=is_labelled)


def _load(data: DataConfig | None, card: ModelCard) -> Dataset:
    """The data set given, or the one the weights were trained on, if it suits them."""
    try:
        dataset = load_dataset(data or card.config.data)
    except UserError as error:
        if data is not None:
            raise
        raise DataError(
            f"{error} (the weights were trained on it; or name another --data)"
        ) from None
    own, asked = dataset.classes, card.classes
    if own != asked:
        raise DataError(
            f"data: {dataset.name}: its classes ({few(own, asked)}) are not those of the "
            f"checkpoint, {card.dataset} ({few(asked, own)}); choose other images with --data"
        )
    channels = dataset.train.images.shape[1]
    if channels != card.config.model.in_channels:
        raise DataError(
            f"data: {dataset.name}: {channels} channels, the checkpoint has "
            f"{card.config.model.in_channels}; choose other images with --data"
        )
    if card.config.model.library:
        height, width = dataset.train.images.shape[2:]
        try:
            check_images(card.config.model, (height, width), batch_size=2)
        except ConfigError:
            raise DataError(
                f"data: {dataset.name}: images of {height} x {width} pixels, which "
                f"{card.config.model.name} does not take; choose other images with --data"
            ) from None
    return dataset


MATRIX_CLASSES = 12
"""Most classes whose confusion matrix fits the width of a terminal."""


def render(scored: Scored) -> None:
    """Print the scores, the accuracy of each class and, if it fits, the confusion matrix.

    Of images without labels: what was scored, and how often each class was predicted.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=max(80, Console().width))  # a narrower one would empty columns
    console.print(_headline(scored), highlight=False, soft_wrap=True)
    card, result = scored.card, scored.evaluation
    if result is None:
        counts = np.bincount(scored.predictions.predicted, minlength=len(card.classes))
        table = Table("", "Class", title="Predictions without labels", box=SIMPLE_HEAD, padding=0)
        table.add_column("Predicted", justify="right", no_wrap=True)
        for number, (name, count) in enumerate(zip(card.classes, counts.tolist(), strict=True)):
            table.add_row(str(number), escape(name), str(count))
        console.print(table)
        return
    fits = len(card.classes) <= MATRIX_CLASSES
    title = "Accuracy of each true class" + (" and how often each was predicted for it" * fits)
    table = Table("", "Class", title=title, box=SIMPLE_HEAD, padding=0)
    numbers = map(str, range(len(card.classes) if fits else 0))
    for heading in ("Top-1 (%)", *numbers):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (name, accuracy) in enumerate(zip(card.classes, result.per_class, strict=True)):
        shown = "-" if accuracy is None else f"{accuracy * 100:.1f}"
        row = result.confusion[number] if fits else ()
        table.add_row(str(number), escape(name), shown, *map(str, row))
    console.print(table)
    if not fits:
        console.print("the confusion matrix: --json, or --report")


def _headline(scored: Scored) -> str:
    from rich.markup import escape

    card, result = scored.card, scored.evaluation
    lines = [
        f"{card.config.model.label}, trained on {escape(card.dataset)} for "
        f"{card.samples_seen:,} images in {card.config.precision}, scored in {scored.precision}",
        f"{'moving average of the weights' if scored.averaged else 'weights'}: "
        f"{escape(str(scored.weights))}",
    ]
    where = f"on {len(scored.predictions):,} images of {escape(scored.images)}"
    if result is not None:
        error = calibration_error(calibrate(scored.predictions))
        lines.append(
            f"top-1 {result.top1:.2%}  top-5 {result.top5:.2%}  loss {result.loss:.4f}  "
            f"calibration error {error:.2%}  {where}"
        )
    else:
        lines.append(where)
    return "\n".join(lines)
