"""Image operations and policies, held against Pillow's and torchvision's own."""

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    ColorJitter,
    RandAugment,
    RandomRotation,
    TrivialAugmentWide,
)
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode, adjust_hue

from cifar.config import Recipe
from cifar.data.augment import cutout, get_augmentations, get_reader
from cifar.data.dataset import Split
from cifar.data.draws import EpochDraws
from cifar.data.gallery import GAP, gallery
from cifar.data.operations import Operation, Operations
from cifar.data.policies import (
    CIFAR10_POLICY,
    POLICIES,
    ByPolicy,
    auto_augment,
    color_jitter,
    get_policy,
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
    picture = as_picture(image)
    if operation.name == "hue":
        return as_tensor(adjust_hue(picture, strength))
    name = NAMES[operation.name]
    return as_tensor(_apply_op(picture, name, strength, InterpolationMode.NEAREST, None))


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


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
TURNS = [Operation("hue", by) for by in (-0.5, -0.07, 0.0, 0.1, 1 / 3, 0.5)]


def ours(images: Tensor, operation: Operation) -> Tensor:
    """In a menu with all others, so that what is not ordered must not show."""
    menu = [*MOVING, *TONAL, *TURNS]
    serve = Operations(menu, *images.shape[2:], CPU)
    return serve(images, torch.full((len(images),), menu.index(operation)))


@pytest.mark.parametrize("operation", TONAL, ids=str)
def test_tones_are_pillow_s(operation: Operation) -> None:
    images = pictures()
    expected = torch.stack([theirs(image, operation) for image in images])
    difference = (ours(images, operation).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("operation", TURNS, ids=str)
def test_turned_colours_are_pillow_s(operation: Operation) -> None:
    """A hue that Pillow's floats round to the one below may change a channel by 6."""
    images = pictures(30)
    expected = torch.stack([theirs(image, operation) for image in images])
    difference = (ours(images, operation).int() - expected.int()).abs()
    assert difference.max() <= 6
    assert (difference > 0).float().mean() < 0.01


def test_turned_colours_by_hand() -> None:
    """Red, yellow, green, cyan, blue, magenta, grey and black, a third of the way around.

    Pillow's circle has 255 steps, of which yellow's place is between two, and wraps after 256: a
    step and a half are 9 of 255.
    """
    colours = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)]
    images = torch.tensor([*colours, (90, 90, 90), (0, 0, 0)], dtype=torch.uint8).T[
        None, :, :, None
    ]
    turned = ours(images, Operation("hue", 1 / 3))[0, :, :, 0].T.tolist()
    assert turned[0:6:2] == [[0, 255, 0], [0, 0, 255], [255, 0, 0]]
    for found, exact in zip(turned[1:6:2], [[0, 255, 255], [255, 0, 255], [255, 255, 0]]):
        assert max(abs(a - b) for a, b in zip(found, exact)) <= 9
    assert turned[6:] == [[90, 90, 90], [0, 0, 0]]


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
    for operation in (Operation("color", 0.01), Operation("hue", 0.1)):
        assert torch.equal(ours(images, operation), images)
    assert ours(images, Operation("contrast", 0.37)).shape == images.shape


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (1, 40)])
def test_small_images_are_served(size: tuple[int, int]) -> None:
    images = pictures(count=4, height=size[0], width=size[1])
    for operation in (*MOVING, *TONAL, *TURNS):
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
    assert rounded(trivial_augment().menu) == expected_menu(space, range(31))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_rand_augment_s_menu_is_torchvision_s(size: tuple[int, int]) -> None:
    space = RandAugment()._augmentation_space(31, size)
    assert rounded(rand_augment(*size, 2, 9).menu) == expected_menu(space, [9])


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


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_changes_pictures_the_same_way_in_any_batch(name: str) -> None:
    images = pictures(12)
    augment = ByPolicy("x", get_policy(name, Recipe()))
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
    policy = rotation(15.0)
    angles = torch.tensor([operation.value for operation in policy.menu])
    drawn = angles[policy.choose(EpochDraws(0, 0, 20_000, CPU), 0)]
    assert (angles.min(), angles.max()) == (-15, 15)
    assert drawn.mean().abs() < 0.3
    assert drawn.std() == pytest.approx(30 / 12**0.5, rel=0.05)


