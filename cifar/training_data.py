"""The images of a training on a process's device: what it learns from, and what it is scored on."""

from dataclasses import dataclass

import torch

from cifar.config import ModelConfig, TrainConfig
from cifar.cost import check_batch
from cifar.data.dataset import Dataset, Split
from cifar.data.loader import DeviceImages, Normalization, Place, TrainLoader, eval_batch_size
from cifar.errors import ConfigError
from cifar.models.meta import check_images
from cifar.models.pretrained import expected_statistics


@dataclass(frozen=True)
class TrainingData:
    """The splits of a data set on one device, normalised alike.

    `validation_images` are the training images that the recipe holds out, if any.
    """

    normalization: Normalization
    loader: TrainLoader
    test_images: DeviceImages
    validation_images: DeviceImages | None
    eval_batch_size: int


def place_data(
    config: TrainConfig,
    model_config: ModelConfig,
    dataset: Dataset,
    device: torch.device,
    place: Place,
) -> TrainingData:
    """Put a divided data set on the device, for the process at this place.

    Images are normalised as pretrained weights saw theirs, else by the training split's own mean
    and deviation.

    Raises:
        ConfigError: the batch does not fit the images, the processes or the network.
    """
    per_device = _check_sizes(config, model_config, dataset, place)
    known = expected_statistics(model_config)
    normalization = (
        Normalization(mean=known[0], std=known[1]) if known else Normalization.of(dataset.train)
    )

    def on_device(split: Split) -> DeviceImages:
        return DeviceImages(split, normalization, device, channels_last=config.channels_last)

    loader = TrainLoader(
        on_device(dataset.train),
        config.recipe,
        per_device_batch_size=per_device,
        accumulation_steps=config.accumulation_steps,
        place=place,
        seed=config.seed,
    )
    test_images, held_out = on_device(dataset.test), dataset.validation
    return TrainingData(
        normalization=normalization,
        loader=loader,
        test_images=test_images,
        validation_images=None if held_out is None else on_device(held_out),
        eval_batch_size=eval_batch_size(test_images, model_config),
    )


def _check_sizes(
    config: TrainConfig, model_config: ModelConfig, dataset: Dataset, place: Place
) -> int:
    """The images of one device in one pass."""
    batch_size, count = config.recipe.global_batch_size, len(dataset.train)
    if batch_size > count:
        raise ConfigError(
            f"batch-size: {batch_size}: larger than the {count} training images of "
            f"{dataset.name}; give at most that many"
        )
    height, width = dataset.train.images.shape[2:]
    check_batch(config, (height, width), place.count)
    per_device = config.per_device_batch_size(place.count)
    if model_config.library:
        check_images(model_config, (height, width), per_device)
    return per_device
