"""The commands of the program `cifar`: train, find a learning rate, evaluate, summarize and so on.

Torch is imported only by the commands that compute, after their options have been read.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar import restart, run_folder
from cifar.cli import Command, parse, run_program
from cifar.config import MOST_PIXELS, ModelConfig, RunConfig, require
from cifar.data.config import DATA_HELP, DataConfig, DataOption, Published
from cifar.errors import ConfigError
from cifar.evaluate_options import run_evaluate
from cifar.files import user_path
from cifar.lr_find_options import run_lr_find
from cifar.process import ensure_environment, run_to_end
from cifar.range_test import RangeTest
from cifar.ranks import is_first, world_size
from cifar.recipes import get_recipe
from cifar.signals import end_with_launcher
from cifar.strategy import launched_strategy
from cifar.train_options import TrainOptions, read_train_options

arg = tyro.conf.arg

SUMMARY = """\
Train and evaluate CIFAR ResNets, on one device or, under accelerate launch, on many.

examples:
  cifar train --model resnet20 --data shapes --epochs 3
  cifar download cifar10
  cifar train --model resnet18 --data cifar10 --precision bf16 --channels-last
  accelerate launch --config_file launch/ddp.yaml --num_processes 8 -m cifar train --model resnet50
  cifar train --resume runs/train/resnet18-cifar10-20260101-120000
  cifar lr-find --model resnet18 --data cifar10
  cifar evaluate runs/train/resnet18-cifar10-20260101-120000
  cifar summary resnet50
  cifar show-augmentation default --data cifar10
"""


def run_train(argv: list[str]) -> int:
    """`cifar train`."""
    end_with_launcher(os.environ)  # before all that takes long, in which the launcher may end
    options = read_train_options(argv)
    if options.folder is not None:
        stored = run_folder.read_config(options.folder)
        run_folder.check_same(stored, options.train, options.run, options.folder)
    ensure_environment()
    with _owned_folder(options) as folder:
        _train(options, folder)
    return 0


def _train(options: TrainOptions, folder: Path | None) -> None:
    from cifar.run import train

    result = train(
        options.train,
        options.run,
        folder,
        resume="auto" if options.is_auto else options.resume is not None,
        range_test=RangeTest() if options.finds_lr else None,
    )
    if is_first(os.environ):
        print(
            f"top-1 {result.top1:.2%} on {result.samples:,} test images; weights in {folder}/final"
        )


@contextlib.contextmanager
def _owned_folder(options: TrainOptions) -> Iterator[Path | None]:
    """The folder of the run, which the first process alone makes, locks and writes.

    The others read a run to resume; of a new one they know no folder.
    """
    if options.is_auto:
        assert options.run.output_dir is not None, "was required"
        folder = user_path(options.run.output_dir, "output-dir")
        taken: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if is_first(os.environ):
            taken = restart.taken_up(folder, options.train, options.run, finds_lr=options.finds_lr)
        with taken:
            yield folder
        return
    if options.folder is not None:
        first = is_first(os.environ)
        with run_folder.resumed(options.folder) if first else contextlib.nullcontext():
            yield options.folder
    elif is_first(os.environ):
        with run_folder.created(options.train, options.run.output_dir) as new:
            yield new
    else:
        yield None


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryOptions:
    """Options of `cifar summary`."""

    name: tyro.conf.Positional[Annotated[str, arg(metavar="MODEL")]]
    """An architecture, e.g. resnet18, resnet18-w16 or torchvision:resnet50."""
    width: int | None = None
    """Channels of the first stage."""
    dropout: float = 0.0
    """Probability of dropping a feature before the classifier."""
    squeeze_excitation: bool = False
    """Reweight the channels at the end of every block."""
    resize: int | None = None
    """Pixels each way that images are resized to first."""
    num_classes: int = 10
    """Classes to tell apart."""
    image_size: int = 32
    """Height and width of the images in pixels."""


def run_summary(argv: list[str]) -> int:
    """`cifar summary MODEL`."""
    options = parse(
        SummaryOptions,
        argv,
        prog="cifar summary",
        description="Print the layers of a model: output, receptive field, parameters, "
        "multiply-adds.",
        example="cifar summary resnet50 --num-classes 100",
    )
    fields: dict[str, Any] = dataclasses.asdict(options)
    size = fields.pop("image_size")
    require(1 <= size <= MOST_PIXELS, "image-size", size, f"give 1 to {MOST_PIXELS}")
    config = ModelConfig(**fields)
    config.check_installed()
    from cifar.models.summary import print_summary

    print_summary(config, (size, size))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowOptions:
    """Options of `cifar show-augmentation`."""

    recipe: tyro.conf.Positional[Annotated[str, arg(metavar="[RECIPE]")]] = "default"
    """A named recipe."""
    augment: tuple[str, ...] | None = None
    """Augmentations to show instead of the recipe's, in order; `--augment` alone: none."""
    mixup: float | None = None
    """Mix the images in proportions from Beta(mixup, mixup), instead of as the recipe does."""
    cutmix: float | None = None
    """Paste parts of them into others, with shares from Beta(cutmix, cutmix)."""
    data: Annotated[DataOption, arg(help=DATA_HELP)] = field(default=DataConfig())
    images: int = 8
    """Rows: the first training images."""
    epochs: int = 10
    """Columns after the image itself: the first epochs of a training."""
    seed: int = 0
    """Of the training."""
    output: str | None = None
    """PNG file to write; augmentation-RECIPE.png when not given."""


