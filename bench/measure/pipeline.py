"""The ceiling of the input pipeline: how fast batches come if nothing is done with them."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.measure.clock import make_clock, seconds_of, synchronize, timed
from bench.measure.subject import Subject
from bench.measure.training import PACE_STEPS, filling_steps
from bench.record import Label, Measurement
from cifar.config import Recipe
from cifar.distributed import barrier, least
from cifar.errors import CifarError
from cifar.process import available_cores
from cifar.trainer import Trainer

NAME = "input_throughput"
WARM_UP = 2
"""Steps before the clock starts, of batches that are made on the device."""
PREFETCH = 2
"""Batches that each worker of a DataLoader makes ahead: its default."""
MOST_WORKERS = 16
"""Of a DataLoader in each process, however many cores it has: each imports torch and takes its own
copy of the images, and one GPU is rarely given more."""
TIMEOUT = 120.0
"""Seconds to wait for a batch before a DataLoader counts as failed; its workers import torch."""

Result = TypeVar("Result")


def measure_pipeline(subject: Subject) -> Iterable[Measurement]:
    """Images per second of this program's loader, and of a DataLoader with PIL transforms.

    Both deliver augmented, normalised batches of the same size on the device, in the run's layout.
    Every process measures its share while the others measure theirs.
    """
    trainer = subject.trainer
    steps = itertools.count(trainer.step)

    def load() -> None:
        trainer.batches_of(next(steps))

    _warm_up(subject, load, WARM_UP)
    pace = seconds_of(lambda: _warm_up(subject, load, PACE_STEPS), subject.device) / PACE_STEPS
    count = least(filling_steps(subject.protocol, pace), subject.device)
    barrier()
    with subject.watched("pipeline") as monitor:
        seconds = timed(make_clock(subject.device), load, count, monitor.look)
    yield _measurement(subject, seconds, source="device")
    yield _measure_dataloader(subject)


def _warm_up(subject: Subject, load: Callable[[], None], steps: int) -> None:
    for _ in range(steps):
        load()
    synchronize(subject.device)


def _measurement(subject: Subject, seconds: list[float], **labels: Label) -> Measurement:
    labels["samples_per_step"] = subject.trainer.loader.global_batch_size
    return subject.measurement(NAME, "samples/s", "higher", seconds, **labels)


def _measure_dataloader(subject: Subject) -> Measurement:
    trainer = subject.trainer
    workers = max(1, min(MOST_WORKERS, available_cores() // trainer.place.count))
    labels: dict[str, Label] = {
        "source": "dataloader",
        "num_workers": workers,
        "most_workers": MOST_WORKERS,
    }

    def without(status: Literal["absent", "failed"], reason: str) -> Measurement:
        return Measurement(
            name=NAME,
            unit="samples/s",
            better="higher",
            labels=labels,
            status=status,
            reason=reason,
        )

    if reason := why_not(trainer, trainer.config.recipe):
        return without("absent", reason)
    try:
        return _measurement(subject, _dataloader_seconds(subject, workers), **labels)
    except _FailedError as error:
        return without("failed", str(error))


def why_not(trainer: Trainer, recipe: Recipe) -> str:
    """Why torchvision cannot do to a trainer's images what a recipe says, or nothing."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    _, channels, height, width = trainer.dataset.train.images.shape
    if channels not in (1, 3):
        return f"PIL has no images of {channels} channels"
    unknown = set(recipe.augment) - {CUTOUT, *_counterparts(recipe, (height, width))}
    return f"torchvision's part has no {', '.join(sorted(unknown))}" if unknown else ""


def _dataloader_seconds(subject: Subject, workers: int) -> list[float]:
    """Seconds per step of a DataLoader whose workers are busy before, within and after the window.

    Without the batches after it, those that were made ahead before it would count as its own.

    Raises:
        _FailedError: on every process, if the DataLoader of one gave up.
    """
    trainer, device = subject.trainer, subject.device
    accumulation = trainer.config.accumulation_steps
    ahead = PREFETCH * workers  # batches, so as many steps are enough
    steps = whole_rounds(subject.protocol.timed_steps, workers)
    loader = make_dataloader(trainer, (ahead + steps + ahead) * accumulation, workers)
    layout = torch.channels_last if trainer.config.channels_last else torch.contiguous_format
    batches = _together(lambda: iter(loader), device)

    def load() -> None:
        for images, targets in itertools.islice(batches, accumulation):
            images.to(device, non_blocking=True, memory_format=layout)
            targets.to(device, non_blocking=True)

    _together(lambda: _warm_up(subject, load, ahead), device)
    with subject.watched("DataLoader"):
        seconds = _together(lambda: timed(make_clock(device), load, steps), device)
    # At the end of the batches the workers are shut down.
    _together(lambda: _warm_up(subject, load, ahead + 1), device)
    return seconds


