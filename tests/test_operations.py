"""Image operations and policies, held against Pillow's and torchvision's own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode

from cifar.config import Recipe
from cifar.data.augment import get_augmentations, get_reader
from cifar.data.dataset import Split
from cifar.data.draws import EpochDraws
from cifar.data.gallery import GAP, gallery
from cifar.data.operations import Operation, Operations
from cifar.data.policies import (
    CIFAR10_POLICY,
    ByPolicy,
    auto_augment,
    color_jitter,
    rand_augment,
    rotation,
    trivial_augment,
)

CPU = torch.device("cpu")
NAMES = {
    "identity": "Identity",
    "rotate": "Rotate",
    "posterize": "Posterize",
    "invert": "Invert",
    "shear-x": "ShearX",
    "shear-y": "ShearY",
    "solarize": "Solarize",
    "equalize": "Equalize",
    "translate-x": "TranslateX",
    "translate-y": "TranslateY",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "auto-contrast": "AutoContrast",
}
"""Ours and torchvision's."""


def pictures(count: int = 6, height: int = 24, width: int = 32, channels: int = 3) -> Tensor:
    """Smooth ones, noise, one of a single colour and one of two."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    made = [random.integers(0, 256, (channels, height, width)) for _ in range(count)]
    made[0] = np.stack(
        [(rows * (3 + c) + columns * 2 + 20 * c) % 200 + 30 for c in range(channels)]
    )
    made[1] = np.full((channels, height, width), 77)
    made[2] = np.where(rows < 3, 10, 200)[None].repeat(channels, 0)
    return torch.from_numpy(np.stack(made).astype(np.uint8))


def theirs(image: Tensor, operation: Operation) -> Tensor:
    """What torchvision makes of an image by way of Pillow."""
    strength = operation.value
    if operation.name in ("brightness", "color", "contrast", "sharpness"):
        strength -= 1.0
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    done = _apply_op(picture, NAMES[operation.name], strength, InterpolationMode.NEAREST, None)
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


MOVING = [
    *(Operation("rotate", degrees) for degrees in (-135.0, -30.0, -3.3, 0.0, 7.25, 15.0, 90.0)),
    *(Operation(f"shear-{axis}", by) for axis in "xy" for by in (-0.99, -0.1, 0.0, 0.3)),
    *(Operation(f"translate-{axis}", by) for axis in "xy" for by in (-14.0, -1.0, 0.0, 5.0)),
]
TONAL = [
    Operation("identity"),
    Operation("auto-contrast"),
    Operation("equalize"),
    Operation("invert"),
    *(Operation("posterize", bits) for bits in (8.0, 7.0, 4.0, 2.0)),
    *(Operation("solarize", least) for least in (255.0, 226.7, 128.0, 0.0)),
    *(Operation("brightness", by) for by in (0.01, 0.37, 1.0, 1.9)),
    *(Operation("contrast", by) for by in (0.01, 0.37, 1.0, 1.9)),
    *(Operation("color", by) for by in (0.01, 0.37, 1.0, 1.9)),
    *(Operation("sharpness", by) for by in (0.01, 0.37, 1.0, 1.9)),
]


def ours(images: Tensor, operation: Operation) -> Tensor:
    """In a menu with all others, so that what is not ordered must not show."""
    menu = [*MOVING, *TONAL]
    serve = Operations(menu, *images.shape[2:], CPU)
    return serve(images, torch.full((len(images),), menu.index(operation)))


@pytest.mark.parametrize("operation", TONAL, ids=str)
def test_tones_are_pillow_s(operation: Operation) -> None:
    images = pictures()
    expected = torch.stack([theirs(image, operation) for image in images])
    difference = (ours(images, operation).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("operation", MOVING, ids=str)
def test_places_are_pillow_s(operation: Operation) -> None:
    images = pictures()
    expected = torch.stack([theirs(image, operation) for image in images])
    elsewhere = (ours(images, operation) != expected).any(1).float().mean()
    assert elsewhere < 0.01, "ties alone may be rounded otherwise"


def test_every_sample_gets_its_own_order() -> None:
    images = pictures(8)
    menu = [Operation("invert"), Operation("identity"), Operation("translate-x", 3.0)]
    orders = torch.tensor([0, 1, 2, 0, 2, 1, 1, 0])
    served = Operations(menu, *images.shape[2:], CPU)(images, orders)
    for image, place, result in zip(images, orders, served, strict=True):
        assert torch.equal(
            result,
            ours(image[None], menu[place])[0]
            if place != 2
            else torch.cat((torch.zeros_like(image[..., :3]), image[..., :-3]), -1),
        )


@pytest.mark.parametrize("channels", [1, 4])
def test_other_than_three_channels_have_no_colours(channels: int) -> None:
    images = pictures(channels=channels)
    assert torch.equal(ours(images, Operation("color", 0.01)), images)
    assert ours(images, Operation("contrast", 0.37)).shape == images.shape


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (1, 40)])
def test_small_images_are_served(size: tuple[int, int]) -> None:
    images = pictures(count=4, height=size[0], width=size[1])
    for operation in (*MOVING, *TONAL):
        assert ours(images, operation).shape == images.shape


def canonical(name: str, strength: float | None, sign: int) -> Operation:
    """torchvision's words as an operation."""
    (mine,) = (ours for ours, word in NAMES.items() if word == name)
    value = 0.0 if strength is None else float(strength)
    value *= sign
    if mine in ("brightness", "color", "contrast", "sharpness"):
        value += 1
    if mine in ("posterize", "translate-x", "translate-y"):
        value = float(int(value))
    return Operation(mine, value)