def test_colours_are_jittered_in_any_order_by_any_factor() -> None:
    policy = color_jitter(0.3)
    epoch = EpochDraws(0, 0, 6000, CPU)
    chosen = torch.stack([policy.choose(epoch, number) for number in range(3)], 1)
    orders: dict[tuple[str, ...], int] = {}
    for places in chosen.tolist():
        names = tuple(policy.menu[place].name for place in places)
        orders[names] = orders.get(names, 0) + 1
    assert set(orders) == set(itertools.permutations(("brightness", "contrast", "color")))
    assert all(800 < count < 1200 for count in orders.values())
    factors = torch.tensor([operation.value for operation in policy.menu])[chosen]
    assert factors.min() == pytest.approx(0.7) and factors.max() == pytest.approx(1.3)
    assert factors.mean(0) == pytest.approx([1.0] * 3, abs=0.02)


# Whole policies: torchvision's own transform of every picture, given the numbers that we draw

COUNT = 300


def epoch() -> EpochDraws:
    return EpochDraws(7, 2, COUNT, CPU)


def drawn(name: str, high: int) -> list[int]:
    return epoch().integers(name, high).tolist()


def check_like_theirs(name: str, recipe: Recipe, theirs: list[Tensor], images: Tensor) -> None:
    """The same but for rounding: a few pixels at ties, and steps of one that later ones enlarge."""
    found = ByPolicy(name, get_policy(name, recipe))(images, epoch().of(torch.arange(COUNT)))
    for number, (mine, other) in enumerate(zip(found, theirs, strict=True)):
        difference = (mine.int() - other.int()).abs()
        elsewhere = (difference > 8).any(0).float().mean()
        assert elsewhere < 0.03, f"picture {number}: {elsewhere:.1%} of the pixels differ"


