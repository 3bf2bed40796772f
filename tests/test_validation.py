"""A trial's worker: epochs scored on held-out images and told on the way, and nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from test_bench_cli import environ

from bench import runs
from bench.job import Job
from bench.record import Record
from bench.spec import Task, grid
from bench.tuning import SUITE, curve_of, told_by, trial_protocol, trials_of
from bench.unfinished import is_unfinished
from bench.worker import Worker
from cifar.config import RunConfig
from cifar.data.config import parse_data
from cifar.data.sources import load_dataset
from cifar.errors import ConfigError
from cifar.trainer import Trainer

EPOCHS = 3


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_task(npz: Path, **recipe: object) -> Task:
    """A quarter of the 96 images is held out; the others are four steps of 16 and eight left."""
    data = parse_data(f"npz:{npz}")
    (cell,) = grid(["resnet20-w4"], ["fp32"], batch_sizes=(16,), data=data)
    fields = {"epochs": EPOCHS, "validation": 0.25, **recipe}
    train = replace(cell.train, recipe=replace(cell.train.recipe, **fields))
    return Task(cell=replace(cell, train=train), protocol=trial_protocol(), repeat=2)


def worked(task: Task) -> tuple[Record, list[Record]]:
    """The record of a trial, and those that were kept on the way."""
    kept: list[Record] = []
    return Worker(Job(task=task, suite=SUITE), kept.append).run(), kept


def test_every_epoch_is_scored_on_the_held_out_images_and_told(npz: Path, monkeypatch) -> None:
    task, scored = make_task(npz), []
    evaluate = Trainer.evaluate

    def spy(trainer: Trainer, *args: object, **options: object) -> object:
        scored.append((options["images"] is trainer.validation_images, trainer.step))
        return evaluate(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "evaluate", spy)
    record, kept = worked(task)
    assert scored == [(True, 4), (True, 8), (True, 12)], "the test images never are"
    assert (record.status, record.reason, record.valid) == ("ok", "", True)
    assert all(map(is_unfinished, kept))
    assert [len(curve_of(each)) for each in kept] == [0, 0, 1, 2]
    assert [curve_of(each) for each in kept[2:]] == [curve_of(record)[:1], curve_of(record)[:2]]
    assert {each.name for each in record.measurements} == {
        "epoch_validation_top1", "epoch_validation_loss", "validation_top1", "validation_loss",
    }  # fmt: skip
    reached = record.find("validation_top1")
    assert reached is not None and reached.value == curve_of(record)[-1]
    assert reached.labels == {
        "split": "validation", "weights": "average", "samples": 24, "trained_samples": 192,
    }  # fmt: skip
    assert told_by(record).state == "finished" and told_by(record).number == 2
    assert record.data is not None and record.data.train_samples == 72


def test_a_trial_trains_as_the_trainer_does_and_proves_what_ran(npz: Path) -> None:
    task = make_task(npz)
    record, kept = worked(task)
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(task.cell.train, RunConfig(), load_dataset(task.cell.train.data))
    expected = []
    for _ in range(EPOCHS):
        for _ in range(4):
            trainer.train_step()
        expected.append(trainer.evaluate(images=trainer.validation_images))
    assert curve_of(record) == tuple(each.top1 for each in expected)
    assert record.value("validation_loss") == pytest.approx(expected[-1].loss, rel=1e-6)
    for known, steps in ((record, 12), (kept[2], 4)):
        found = known.effective
        assert (found["steps"], found["samples_seen"]) == (steps, 16 * steps)
        assert (found["device"], found["input_dtype"]) == ("cpu", "float32")


def test_a_trial_that_computes_in_another_format_has_failed(npz: Path, monkeypatch) -> None:
    init = Trainer.__init__

    def in_bf16(trainer: Trainer, *args: object, **options: object) -> None:
        init(trainer, *args, **options)
        autocast = torch.autocast("cpu", torch.bfloat16)
        trainer.module.forward = autocast(trainer.module.forward)

    monkeypatch.setattr(Trainer, "__init__", in_bf16)
    record, _ = worked(make_task(npz, epochs=1))
    assert record.status == "failed" and "bfloat16" in record.reason


def test_a_trial_that_diverges_is_an_answer(npz: Path) -> None:
    record, _ = worked(make_task(npz, lr=1e6, label_smoothing=0.0))
    told = told_by(record)
    assert (record.status, told.state, told.top1) == ("ok", "diverged", None)
    assert "not finite" in told.reason and told.is_answer
    assert record.value("validation_top1") is None and len(told.curve) < EPOCHS


def test_such_a_protocol_is_for_nothing_else() -> None:
    for fields, message in (
        ({"metrics": ("anatomy",)}, "validation-alone: True: measures nothing else"),
        ({"training_alone": True}, "validation-alone: True: measures nothing else"),
        ({"train_samples": 1_000}, "train-samples: 1000: not with validation-alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(trial_protocol(), **fields)
    assert replace(trial_protocol(), validation_alone=False).digest != trial_protocol().digest


@pytest.mark.slow
def test_a_real_search(npz: Path, tmp_path: Path) -> None:
    words = ["search", "sgd", "--model", "resnet20-w4", "--data", f"npz:{npz}", "--trials", "2"]
    words += ["--epochs", "2", "-b", "16", "--lr", "0.01..1", "--validation", "0.25"]
    words += ["--num-processes", "2", "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        env=environ(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = runs.newest(tmp_path).records()
    assert [record.status for record in records] == ["ok", "ok"]
    assert "best: trial " in done.stdout and (runs.newest(tmp_path).folder / "best.json").exists()
    assert trials_of(records)[0].top1 is not None
