import importlib.util
import itertools
import multiprocessing
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_dataset
from test_anatomy import FakeClock, takes
from torch import Tensor
from training import make_trainer, tiny_recipe

from bench import rows
from bench.measure import clock, pipeline
from bench.measure.pipeline import make_dataloader, measure_pipeline
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement
from cifar.config import Recipe, RunConfig
from cifar.data.loader import Normalization
from cifar.trainer import Trainer

STEPS = 3
WORKERS = 2
ROUNDS = 4
"""Steps of a DataLoader's window: two of each worker."""
AHEAD = 2 * WORKERS


def measure(trainer: Trainer) -> dict[str, Measurement]:
    subject = Subject(trainer, Protocol(timed_steps=STEPS, min_timed_seconds=0.0))
    return {str(each.labels["source"]): each for each in measure_pipeline(subject)}


class FakeLoader:
    """A DataLoader whose every batch takes 0.5 s; after `good` of them it fails."""

    def __init__(self, good: int = 10**9, error: Exception | None = None) -> None:
        self.given, self.ended = 0, False
        self._good, self._error = good, error

    def __call__(self, _trainer: Trainer, count: int, workers: int) -> "FakeLoader":
        assert workers == WORKERS
        self.count = count
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            if self.given == self._good and self._error:
                raise self._error
            FakeClock.now += 0.5
            self.given += 1
            yield torch.zeros(2, 3, 4, 4), torch.zeros(2)
        self.ended = True


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> FakeLoader:
    """Our own loader takes 0.25 s a step."""
    fake = FakeLoader()
    FakeClock.made, FakeClock.cost = [], 0.0
    monkeypatch.setattr(Trainer, "batches_of", takes(0.25, Trainer.batches_of))
    monkeypatch.setattr(pipeline, "make_clock", FakeClock)
    monkeypatch.setattr(pipeline, "available_cores", lambda: WORKERS)
    monkeypatch.setattr(pipeline, "make_dataloader", fake)
    return fake