def run_show(argv: list[str]) -> int:
    """`cifar show-augmentation [RECIPE]`."""
    options = parse(
        ShowOptions,
        argv,
        prog="cifar show-augmentation",
        description="Write a picture of what a recipe's augmentation makes of training images.",
        example="cifar show-augmentation sgd --augment crop flip trivial-augment",
    )
    recipe = get_recipe(options.recipe)
    for name in ("augment", "mixup", "cutmix"):
        if (value := getattr(options, name)) is not None:
            recipe = dataclasses.replace(recipe, **{name: value})
    for name in ("images", "epochs"):
        value = getattr(options, name)
        require(1 <= value <= MOST_SHOWN, name, value, f"give 1 to {MOST_SHOWN}")
    default = f"augmentation-{recipe.name}.png"
    path = user_path(default if options.output is None else options.output, "output")
    from cifar.data.gallery import gallery
    from cifar.data.sources import load_dataset

    train = load_dataset(options.data).train
    picture = gallery(recipe, train, count=options.images, epochs=options.epochs, seed=options.seed)
    try:
        path.write_bytes(picture)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); give another file"
        raise ConfigError(f"output: {str(path)!r}: {reason}") from None
    print(path)
    return 0


MOST_SHOWN = 100
"""Rows and columns of a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadOptions:
    """Options of `cifar download`."""

    name: tyro.conf.Positional[Published]
    """Data set."""
    directory: str | None = None
    """Where to put it; the default folder is where --data cifar10 and the others look."""


def run_download(argv: list[str]) -> int:
    """`cifar download NAME`."""
    options = parse(
        DownloadOptions,
        argv,
        prog="cifar download",
        description="Download a data set with its checksum verified; continues where it stopped.",
        example="cifar download cifar10 --directory ~/images",
    )
    from cifar.data.download import download
    from cifar.data.sources import default_data_dir

    asked = options.directory
    directory = default_data_dir() if asked is None else user_path(asked, "directory")
    print(download(options.name, directory))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MeetOptions:
    """Options of `cifar meet`."""

    cpu: bool = False
    """Meet by the network of the machines alone (gloo), although there are GPUs (NCCL)."""
    meeting_timeout: float = 45.0
    """Seconds that the processes may start apart."""


def run_meet(argv: list[str]) -> int:
    """`cifar meet`."""
    options = parse(
        MeetOptions,
        argv,
        prog="cifar meet",
        description="Check that processes which are started like this one find each other; where "
        "they do not, a line says why. Start it as you would start a training.",
        example="RANK=0 WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 cifar meet --cpu",
    )
    from cifar.accelerator import join_job
    from cifar.distributed import leave

    run = RunConfig(cpu=options.cpu, meeting_timeout=options.meeting_timeout)
    join_job(None, run, strategy=launched_strategy(os.environ))
    if is_first(os.environ):
        print(f"all {world_size(os.environ)} have met")
    leave()
    return 0


COMMANDS = {
    "train": Command(help="train a model, or resume a run", run=run_train),
    "lr-find": Command(help="suggest a learning rate by a range test", run=run_lr_find),
    "evaluate": Command(help="score saved weights on a test split", run=run_evaluate),
    "meet": Command(help="check that processes find each other", run=run_meet),
    "summary": Command(help="print the layer table of a model", run=run_summary),
    "show-augmentation": Command(help="picture what a recipe makes of images", run=run_show),
    "download": Command(help="fetch CIFAR-10, CIFAR-100 or Tiny ImageNet", run=run_download),
}


def main() -> int:
    """Run the command that is named; returns the exit code."""
    return run_to_end(lambda: run_program("cifar", SUMMARY, COMMANDS))
