"""What every augmentation costs, on clocks made by hand, and the real loaders that are timed."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_dataset
from test_anatomy import FakeClock
from training import make_trainer, tiny_recipe

from bench import rows
from bench.measure import FURTHER, augmentation_cost
from bench.measure.augmentation_cost import cases, measure_augmentations
from bench.measure.subject import Subject
from bench.protocol import METRICS, Protocol
from bench.record import Measurement
from bench.selection import sort_rows
from cifar.config import AUGMENTATIONS, Recipe
from cifar.data.loader import TrainBatch, TrainLoader

STEPS = 5
NAMES = ("none", *AUGMENTATIONS, "mixup", "cutmix", "recipe")
TRAINING = Measurement(
    name="train_throughput", unit="samples/s", better="higher",
    labels={"samples_per_step": 64}, samples=((2.0,),),
)  # fmt: skip
"""64 samples in 2 s: 32 samples/s."""


def seconds_of(recipe: Recipe) -> float:
    """0.0625 s a step as it is, 0.03125 more for each augmentation, 0.125 more for mixing."""
    mixes = bool(recipe.mixup or recipe.cutmix)
    return 0.0625 + 0.03125 * len(recipe.augment) + 0.125 * mixes


class FakeLoader:
    """A loader whose steps take their recipe's seconds; `asked` are their numbers."""

    global_batch_size = 32

    def __init__(self, recipe: Recipe) -> None:
        self.asked: list[int] = []
        self._seconds = seconds_of(recipe)

    def batches_of(self, step: int) -> list[TrainBatch]:
        self.asked.append(step)
        FakeClock.now += self._seconds
        return []


class FakeImages:
    """PIL images that take a quarter of their recipe's seconds each."""

    def __init__(self, recipe: Recipe) -> None:
        self.asked: list[int] = []
        self._seconds = seconds_of(recipe) / 4

    def __getitem__(self, index: int) -> None:
        self.asked.append(index)
        FakeClock.now += self._seconds


Fakes = dict[str, list[Any]]
"""What was made: loaders, PIL images, and the devices that clocks were made for."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Loaders and images are in the order of `NAMES`."""
    made: Fakes = {"device": [], "pil": [], "clocks": []}

    def with_recipe(_: TrainLoader, recipe: Recipe) -> FakeLoader:
        made["device"].append(FakeLoader(recipe))
        return made["device"][-1]

    def pil_images(_: object, recipe: Recipe, count: int) -> FakeImages:
        assert count == 64
        made["pil"].append(FakeImages(recipe))
        return made["pil"][-1]

    FakeClock.now, FakeClock.made, FakeClock.cost = 0.0, [], 0.0
    monkeypatch.setattr(
        augmentation_cost,
        "make_clock",
        lambda device: (made["clocks"].append(device), FakeClock())[1],
    )
    monkeypatch.setattr(augmentation_cost, "HostClock", FakeClock)
    monkeypatch.setattr(augmentation_cost, "pil_images", pil_images)
    monkeypatch.setattr(TrainLoader, "with_recipe", with_recipe)
    return made


def measure(recipe: Recipe | None = None, steps: int = STEPS, **config: Any) -> list[Measurement]:
    subject = Subject(make_trainer(recipe, **config), Protocol(timed_steps=steps), [TRAINING])
    return list(measure_augmentations(subject))


def by_name(found: list[Measurement], source: str) -> dict[str, Measurement]:
    return {
        str(each.labels["augmentation"]): each
        for each in found
        if each.labels.get("source") == source
    }


def test_it_is_a_metric_of_the_suite() -> None:
    assert FURTHER["augmentations"] is measure_augmentations
    assert tuple(FURTHER) == METRICS


def test_every_augmentation_has_a_recipe_of_its_own_with_the_cell_s_strengths() -> None:
    recipe = Recipe(
        augment=("crop", "cutout"), crop_padding=2, cutout_size=5, rotate_degrees=3, mixup=0.3, lr=7
    )
    found = cases(recipe)
    assert tuple(found) == NAMES
    assert found["recipe"] == recipe
    plain = replace(recipe, augment=(), mixup=0.0)
    assert found["none"] == plain
    for name in AUGMENTATIONS:
        assert found[name] == replace(plain, augment=(name,))
    assert found["mixup"] == replace(plain, mixup=0.3)
    assert found["cutmix"] == replace(plain, cutmix=1.0), "off in the recipe"


def test_images_per_second_by_hand(fakes: Fakes) -> None:
    found = measure(tiny_recipe(augment=("crop", "flip")))
    device, pil = by_name(found, "device"), by_name(found, "pil")
    assert tuple(device) == tuple(pil) == NAMES
    steps = {"none": 0.0625, "mixup": 0.1875, "cutmix": 0.1875, "recipe": 0.125}
    for name in NAMES:
        seconds = steps.get(name, 0.09375)
        count = {0.1875: 2, 0.125: 4}.get(seconds, STEPS)
        count = max(3, count)
        assert device[name].samples == ((seconds,) * count,)
        assert device[name].value == 32 / seconds
        assert device[name].labels == {
            "augmentation": name,
            "source": "device",
            "samples_per_step": 32,
        }
    assert pil["none"].value == 1 / 0.015625
    assert pil["flip"].value == 1 / 0.0234375
    assert pil["recipe"].value == 1 / 0.03125
    assert pil["flip"].labels == {
        "augmentation": "flip",
        "source": "pil",
        "threads": 1,
        "samples_per_step": 1,
    }


