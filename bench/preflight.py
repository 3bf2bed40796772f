"""What is looked at before any worker is started, so that a long run does not fail for it."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.launchers import environment_for
from bench.present import check_model, present_environment
from bench.record import Environment
from bench.repeats import Fingerprints
from bench.spec import Task
from cifar.config import require
from cifar.cost import check_batch
from cifar.data.config import DataConfig

SHAPES_TRAIN_IMAGES = 10_000
"""Of the embedded data set, which nothing can be wrong with: it need not be drawn to check it."""
SHAPES_SIZE = (32, 32)
"""Height and width of its images."""


class Examined(NamedTuple):
    """A data set: how many training images of which height and width, with how many channels, and
    its fingerprint, which is empty of the embedded one: the code alone determines that."""

    images: int
    size: tuple[int, int]
    channels: int
    fingerprint: str


def examine(data: DataConfig) -> Examined:
    """Read a data set, but for the embedded one.

    Raises:
        DataError: it is missing, damaged or of the wrong form.
    """
    if data.source == "shapes":
        return Examined(SHAPES_TRAIN_IMAGES, SHAPES_SIZE, 3, "")
    from cifar.data.sources import load_dataset

    dataset = load_dataset(data)
    channels, height, width = dataset.train.images.shape[1:]
    return Examined(len(dataset.train), (height, width), channels, dataset.fingerprint())


def check(tasks: Sequence[Task], *, whole_machine: bool = True) -> Fingerprints:
    """Refuse what no worker needs to be started for; see `check_data` and `check_devices`.

    The latter is for cells that run on this machine as a whole.

    Raises:
        UserError: one of theirs, a variable that no worker can start with, or a library's network
            that is not there or does not take the images.
    """
    environment_for(1, os.environ)
    found = check_data(tasks)
    if whole_machine:
        check_devices(tasks)
    trained = (task.cell.train for task in tasks if task.cell.train.model.library)
    for model, data in dict.fromkeys((train.model, train.data) for train in trained):
        check_model(replace(model, in_channels=found[data].channels), found[data].size)
    return {data: each.fingerprint for data, each in found.items() if each.fingerprint}


def check_data(tasks: Iterable[Task]) -> dict[DataConfig, Examined]:
    """Read every data set that the tasks name, once, as their workers will.

    Raises:
        DataError: one is missing, damaged or of the wrong form.
        ConfigError: a batch is larger than its training split, or too small for its images, see
            `cifar.cost.check_batch`.
    """
    found: dict[DataConfig, Examined] = {}
    for task in tasks:
        train = task.cell.train
        data, batch = train.data, train.recipe.global_batch_size
        if data not in found:
            found[data] = examine(data)
        count = found[data].images
        require(
            batch <= count,
            "batch-size",
            batch,
            f"{data} has {count} images; give at most that many",
        )
        check_batch(train, found[data].size, task.cell.num_processes)
    return found


def check_devices(
    tasks: Iterable[Task], present: Callable[[int], Environment] = present_environment
) -> None:
    """Refuse more processes than this machine has GPUs; on CPUs any number may share the cores.

    Raises:
        ConfigError: a cell asks for more.
    """
    most = max((task.cell.num_processes for task in tasks), default=1)
    if most > 1:
        count = present(most).gpu_count
        require(
            count == 0 or most <= count,
            "num-processes",
            most,
            f"this machine has {count} GPU{'s' * (count > 1)}; give at most that many",
        )
