"""Scoring saved weights on a data set, outside of training."""

from pathlib import Path

import torch

from cifar.accelerator import allow_tf32, check_supported
from cifar.checkpoint import ModelCard, load_into, load_weights
from cifar.config import PRECISIONS, DataConfig, parse_data
from cifar.data.loader import DeviceImages, Place, eval_batches
from cifar.data.sources import load_dataset
from cifar.errors import ConfigError, DataError
from cifar.evaluation import Evaluation, evaluate
from cifar.models import build_model


def score(
    path: Path,
    data: DataConfig | None,
    *,
    split: str,
    batch_size: int,
    precision: str | None,
    cpu: bool,
) -> tuple[ModelCard, Evaluation]:
    """Evaluate a checkpoint with the normalisation it was trained with.

    Data and precision are those it was trained with where None.

    Raises:
        CheckpointError: no weights there, or damaged.
        DataError: the data set's classes or channels are not the model's.
    """
    card, weights = load_weights(path)
    dataset = load_dataset(data or _trained_on(card))
    if dataset.classes != card.classes:
        raise DataError(
            f"data: {dataset.name}: its classes ({_few(dataset.classes)}) are not those of the "
            f"checkpoint, {card.dataset} ({_few(card.classes)}); choose other images with --data"
        )
    images = dataset.test if split == "test" else dataset.train
    if images.images.shape[1] != card.model.in_channels:
        raise DataError(
            f"data: {dataset.name}: {images.images.shape[1]} channels, the checkpoint has "
            f"{card.model.in_channels}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    name = precision or card.precision
    check_supported(name, device)
    formats = PRECISIONS[name]
    allow_tf32(formats.tf32)
    module = build_model(card.model).to(device).eval()
    load_into(module, weights, str(path))
    if card.channels_last:
        module = module.to(memory_format=torch.channels_last)
    on_device = DeviceImages(images, card.normalization, device, channels_last=card.channels_last)
    autocast = getattr(torch, formats.autocast) if formats.autocast else torch.float32
    with torch.autocast(device.type, autocast, enabled=formats.autocast is not None):
        result = evaluate(
            module,
            eval_batches(on_device, batch_size, Place()),
            num_classes=len(card.classes),
            device=device,
        )
    return card, result


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")


MATRIX_CLASSES = 12
"""Most classes whose confusion matrix fits the width of a terminal."""


def _trained_on(card: ModelCard) -> DataConfig:
    if card.dataset not in ("shapes", "cifar10", "cifar100"):
        raise ConfigError(
            f"data: the checkpoint was trained on {card.dataset}; say where with --data"
        )
    return parse_data(card.dataset)


def render(card: ModelCard, result: Evaluation) -> None:
    """Print the scores, the accuracy of each class and, if it fits, the confusion matrix."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"{card.model.label}, trained on {escape(card.dataset)} for {card.samples_seen:,} images "
        f"in {card.precision}\ntop-1 {result.top1:.2%}  top-5 {result.top5:.2%}  "
        f"loss {result.loss:.4f}  on {result.samples:,} images",
        highlight=False,
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