def whole_rounds(steps: int, workers: int) -> int:
    """Steps, as many at least, in which every worker delivers equally often; two rounds at least.

    Batches come in order, so all workers' in one burst, and then none until the next: a window that
    ends between two bursts would tell of a part of one.
    """
    return workers * max(2, math.ceil(steps / workers))


class _FailedError(CifarError):
    """A DataLoader gave up on one of the processes, so on all; the message says why."""


def _together(work: Callable[[], Result], device: torch.device) -> Result:
    """Do it on every process, and raise a _FailedError on all if it went wrong on one."""
    trouble = ""
    try:
        result = work()
    except (RuntimeError, OSError) as error:  # a worker died or hung, or none could be started
        trouble = " ".join(str(error).split()) or type(error).__name__
    if not least(int(not trouble), device):
        raise _FailedError(trouble or "the DataLoader of another process failed")
    return result


def make_dataloader(trainer: Trainer, count: int, workers: int) -> DataLoader[Any]:
    """`count` shuffled batches of one process, as PyTorch's examples for CIFAR make them.

    The recipe's augmentations, one PIL image at a time, by torchvision. The workers are new
    processes and not forks, which may hang if OpenMP or CUDA had been in use
    (https://docs.pytorch.org/docs/stable/notes/multiprocessing.html).
    """
    size = trainer.config.per_device_batch_size(trainer.place.count)
    return DataLoader(
        pil_images(trainer, trainer.config.recipe, count * size),
        batch_size=size,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        pin_memory=trainer.device.type == "cuda",
        timeout=TIMEOUT,
        multiprocessing_context="spawn",
    )


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images that are turned into PIL's, and these into tensors, one at a time.

    Args:
        images: uint8 `[N, H, W, 3]` or `[N, H, W]`.
        labels: int64 `[N]`.
        transform: from a PIL image to a tensor `[C, H, W]`.
        count: how many samples there are; after the last image comes the first one again.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        transform: Callable[[Image.Image], Tensor],
        count: int,
    ) -> None:
        self._images, self._labels, self._transform = images, labels, transform
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = index % len(self._labels)
        return self._transform(Image.fromarray(self._images[place])), int(self._labels[place])


def pil_images(trainer: Trainer, recipe: Recipe, count: int) -> PilImages:
    """`count` training images in random order, all of them once before any comes again.

    They are augmented as the recipe says. Only these travel to the workers, each of them once, and
    not the whole split.
    """
    from torchvision import transforms

    split = trainer.dataset.train
    random = np.random.RandomState(trainer.config.seed)
    chosen = random.permutation(len(split))[:count]
    images = split.images[chosen].transpose(0, 2, 3, 1)
    if images.shape[-1] == 1:
        images = images[..., 0]
    counterparts = _counterparts(recipe, images.shape[1:3])
    transform = transforms.Compose(
        [
            *(counterparts[name] for name in recipe.augment if name != CUTOUT),
            transforms.ToTensor(),
            *([_erasing(recipe, images.shape[1:3])] if CUTOUT in recipe.augment else []),
            transforms.Normalize(trainer.normalization.mean, trainer.normalization.std),
        ]
    )
    return PilImages(np.ascontiguousarray(images), split.labels[chosen], transform, count)


CUTOUT = "cutout"


def _erasing(recipe: Recipe, size: tuple[int, int]) -> Callable[[Any], Any]:
    """A square of the recipe's side in images of this height and width, always."""
    from torchvision import transforms

    share = min(1.0, recipe.cutout_size**2 / math.prod(size))
    erasing: Callable[[Any], Any] = transforms.RandomErasing(
        p=1.0, scale=(share, share), ratio=(1.0, 1.0)
    )
    return erasing


def _counterparts(recipe: Recipe, size: tuple[int, int]) -> dict[str, Callable[[Any], Any]]:
    """torchvision's transforms of PIL images of this height and width, by our names.

    It has no alternating flip; a random one costs the same. Its `RandomErasing` of tensors stands
    for cutout, and so comes after the others.
    """
    from torchvision import transforms

    mode = "reflect" if recipe.crop_fill == "reflect" else "constant"
    return {
        "crop": transforms.RandomCrop(size, padding=recipe.crop_padding, padding_mode=mode),
        "flip": transforms.RandomHorizontalFlip(),
        "alternating-flip": transforms.RandomHorizontalFlip(),
        "rotate": transforms.RandomRotation(recipe.rotate_degrees),
        "color-jitter": transforms.ColorJitter(*[recipe.jitter] * 3, recipe.hue),
        "auto-augment": transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
        "rand-augment": transforms.RandAugment(recipe.rand_operations, recipe.rand_magnitude),
        "trivial-augment": transforms.TrivialAugmentWide(),
    }