@pytest.fixture(scope="module")
def many() -> Tensor:
    """Pictures in many colours, each another one."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[0:24, 0:32] / 24
    waves = random.uniform(-6, 6, (COUNT, 3, 3, 1, 1))
    made = np.sin(waves[:, :, 0] * rows + waves[:, :, 1] * columns + waves[:, :, 2])
    return torch.from_numpy((128 + 100 * made).astype(np.uint8))


def test_rotation_is_torchvision_s(many: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = torch.linspace(-15, 15, 121)[drawn("rotate.angle", 121)].tolist()
    transform, results = RandomRotation(15), []
    for image, angle in zip(many, angles):
        monkeypatch.setattr(transform, "get_params", lambda _, angle=angle: angle)
        results.append(as_tensor(transform(as_picture(image))))
    check_like_theirs("rotate", Recipe(), results, many)


@pytest.mark.parametrize("hue", [0.0, 0.2])
def test_colour_jitter_is_torchvision_s(
    many: Tensor, monkeypatch: pytest.MonkeyPatch, hue: float
) -> None:
    names = ("brightness", "contrast", "color", "hue")
    orders = list(itertools.permutations(range(4 if hue else 3)))
    picked = [orders[number] for number in drawn("color-jitter.order", len(orders))]
    steps = dict.fromkeys(names, torch.linspace(0.6, 1.4, 41))
    steps["hue"] = torch.linspace(-hue, hue, 41)
    values = [steps[name][drawn(f"color-jitter.{name}", 41)].tolist() for name in names]
    transform, results = ColorJitter(0.4, 0.4, 0.4, hue), []
    for image, order, *factors, turn in zip(many, picked, *values):
        params = (order, *factors, turn if hue else None)
        monkeypatch.setattr(transform, "get_params", lambda *_, params=params: params)
        results.append(as_tensor(transform(as_picture(image))))
    check_like_theirs("color-jitter", Recipe(jitter=0.4, hue=hue), results, many)


def test_auto_augment_is_torchvision_s(many: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = drawn("auto-augment.pair", 25)
    signs, tenths = (
        list(zip(*(drawn(f"auto-augment.{number}.{what}", high) for number in (0, 1))))
        for what, high in (("sign", 2), ("probability", 10))
    )
    transform, results = AutoAugment(AutoAugmentPolicy.CIFAR10), []
    for image, pair, sign, tenth in zip(many, pairs, signs, tenths):
        params = (pair, [(each + 0.5) / 10 for each in tenth], [1 - each for each in sign])
        monkeypatch.setattr(transform, "get_params", lambda _, params=params: params)
        results.append(as_tensor(transform(as_picture(image))))
    assert set(pairs) == set(range(25))
    check_like_theirs("auto-augment", Recipe(), results, many)


def dealt(numbers: list[dict[int, int]]) -> Callable[..., Tensor]:
    """`torch.randint` that gives the numbers of a round by their bound; 14 begins another one."""
    rounds = iter(numbers)
    here: dict[int, int] = {}

    def randint(high: int, size: tuple[int, ...], **_: object) -> Tensor:
        if high == 14:
            here.update(next(rounds))
        return torch.full(size, here[high])

    return randint


@pytest.mark.parametrize(("operations", "magnitude"), [(2, 9), (1, 30), (3, 17)])
def test_rand_augment_is_torchvision_s(
    many: Tensor, monkeypatch: pytest.MonkeyPatch, operations: int, magnitude: int
) -> None:
    rounds = []
    for number in range(operations):
        which = drawn(f"rand-augment.{number}.operation", 14)
        signs = drawn(f"rand-augment.{number}.sign", 2)
        rounds.append([{14: each, 2: sign} for each, sign in zip(which, signs)])
    transform, results = RandAugment(operations, magnitude), []
    for image, *numbers in zip(many, *rounds):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", dealt(numbers))
            results.append(as_tensor(transform(as_picture(image))))
    recipe = Recipe(rand_operations=operations, rand_magnitude=magnitude)
    check_like_theirs("rand-augment", recipe, results, many)


def test_trivial_augment_is_torchvision_s(many: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {14: "operation", 31: "level", 2: "sign"}
    columns = [drawn(f"trivial-augment.{name}", high) for high, name in names.items()]
    transform, results = TrivialAugmentWide(), []
    for image, *numbers in zip(many, *columns):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", dealt([dict(zip(names, numbers))]))
            results.append(as_tensor(transform(as_picture(image))))
    check_like_theirs("trivial-augment", Recipe(), results, many)


def test_a_recipe_s_strengths_are_those_of_its_policies() -> None:
    recipe = Recipe(rotate_degrees=3.0, jitter=0.1, hue=0.3, rand_operations=3, rand_magnitude=0)
    made = {name: get_policy(name, recipe)(32, 32) for name in POLICIES}
    assert max(each.value for each in made["rotate"].menu) == 3.0
    assert max(each.value for each in made["color-jitter"].menu) == pytest.approx(1.1)
    turns = [each.value for each in made["color-jitter"].menu if each.name == "hue"]
    assert (min(turns), max(turns)) == pytest.approx((-0.3, 0.3))
    assert made["rand-augment"].rounds == 3
    assert Operation("rotate", 0.0) in made["rand-augment"].menu


@pytest.mark.parametrize("size", [8, 16, 5])
def test_a_square_is_cut_out_around_its_centre(size: int) -> None:
    images = torch.full((200, 3, 20, 32), 7, dtype=torch.uint8)
    epoch = EpochDraws(0, 0, 200, CPU)
    out = cutout(size, images, epoch.of(torch.arange(200)))
    tops, lefts = epoch.integers("cutout.top", 20), epoch.integers("cutout.left", 32)
    for image, top, left in zip(out, tops.tolist(), lefts.tolist(), strict=True):
        expected = torch.full((3, 20, 32), 7, dtype=torch.uint8)
        rows, columns = (
            slice(max(0, centre - size // 2), centre - size // 2 + size) for centre in (top, left)
        )
        expected[:, rows, columns] = 128
        assert torch.equal(image, expected)
    assert tops.unique().numel() == 20 and lefts.unique().numel() == 32


def test_a_menu_of_tones_moves_nothing_and_holds_one_move() -> None:
    serve = Operations(color_jitter(0.2).menu, 32, 32, CPU)
    assert len(serve._sources) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_gpu_pictures_equal_cpu_pictures(name: str) -> None:
    images, gpu = pictures(64), torch.device("cuda")
    make = get_policy(name, Recipe(hue=0.2))
    expected = ByPolicy("x", make)(images, EpochDraws(3, 1, 64, CPU).of(torch.arange(64)))
    draws = EpochDraws(3, 1, 64, gpu).of(torch.arange(64, device=gpu))
    assert torch.equal(ByPolicy("x", make)(images.to(gpu), draws).cpu(), expected)


def test_a_gallery_shows_what_is_mixed() -> None:
    images = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (0, 200)])
    split = Split(images=images.numpy(), labels=np.zeros(2, dtype=np.int64))
    recipe = Recipe(augment=(), mixup=1.0)
    shown = np.array(Image.open(io.BytesIO(gallery(recipe, split, count=2, epochs=20))))
    tiles = shown.reshape(2, 100, 21, 100, 3)[:, 50, :, 50, 0]
    assert tiles[:, 0].tolist() == [0, 200]
    assert len(np.unique(tiles[:, 1:])) > 20
    assert ((tiles >= 0) & (tiles <= 200)).all()


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