def test_the_clock_starts_after_two_steps_and_one_that_tells_the_pace(fakes: Fakes) -> None:
    measure()
    assert fakes["clocks"] == [torch.device("cpu")] * 2 * len(NAMES), "PIL has the host's"
    assert fakes["device"][0].asked == list(range(2 + 1 + STEPS))
    assert fakes["pil"][0].asked == list(range(2 + 1 + 32)), "0.5 s of 0.015625 s each"


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [(0.25, 20, 3), (0.125, 20, 4), (0.0625, 20, 8), (0.015625, 20, 20), (99.0, 20, 3), (9, 2, 2)],
)
def test_an_augmentation_is_timed_for_half_a_second(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, seconds: float, most: int, expected: int
) -> None:
    monkeypatch.setitem(globals(), "seconds_of", lambda _: seconds)
    found = by_name(measure(steps=most), "device")
    assert {len(each.samples[0]) for each in found.values()} == {expected}


def test_all_processes_take_as_many_steps(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(augmentation_cost, "least", lambda count, _: (asked.append(count), 2)[1])
    found = by_name(measure(), "device")
    assert {len(each.samples[0]) for each in found.values()} == {2}
    assert asked[0] == STEPS


def test_headroom_is_what_comes_over_what_the_training_consumes(fakes: Fakes) -> None:
    """32 images in 0.0625 s are 512 a second, and 16 times the 32 of the training."""
    found = [each for each in measure() if each.name == "augmentation_headroom"]
    ratios = {each.labels["augmentation"]: (each.value, each.unit, each.better) for each in found}
    assert tuple(ratios) == NAMES
    assert ratios["none"] == (16.0, "1", "higher")
    assert ratios["mixup"][0] == pytest.approx(16.0 / 3)


def test_mixing_has_no_counterpart(fakes: Fakes) -> None:
    pil = by_name(measure(tiny_recipe(cutmix=0.5)), "pil")
    absent = [name for name, each in pil.items() if each.status == "absent"]
    assert absent == ["mixup", "cutmix", "recipe"]
    assert {pil[name].reason for name in absent} == {"torchvision mixes batches, not PIL images"}
    assert len(fakes["pil"]) == len(NAMES) - 3


def test_without_torchvision_the_device_is_measured_alone(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = measure()
    assert {each.status for each in by_name(found, "device").values()} == {"ok"}
    reasons = {each.reason for each in by_name(found, "pil").values()}
    assert reasons == {
        "torchvision is not installed",
        "torchvision mixes batches, not PIL images",
    }


def test_torchvision_computes_in_one_thread(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    trainer = make_trainer()
    monkeypatch.setattr(FakeImages, "__getitem__", lambda *_: threads.add(torch.get_num_threads()))
    FakeClock.cost = 0.001
    torch.set_num_threads(2)
    try:
        list(measure_augmentations(Subject(trainer, Protocol(timed_steps=3), [TRAINING])))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == {1}


def images_of(loader: TrainLoader, steps: int) -> Iterator[torch.Tensor]:
    for step in range(steps):
        yield from (batch.images for batch in loader.batches_of(step))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("fields", [{"augment": ("cutout",)}, {"augment": (), "mixup": 0.5}])
def test_a_loader_with_another_recipe_is_that_of_its_trainer(
    fields: dict[str, Any], accumulation: int
) -> None:
    """Over all batches of two epochs of three steps."""
    other = tiny_recipe(**fields)
    expected = make_trainer(other, accumulation_steps=accumulation, seed=3).loader
    trainer = make_trainer(accumulation_steps=accumulation, seed=3)
    found = trainer.loader.with_recipe(other)
    for ours, theirs in zip(images_of(found, 6), images_of(expected, 6), strict=True):
        assert torch.equal(ours, theirs)
    assert found.epoch == 1
    assert trainer.loader.epoch == 0
    assert not torch.equal(next(images_of(found, 1)), next(images_of(trainer.loader, 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_real_is_measured_and_leaves_the_trainer_as_it_was(channels: int) -> None:
    trainer = make_trainer(data=make_dataset(channels=channels))
    before = next(images_of(trainer.loader, 1))
    subject = Subject(trainer, Protocol(timed_steps=1), [TRAINING])
    found = list(measure_augmentations(subject))
    assert [each.labels["augmentation"] for each in found] == [n for n in NAMES for _ in range(3)]
    absent = {each.labels["augmentation"] for each in found if each.status != "ok"}
    assert absent == {"mixup", "cutmix"}
    assert trainer.step == trainer.loader.epoch == 0
    assert torch.equal(next(images_of(trainer.loader, 1)), before)


def test_every_augmentation_has_columns_of_its_own(fakes: Fakes) -> None:
    keys = [rows._metric_key(each) for each in measure()]
    assert len(set(keys)) == 3 * len(NAMES)
    for key in (
        "augmentation_throughput_color_jitter_device",
        "augmentation_throughput_color_jitter_pil",
        "augmentation_headroom_color_jitter",
        "augmentation_throughput_none_device",
        "augmentation_headroom_recipe",
    ):
        assert key in keys
        table = [{"model": name, key: value} for name, value in (("a", 1.0), ("b", 2.0))]
        best = sort_rows(table, key.replace("_", "-"))
        assert [row["model"] for row in best] == ["b", "a"]


@pytest.mark.gpu
def test_everything_is_measured_on_a_gpu() -> None:
    from cifar.config import RunConfig

    trainer = make_trainer(run=RunConfig(), channels_last=True)
    found = list(measure_augmentations(Subject(trainer, Protocol(timed_steps=3), [TRAINING])))
    assert {each.status for each in by_name(found, "device").values()} == {"ok"}