def expected_menu(space: dict, levels: range | list[int]) -> set[tuple[str, float]]:
    menu = set()
    for name, (strengths, signed) in space.items():
        for level in levels:
            strength = float(strengths[level]) if strengths.ndim else None
            for sign in (1, -1) if signed else (1,):
                operation = canonical(name, strength, sign)
                menu.add((operation.name, round(operation.value, 4)))
    return menu


def rounded(menu: tuple[Operation, ...]) -> set[tuple[str, float]]:
    return {(operation.name, round(operation.value, 4)) for operation in menu}


def test_trivial_augment_s_menu_is_torchvision_s() -> None:
    space = TrivialAugmentWide()._augmentation_space(31)
    assert rounded(trivial_augment(32, 32).menu) == expected_menu(space, range(31))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_rand_augment_s_menu_is_torchvision_s(size: tuple[int, int]) -> None:
    space = RandAugment()._augmentation_space(31, size)
    assert rounded(rand_augment(*size).menu) == expected_menu(space, [9])


def test_auto_augment_s_policy_is_torchvision_s() -> None:
    published = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert [
        tuple((NAMES[name], tenths / 10, level) for name, tenths, level in pair)
        for pair in CIFAR10_POLICY
    ] == published
    space = AutoAugment()._augmentation_space(10, (32, 32))
    assert rounded(auto_augment(32, 32).menu) <= expected_menu(space, range(10)) | {
        ("identity", 0.0)
    }


def test_auto_augment_applies_a_pair_as_often_as_it_says() -> None:
    policy = auto_augment(32, 32)
    epoch = EpochDraws(0, 0, 50_000, CPU)
    for number in (0, 1):
        orders = policy.choose(epoch, number)
        names = [policy.menu[place].name for place in orders[:2000].tolist()]
        share = 1 - names.count("identity") / len(names)
        expected = sum(pair[number][1] for pair in CIFAR10_POLICY) / 10 / len(CIFAR10_POLICY)
        assert share == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "make", [rotation, color_jitter, auto_augment, rand_augment, trivial_augment]
)
def test_a_policy_changes_pictures_the_same_way_in_any_batch(make) -> None:
    images = pictures(12)
    augment = ByPolicy("x", make)
    epoch = EpochDraws(3, 1, 12, CPU)
    together = augment(images, epoch.of(torch.arange(12)))
    alone = [augment(images[i : i + 1], epoch.of(torch.tensor([i])))[0] for i in range(12)]
    assert torch.equal(together, torch.stack(alone))
    assert together.dtype == torch.uint8
    changed = (together != images).flatten(1).any(1)
    assert changed.sum() >= 4
    other = augment(images, EpochDraws(3, 2, 12, CPU).of(torch.arange(12)))
    assert not torch.equal(other, together)


def test_rotation_is_uniform_between_its_ends() -> None:
    policy = rotation(32, 32)
    angles = torch.tensor([operation.value for operation in policy.menu])
    drawn = angles[policy.choose(EpochDraws(0, 0, 20_000, CPU), 0)]
    assert (angles.min(), angles.max()) == (-15, 15)
    assert drawn.mean().abs() < 0.3
    assert drawn.std() == pytest.approx(30 / 12**0.5, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [rotation, color_jitter, auto_augment, trivial_augment])
def test_gpu_pictures_equal_cpu_pictures(make) -> None:
    images, gpu = pictures(64), torch.device("cuda")
    expected = ByPolicy("x", make)(images, EpochDraws(3, 1, 64, CPU).of(torch.arange(64)))
    draws = EpochDraws(3, 1, 64, gpu).of(torch.arange(64, device=gpu))
    assert torch.equal(ByPolicy("x", make)(images.to(gpu), draws).cpu(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gallery_shows_images_and_what_becomes_of_them(channels: int) -> None:
    images = pictures(5, channels=channels)
    split = Split(images=images.numpy(), labels=np.zeros(5, dtype=np.int64))
    recipe = Recipe(augment=("crop", "flip", "trivial-augment"))
    shown = np.array(Image.open(io.BytesIO(gallery(recipe, split, count=4, epochs=6))))
    height, width = (4 * side + 2 * GAP for side in (24, 32))
    assert shown.shape == (4 * height, 7 * width, 3)
    tiles = shown.reshape(4, height, 7, width, 3).transpose(0, 2, 1, 3, 4)
    inner = tiles[:, :, GAP:-GAP:4, GAP:-GAP:4, :channels].transpose(0, 1, 4, 2, 3)
    assert np.array_equal(inner[:, 0], images[:4].numpy())
    draws = EpochDraws(0, 5, 5, CPU).of(torch.arange(4))
    expected = get_reader(recipe, images)(draws)
    for augmentation in get_augmentations(recipe):
        expected = augmentation(expected, draws)
    assert np.array_equal(inner[:, 6], expected.numpy())