def test_our_loader_is_timed_over_the_next_steps_alone(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    trainer = make_trainer()
    trainer.train_step()
    asked: list[int] = []
    original = trainer.batches_of
    monkeypatch.setattr(trainer, "batches_of", lambda step: (asked.append(step), original(step)))
    found = measure(trainer)["device"]
    assert found.samples == ((0.25,) * STEPS,)
    assert found.labels == {"source": "device", "samples_per_step": 32}
    assert found.value == 32 / 0.25
    assert asked == list(range(1, 11)), "two that warm up, five that tell the pace"
    assert trainer.step == 1


def test_short_steps_fill_the_least_seconds_of_a_window(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    """On every rank as many as on the slowest, which does 9 in that time; here 0.25 s each."""
    now = SimpleNamespace(perf_counter=lambda: FakeClock.now)
    monkeypatch.setattr(clock, "time", now)
    subject = Subject(make_trainer(), Protocol(timed_steps=STEPS, min_timed_seconds=3.0))
    (alone, _) = measure_pipeline(subject)
    assert alone.samples == ((0.25,) * 12,)
    monkeypatch.setattr(pipeline, "least", lambda count, _: min(count, 9))
    (together, _) = measure_pipeline(subject)
    assert together.samples == ((0.25,) * 9,)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_dataloader_s_step_is_all_its_micro_batches(
    loader: FakeLoader, accumulation: int
) -> None:
    """Its window lies between batches that keep the workers busy, and it is used up."""
    found = measure(make_trainer(accumulation_steps=accumulation))["dataloader"]
    assert found.samples == ((0.5 * accumulation,) * ROUNDS,)
    assert found.labels == {
        "source": "dataloader",
        "num_workers": 2,
        "most_workers": 16,
        "samples_per_step": 32,
    }
    assert found.value == 32 / (0.5 * accumulation)
    assert loader.given == loader.count == (AHEAD + ROUNDS + AHEAD) * accumulation
    assert loader.ended


@pytest.mark.parametrize(("side", "share"), [(16, 0.25), (8, 0.0625), (64, 1.0)])
def test_the_square_that_is_erased_is_as_large_as_ours(side: int, share: float) -> None:
    erasing = pipeline._erasing(Recipe(augment=("cutout",), cutout_size=side), (32, 32))
    assert erasing.scale == (share, share)


@pytest.mark.parametrize(
    ("steps", "workers", "timed"), [(3, 2, 4), (8, 16, 32), (20, 16, 32), (40, 16, 48), (6, 1, 6)]
)
def test_the_window_holds_whole_rounds_of_the_workers(steps: int, workers: int, timed: int) -> None:
    assert pipeline.whole_rounds(steps, workers) == timed


def test_a_large_machine_starts_no_more_workers_than_it_says(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "available_cores", lambda: 224)
    monkeypatch.setattr(
        pipeline, "_dataloader_seconds", lambda _, workers: (asked.append(workers), [1.0])[1]
    )
    found = measure(make_trainer())["dataloader"]
    assert asked == [16]
    assert (found.labels["num_workers"], found.labels["most_workers"]) == (16, 16)


@pytest.mark.parametrize("good", [0, AHEAD + 1, AHEAD + ROUNDS + 1])
def test_a_dataloader_that_fails_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader, good: int
) -> None:
    error = RuntimeError("DataLoader worker (pid 7)\nis killed by signal: Bus error.")
    monkeypatch.setattr(pipeline, "make_dataloader", FakeLoader(good, error))
    found = measure(make_trainer())
    assert found["device"].status == "ok"
    assert found["dataloader"].status == "failed"
    assert found["dataloader"].reason == "DataLoader worker (pid 7) is killed by signal: Bus error."


def test_a_failure_in_another_process_is_told_here(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    monkeypatch.setattr(pipeline, "least", lambda count, _: count if count > 1 else 0)
    found = measure(make_trainer())["dataloader"]
    assert (found.status, "another process" in found.reason) == ("failed", True)


def test_a_failure_of_our_own_loader_is_no_failed_measurement(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "batches_of", lambda _: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        measure(trainer)


def test_without_torchvision_it_is_absent(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = measure(make_trainer())["dataloader"]
    assert (found.status, found.reason) == ("absent", "torchvision is not installed")
    assert loader.given == 0


def test_images_that_pil_does_not_know_are_absent(loader: FakeLoader) -> None:
    found = measure(make_trainer(data=make_dataset(channels=2)))["dataloader"]
    assert (found.status, found.reason) == ("absent", "PIL has no images of 2 channels")


def test_an_augmentation_without_a_counterpart_is_absent(
    monkeypatch: pytest.MonkeyPatch, loader: FakeLoader
) -> None:
    monkeypatch.setattr(pipeline, "_counterparts", lambda *_: {"crop": None})
    found = measure(make_trainer())["dataloader"]
    assert found.status == "absent"
    assert found.reason.endswith("no flip")


def test_the_workers_give_every_image_once_and_then_end() -> None:
    """One real worker, a process of its own, over the 96 images of an epoch."""
    trainer = make_trainer(tiny_recipe(augment=()))
    loader = make_dataloader(trainer, 3, 1)
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(32, 3, 16, 16)] * 3
    seen = torch.cat([images for images, _ in batches])
    labels = torch.cat([targets for _, targets in batches])
    true = trainer.loader.load(torch.arange(96))
    distance = torch.cdist(seen.flatten(1).double(), true.images.flatten(1).double())
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(96))
    torch.testing.assert_close(seen, true.images[nearest])
    assert torch.equal(labels, true.targets[nearest])
    assert multiprocessing.active_children() == []


def pil_images(trainer: Trainer, count: int) -> pipeline.PilImages:
    return pipeline.pil_images(trainer, trainer.config.recipe, count)


def indices_of(trainer: Trainer, count: int) -> list[int]:
    data = pil_images(trainer, count)
    true = trainer.dataset.train.images.transpose(0, 2, 3, 1).reshape(96, -1).astype(int)
    seen = (data[index][0].mul(255).round().permute(1, 2, 0) for index in range(len(data)))
    return [int(np.abs(true - image.numpy().reshape(-1)).sum(1).argmin()) for image in seen]


def test_no_image_comes_again_before_all_have_come() -> None:
    trainer = make_trainer(tiny_recipe(augment=()))
    trainer.normalization = Normalization(mean=(0.0,) * 3, std=(1.0,) * 3)
    chosen = indices_of(trainer, 2 * 96 + 10)
    for start, end in itertools.pairwise((0, 96, 192)):
        assert sorted(chosen[start:end]) == list(range(96))
    assert chosen[:96] != sorted(chosen[:96])
    assert len(chosen) == 202
    images = pil_images(trainer, 202)._images
    assert len(images) == 96, "each image travels to a worker once"
    assert len(pil_images(trainer, 5)._images) == 5


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentations_are_those_of_the_recipe(channels: int) -> None:
    data = make_dataset(channels=channels)
    torch.manual_seed(0)
    still = pil_images(make_trainer(tiny_recipe(augment=()), data=data), 8)
    moved = pil_images(make_trainer(data=data), 8)
    assert still[0][0].shape == moved[0][0].shape == (channels, 16, 16)
    assert torch.equal(still[0][0], still[0][0])
    assert any(not torch.equal(moved[i][0], moved[i][0]) for i in range(8))
    flipped = pil_images(make_trainer(tiny_recipe(augment=("flip",)), data=data), 8)
    ways = [{flipped[0][0].numpy().tobytes() for _ in range(20)}, set()]
    ways[1] = {still[0][0].numpy().tobytes(), still[0][0].flip(-1).numpy().tobytes()}
    assert ways[0] == ways[1]


def test_cutout_is_torchvision_s_erasing_of_the_finished_tensor(loader: FakeLoader) -> None:
    """It is no transform of PIL images, and yet no reason to compare with nothing."""
    cut = make_trainer(tiny_recipe(augment=("cutout",), cutout_size=4))
    assert measure(cut)["dataloader"].status == "ok"
    still = make_trainer(tiny_recipe(augment=()))
    for trainer in (cut, still):
        trainer.normalization = Normalization(mean=(0.0,) * 3, std=(1.0,) * 3)
    image, whole = (pil_images(trainer, 1)[0][0] for trainer in (cut, still))
    rows, columns = ((image != whole).any(0).any(dim).nonzero().view(-1) for dim in (1, 0))
    square = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert square.shape == (3, 4, 4)
    assert (square == 0).all()


def test_the_two_sources_have_columns_of_their_own() -> None:
    def measurement(**labels: Any) -> Measurement:
        return Measurement(
            name="input_throughput",
            unit="samples/s",
            better="higher",
            labels={"samples_per_step": 8, **labels},
            samples=((1.0,),),
        )

    assert rows._metric_key(measurement(source="device")) == "input_throughput_device"
    assert (
        rows._metric_key(measurement(source="dataloader", num_workers=2))
        == "input_throughput_dataloader"
    )


@pytest.mark.gpu
def test_a_dataloader_s_batches_reach_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 1)
    found = measure(make_trainer(run=RunConfig(), channels_last=True))
    assert [each.status for each in found.values()] == ["ok", "ok"]
    assert multiprocessing.active_children() == []
