from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import make_dataset

from cifar.config import AUGMENTATIONS, ModelConfig, Recipe
from cifar.data.augment import alternating_flip, flip, get_augmentations, get_reader, reflect
from cifar.data.dataset import Split
from cifar.data.draws import EpochDraws
from cifar.data.loader import (
    DeviceImages,
    Normalization,
    Place,
    TrainLoader,
    eval_batch_size,
    eval_batches,
)

CPU = torch.device("cpu")


def random_images(n: int = 20, channels: int = 3, height: int = 8, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize(
    ("padding", "fill", "mode"),
    [(2, "black", "constant"), (4, "black", "constant"), (2, "reflect", "reflect")],
)
def test_crop_equals_its_definition(
    padding: int, fill: Literal["black", "reflect"], mode: Any
) -> None:
    images, samples = random_images(), torch.tensor([7, 0, 19, 7, *range(16)])
    draws = EpochDraws(5, 1, len(images), CPU)
    top, left = (draws.integers(f"crop.{edge}", 2 * padding + 1) for edge in ("top", "left"))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), mode)
    expected = [
        padded[i, :, t : t + 8, x : x + 12] for i in samples for t, x in [(top[i], left[i])]
    ]
    read = get_reader(Recipe(augment=("crop",), crop_padding=padding, crop_fill=fill), images)
    assert np.array_equal(read(draws.of(samples)).numpy(), np.stack(expected))
    assert len(set(zip(top.tolist(), left.tolist()))) > 5


def test_flip_equals_its_definition() -> None:
    images = random_images()
    draws = EpochDraws(5, 1, len(images), CPU)
    flipped = draws.integers("flip", 2).tolist()
    expected = [image.flip(-1) if yes else image for image, yes in zip(images, flipped)]
    everyone = draws.of(torch.arange(len(images)))
    assert torch.equal(flip(images, everyone), torch.stack(expected))
    assert 0 < sum(flipped) < len(images)


def test_an_alternating_flip_shows_both_ways_in_any_two_epochs() -> None:
    images = random_images()
    mirrored = []
    for epoch in range(4):
        draws = EpochDraws(5, epoch, len(images), CPU).of(torch.arange(len(images)))
        out = alternating_flip(images, draws)
        mirrored.append([torch.equal(a, b.flip(-1)) for a, b in zip(out, images)])
        assert torch.equal(out.sort(-1).values, images.sort(-1).values)
    assert 0 < sum(mirrored[0]) < len(images)
    assert mirrored[1] == [not each for each in mirrored[0]]
    assert mirrored[2:] == mirrored[:2]


@pytest.mark.parametrize("padding", [1, 3, 9])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (2, 3), (1, 1)])
def test_margins_are_numpy_s_reflection_also_where_they_are_wider_than_the_image(
    padding: int, height: int, width: int
) -> None:
    images = random_images(2, 3, height, width)
    sides = ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2)
    assert np.array_equal(reflect(images, padding).numpy(), np.pad(images, sides, "reflect"))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_that_a_recipe_may_name_exists(name: str) -> None:
    images = random_images()
    samples, recipe = torch.arange(len(images)), Recipe(augment=(name,))
    draws = EpochDraws(0, 0, len(images), CPU).of(samples)
    out = get_reader(recipe, images)(draws)
    for augmentation in get_augmentations(recipe):
        out = augmentation(out, draws)
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert not torch.equal(out, images)


def test_augmentation_leaves_the_data_set_alone() -> None:
    loader = make_loader()
    before = loader._images.images.clone()
    for batch in loader.micro_batches(0):
        batch.images.add_(1)
    assert torch.equal(loader._images.images, before)


