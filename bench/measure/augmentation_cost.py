"""What every augmentation costs: how fast batches come with it alone."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from bench.measure.clock import Clock, HostClock, make_clock, synchronize, timed
from bench.measure.pipeline import pil_images, why_not
from bench.measure.subject import Subject
from bench.record import Label, Measurement
from cifar.config import AUGMENTATIONS, Recipe
from cifar.data.loader import TrainLoader
from cifar.distributed import barrier, least

NAME = "augmentation_throughput"
NONE, OWN = "none", "recipe"
"""Images as they are, and what the cell's recipe does to them, beside each augmentation's name."""
ALPHA = 1.0
"""Of a mixing that the recipe has off; its cost is that of any other."""
WARM_UP = 2
"""Steps before the clock starts, in which an epoch's draws are made."""
CASE_SECONDS = 0.5
"""For the timed steps of an augmentation; but `LEAST_STEPS` are taken."""
LEAST_STEPS = 3
PIL_IMAGES = 64
"""Images that torchvision is given, at most."""


def cases(recipe: Recipe) -> dict[str, Recipe]:
    """Recipes with one augmentation each, by its name; strengths are those of `recipe`."""
    plain = replace(recipe, augment=(), mixup=0.0, cutmix=0.0)
    return {
        NONE: plain,
        **{name: replace(plain, augment=(name,)) for name in AUGMENTATIONS},
        "mixup": replace(plain, mixup=recipe.mixup or ALPHA),
        "cutmix": replace(plain, cutmix=recipe.cutmix or ALPHA),
        OWN: recipe,
    }


def measure_augmentations(subject: Subject) -> Iterable[Measurement]:
    """Images per second with every augmentation alone, with none, and with the recipe's own set.

    - `source` "device": this program's loader, whole batches of the cell's size on its device, from
      the split to normalised images. `augmentation_headroom` is how many times as many images come
      as the cell's training consumes.
    - `source` "pil": torchvision's transforms of one PIL image after the other, to a normalised
      tensor, in one thread of every process, as each worker of a DataLoader would do it.
    """
    found: list[Measurement] = []
    with subject.watched("augmentations"):
        for name, recipe in cases(subject.trainer.config.recipe).items():
            found += _on_device(subject, name, recipe)
            found.append(_by_pil(subject, name, recipe))
    return found


def _on_device(subject: Subject, name: str, recipe: Recipe) -> tuple[Measurement, Measurement]:
    loader = subject.trainer.loader.with_recipe(recipe)
    clock = functools.partial(make_clock, subject.device)
    load = _loading(loader)
    seconds = _seconds(subject, load, subject.protocol.timed_steps, clock)
    labels: dict[str, Label] = {"augmentation": name, "source": "device"}
    measured = subject.measurement(
        NAME,
        "samples/s",
        "higher",
        seconds,
        samples_per_step=loader.global_batch_size,
        **labels,
    )
    assert measured.value is not None, "measured"
    headroom = Measurement(
        name="augmentation_headroom",
        unit="1",
        better="higher",
        labels={"augmentation": name},
        samples=((measured.value / subject.value("train_throughput"),),),
    )
    return measured, headroom


def _loading(loader: TrainLoader) -> Callable[[], None]:
    """Loads the next step's batches each time it is called."""
    steps = itertools.count()

    def load() -> None:
        loader.batches_of(next(steps))

    return load


def _by_pil(subject: Subject, name: str, recipe: Recipe) -> Measurement:
    labels: dict[str, Label] = {"augmentation": name, "source": "pil", "threads": 1}
    mixes = recipe.mixup or recipe.cutmix
    reason = "torchvision mixes batches, not PIL images" if mixes else ""
    reason = reason or why_not(subject.trainer, recipe)
    if reason:
        return Measurement(
            name=NAME,
            unit="samples/s",
            better="higher",
            labels=labels,
            status="absent",
            reason=reason,
        )
    images = pil_images(subject.trainer, recipe, PIL_IMAGES)
    numbers = itertools.cycle(range(PIL_IMAGES))
    with _one_thread():
        seconds = _seconds(subject, lambda: images[next(numbers)], PIL_IMAGES, HostClock)
    return subject.measurement(
        NAME,
        "samples/s",
        "higher",
        seconds,
        samples_per_step=subject.trainer.place.count,
        **labels,
    )


def _seconds(
    subject: Subject, work: Callable[[], object], most: int, make: Callable[[], Clock]
) -> list[float]:
    """Seconds of each time that some work is done; a collective call.

    That is `most` times, or as often as fits into `CASE_SECONDS` on every process.
    """
    for _ in range(WARM_UP):
        work()
    synchronize(subject.device)
    (pace,) = timed(make(), work, 1)
    fitting = max(LEAST_STEPS, int(CASE_SECONDS / pace))
    count = least(min(most, fitting), subject.device)
    barrier()
    return timed(make(), work, count)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes in a single thread, as in the workers of a DataLoader."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
