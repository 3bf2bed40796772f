"""Scoring saved weights on a data set, outside of training."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar.accelerator import allow_tf32, check_supported
from cifar.checkpoint import ModelCard, Tensors, find_weights, load_into, load_weights
from cifar.config import PRECISIONS
from cifar.data.config import DataConfig
from cifar.data.dataset import Dataset
from cifar.data.loader import DeviceImages, Place, eval_batch_size, eval_batches
from cifar.data.sources import load_dataset
from cifar.emulation import emulate_if_needed
from cifar.errors import CheckpointError, DataError, UserError
from cifar.evaluation import Evaluation, evaluate
from cifar.memory import explained
from cifar.models import build_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Weights, what they are, and what they score; `precision` is the one they were scored in."""

    weights: Path
    card: ModelCard
    precision: str
    evaluation: Evaluation

    @property
    def averaged(self) -> bool:
        """Whether the weights are a moving average."""
        return self.card.averaged or self.weights.stem == "ema"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **dataclasses.asdict(self.evaluation),
            "classes": self.card.classes,
            "weights": str(self.weights),
            "averaged": self.averaged,
            "precision": self.precision,
        }


def score(
    path: Path,
    data: DataConfig | None,
    *,
    split: str,
    batch_size: int | None,
    precision: str | None,
    cpu: bool,
) -> Scored:
    """Evaluate a checkpoint with the normalisation it was trained with.

    Data and precision are those it was trained with where None, the batch size is training's. Of a
    data set with other images than that a line on stderr tells.

    Raises:
        CheckpointError: no weights there, or damaged, or the loss is not finite.
        DataError: the data set's classes or channels are not the model's.
        UnsupportedError: the device cannot run the precision.
    """
    file = find_weights(path)
    card, weights = load_weights(file)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    name = precision or card.config.precision
    assert name is not None, "a card's is resolved"
    check_supported(name, device)
    allow_tf32(PRECISIONS[name].tf32)
    dataset = _load(data, card)
    module = _module(card, weights, str(file)).to(device)
    emulate_if_needed(module, name, device)
    _tell_of_other_images(dataset, card)
    images = DeviceImages(
        dataset.test if split == "test" else dataset.train,
        card.normalization,
        device,
        channels_last=card.config.channels_last,
    )
    size = batch_size or eval_batch_size(images)
    batches = eval_batches(images, size, Place())
    what = f"model {card.config.model.label} with batch size {size}"
    with explained(what, "choose a smaller -b"), _autocast(name, device):
        result = evaluate(module, batches, num_classes=len(card.classes), device=device)
    if not math.isfinite(result.loss):
        raise CheckpointError(
            f"checkpoint: {file}: loss {result.loss} on these images: the weights are damaged, or "
            "their training diverged; give others"
        )
    return Scored(weights=file, card=card, precision=name, evaluation=result)


def _module(card: ModelCard, weights: Tensors, source: str) -> nn.Module:
    """The network with these weights, in the memory format that it was trained in."""
    module = build_model(card.config.model).eval()
    load_into(module, weights, source)
    return module.to(memory_format=torch.channels_last) if card.config.channels_last else module


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    """What autocasts as a precision does, to nothing where it does not."""
    name = PRECISIONS[precision].autocast
    dtype = getattr(torch, name) if name else torch.float32
    return torch.autocast(device.type, dtype, enabled=name is not None)


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
    if dataset.classes != card.classes:
        raise DataError(
            f"data: {dataset.name}: its classes ({_few(dataset.classes)}) are not those of the "
            f"checkpoint, {card.dataset} ({_few(card.classes)}); choose other images with --data"
        )
    channels = dataset.train.images.shape[1]
    if channels != card.config.model.in_channels:
        raise DataError(
            f"data: {dataset.name}: {channels} channels, the checkpoint has "
            f"{card.config.model.in_channels}; choose other images with --data"
        )
    return dataset


def _tell_of_other_images(dataset: Dataset, card: ModelCard) -> None:
    """Call it after the last check: an error is one line on stderr, not a second one."""
    if dataset.fingerprint() != card.fingerprint:
        print(
            f"note: data: {dataset.name}: not the data set the weights were trained with, "
            f"{card.dataset} (fingerprint {card.fingerprint})",
            file=sys.stderr,
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")


MATRIX_CLASSES = 12
"""Most classes whose confusion matrix fits the width of a terminal."""


def render(scored: Scored) -> None:
    """Print the scores, the accuracy of each class and, if it fits, the confusion matrix."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    card, result = scored.card, scored.evaluation
    console = Console(width=max(80, Console().width))  # a narrower one would empty columns
    console.print(
        f"{card.config.model.label}, trained on {escape(card.dataset)} for "
        f"{card.samples_seen:,} images in {card.config.precision}, scored in {scored.precision}\n"
        f"{'moving average of the weights' if scored.averaged else 'weights'}: "
        f"{escape(str(scored.weights))}\ntop-1 {result.top1:.2%}  top-5 {result.top5:.2%}  "
        f"loss {result.loss:.4f}  on {result.samples:,} images",
        highlight=False,
        soft_wrap=True,
    )
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
        console.print("the confusion matrix: --json")