def test_normalization_is_the_mean_and_deviation_of_the_pixels() -> None:
    split = make_dataset().train
    normalization = Normalization.of(split)
    pixels = split.images.astype(np.float64) / 255
    assert np.allclose(normalization.mean, pixels.mean((0, 2, 3)))
    assert np.allclose(normalization.std, pixels.std((0, 2, 3)))
    batch = DeviceImages(split, normalization, CPU).batch(torch.arange(len(split)))
    assert torch.allclose(batch.images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(batch.images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    split = Split(images=np.zeros((4, 1, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    batch = DeviceImages(split, Normalization.of(split), CPU).batch(torch.arange(4))
    assert batch.images.isfinite().all()


def make_loader(
    place: Place = Place(),
    accumulation: int = 1,
    global_batch: int = 96,
    seed: int = 3,
    recipe: Recipe = Recipe(),
    **options,
) -> TrainLoader:
    train = make_dataset(train=200).train
    images = DeviceImages(train, Normalization.of(train), CPU, **options)
    return TrainLoader(
        images,
        recipe,
        per_device_batch_size=global_batch // place.count // accumulation,
        accumulation_steps=accumulation,
        place=place,
        seed=seed,
    )


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    processes: int, accumulation: int
) -> None:
    single = make_loader()
    for epoch in (0, 1):
        single.set_epoch(epoch)
        for step in range(single.steps_per_epoch):
            (whole,) = single.micro_batches(step)
            found: dict[int, torch.Tensor] = {}
            for index in range(processes):
                loader = make_loader(Place(index, processes), accumulation)
                loader.set_epoch(epoch)
                samples = loader.samples(step)
                for ids, batch in zip(samples, loader.micro_batches(step), strict=True):
                    found.update(zip(ids.tolist(), batch.images))
            ids = single.samples(step)[0].tolist()
            assert sorted(found) == sorted(ids)
            assert torch.equal(torch.stack([found[i] for i in ids]), whole.images)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_partners_are_the_same_for_any_number_of_processes(
    processes: int, accumulation: int
) -> None:
    """The first sample of the global batch goes with the last."""
    single = make_loader()
    for epoch, step in ((0, 0), (1, 1)):
        single.set_epoch(epoch)
        ids = single.samples(step)[0]
        found: dict[int, int] = {}
        for index in range(processes):
            loader = make_loader(Place(index, processes), accumulation)
            loader.set_epoch(epoch)
            for batch in loader.micro_batches(step):
                partners = batch.load_partners()
                found.update(zip(batch.samples.tolist(), partners.samples.tolist(), strict=True))
                assert torch.equal(partners.images, single.load(partners.samples).images)
        assert found == dict(zip(ids.tolist(), ids.flip(0).tolist()))


def test_the_last_incomplete_batch_is_dropped_and_no_sample_repeats() -> None:
    loader = make_loader()
    assert loader.steps_per_epoch == 2
    seen = torch.cat([loader.samples(step).flatten() for step in range(2)])
    assert len(set(seen.tolist())) == 192


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_sample_looks_the_same_in_any_batch_but_not_in_another_epoch(name: str) -> None:
    loader = make_loader(recipe=Recipe(augment=(name,), cutout_size=6))
    alone = loader.load(torch.tensor([17])).images
    among = loader.load(torch.tensor([3, 17, 5])).images
    assert torch.equal(alone[0], among[1])
    looks = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        looks.append(loader.load(torch.tensor([17])).images)
    assert any(not torch.equal(looks[0], other) for other in looks[1:])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_what_images_get_depends_on_the_seed(name: str) -> None:
    recipe, samples = Recipe(augment=(name,), cutout_size=6), torch.arange(50)
    first, other, again = (make_loader(seed=seed, recipe=recipe) for seed in (3, 4, 3))
    assert not torch.equal(first.load(samples).images, other.load(samples).images)
    assert torch.equal(first.load(samples).images, again.load(samples).images)


def test_channels_last_batches_hold_the_same_numbers() -> None:
    (plain,) = make_loader().micro_batches(0)
    (nhwc,) = make_loader(channels_last=True).micro_batches(0)
    assert nhwc.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.images, nhwc.images)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(32, 32, 500), (8, 8, 500), (64, 32, 250), (224, 224, 10), (1000, 1000, 1)],
)
def test_large_images_are_evaluated_fewer_at_once(height: int, width: int, expected: int) -> None:
    """512,000 pixels in all at most: 224 x 224 = 50,176 of them fit 10 times."""
    images = np.zeros((1, 1, height, width), np.uint8)
    split = Split(images=images, labels=np.zeros(1, np.int64))
    normalization = Normalization(mean=(0.5,), std=(0.5,))
    on_device = DeviceImages(split, normalization, CPU)
    assert eval_batch_size(on_device, ModelConfig()) == expected
    assert eval_batch_size(on_device, ModelConfig(resize=64)) == 125
    library = ModelConfig(name="torchvision:resnet18", resize=64)
    assert eval_batch_size(on_device, library) == 500


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_shares_cover_every_sample_once(count: int) -> None:
    test = make_dataset(test=50).test
    images = DeviceImages(test, Normalization.of(test), CPU)
    shares = [list(eval_batches(images, 7, Place(i, count))) for i in range(count)]
    total = sum(len(batch.targets) for share in shares for batch in share)
    labels = torch.cat([batch.targets for share in shares for batch in share])
    assert total == 50
    assert torch.equal(labels.bincount(), torch.from_numpy(test.labels).bincount())


@pytest.mark.gpu
def test_gpu_batches_equal_cpu_batches() -> None:
    train = make_dataset(train=200).train
    batches = []
    for device in (CPU, torch.device("cuda")):
        images = DeviceImages(train, Normalization.of(train), device)
        loader = TrainLoader(images, Recipe(), per_device_batch_size=96)
        batches.append([batch.images.cpu() for batch in loader.micro_batches(1)])
    assert torch.allclose(batches[0][0], batches[1][0], atol=1e-6)
