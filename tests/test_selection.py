"""Early stopping: the best epoch on held-out images is kept, and no test image chooses it."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from training import after_step, cifar, kill, make_trainer, metrics, resume, tiny_recipe, train

from cifar.checkpoint import BestEpoch, list_checkpoints, load_weights, read_folder, read_tensors
from cifar.evaluation import Evaluation
from cifar.selection import Selection
from cifar.trainer import Trainer

HELD_OUT = ("--validation", "0.25", "--epochs", "6", "--ema-decay", "0")


def test_the_first_of_equally_good_epochs_is_kept() -> None:
    selection = Selection(patience=2)
    weights = {"w": torch.zeros(2)}
    for epoch, top1 in enumerate([0.1, 0.3, 0.3, 0.2], 1):
        weights["w"].fill_(epoch)
        selection.offer(epoch, top1, weights)
        assert selection.is_over(epoch) == (epoch == 4)
    assert selection.best == BestEpoch(epoch=2, top1=0.3)
    assert selection.weights["w"].tolist() == [2.0, 2.0], "a copy"


def test_without_patience_nothing_is_selected() -> None:
    selection = Selection(patience=0)
    selection.offer(1, 0.5, {"w": torch.zeros(2)})
    assert (selection.best, selection.weights) == (None, {})
    assert not selection.is_over(100)


@contextlib.contextmanager
def validation_top1(values: Sequence[float]) -> Iterator[None]:
    """What the validation images are said to score at the end of each epoch."""
    original = Trainer.evaluate

    def evaluate(self: Trainer, *words: Any, **options: Any) -> Evaluation:
        result = original(self, *words, **options)
        if options.get("images") is not self.validation_images:
            return result
        return dataclasses.replace(result, top1=values[self.epoch - 1])

    with mock.patch.object(Trainer, "evaluate", evaluate):
        yield


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_weights(run)[1]


def test_training_stops_and_the_best_weights_are_published(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with validation_top1([0.1, 0.4, 0.3, 0.4, 0.9, 0.9]):
        options = (*HELD_OUT, "--patience", "2", "--keep-checkpoints", "9", "--report")
        assert train(npz, run, *options) == 0
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4], "the fifth is never seen"
    assert [line["val_top1"] for line in lines] == [0.1, 0.4, 0.3, 0.4]
    shown = capsys.readouterr().out
    assert "epoch 2 was the best on the 24 validation images (top-1 40.00%)" in shown
    card, weights = load_weights(run)
    steps = lines[1]["step"]
    assert (card.step, card.samples_seen) == (steps, 32 * steps)
    second = read_folder(list_checkpoints(run / "checkpoints")[1])
    for name, tensor in read_tensors(second, "model", run).items():
        assert torch.equal(weights[name], tensor), name
    scores = json.loads((run / "report" / "scores.json").read_text())
    assert scores["top1"] == lines[1]["test_top1"]
    assert f"top-1 {scores['top1']:.2%} on 50 test images" in shown


def test_the_last_epoch_is_published_without_patience(npz: Path, tmp_path: Path) -> None:
    with validation_top1([0.9, 0.1]):
        assert train(npz, tmp_path / "run", "--validation", "0.25", "--ema-decay", "0") == 0
    last = read_folder(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    for name, tensor in read_tensors(last, "model", tmp_path).items():
        assert torch.equal(final(tmp_path / "run")[name], tensor)


@pytest.mark.parametrize("step", [3, 4, 7])
def test_a_run_that_is_resumed_chooses_as_if_it_had_never_stopped(
    npz: Path, tmp_path: Path, step: int
) -> None:
    """At the end of an epoch its evaluation is still to come; before it the best one is saved."""
    tops = [0.1, 0.4, 0.3, 0.4, 0.9, 0.9]
    runs = [tmp_path / name for name in ("straight", "stopped")]
    options = (*HELD_OUT, "--patience", "2")
    with validation_top1(tops):
        assert train(npz, runs[0], *options) == 0
        with after_step(step, kill(signal.SIGTERM)):
            assert train(npz, runs[1], *options) == 143
        assert resume(runs[1]) == 0
    assert metrics(runs[0]) == metrics(runs[1])
    for name, tensor in final(runs[0]).items():
        assert torch.equal(final(runs[1])[name], tensor), name


def test_a_finished_run_stays_finished(npz: Path, tmp_path: Path) -> None:
    with validation_top1([0.4, 0.1, 0.1, 0.9, 0.9, 0.9]):
        assert train(npz, tmp_path / "run", *HELD_OUT, "--patience", "2") == 0
        before = metrics(tmp_path / "run")
        with mock.patch.object(Trainer, "train_step") as step:
            assert resume(tmp_path / "run") == 0
    step.assert_not_called()
    assert metrics(tmp_path / "run") == before


def test_the_images_held_out_are_told_from_the_others(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(npz, run, "--validation", "0.25", "--limit-train", "80", "--epochs", "1") == 0
    assert "(60 train, 20 validation, 50 test images)" in capsys.readouterr().out
    for split, count in (("train", 60), ("validation", 20), ("test", 50)):
        assert cifar("evaluate", run, "--cpu", "--json", "--split", split) == 0
        assert json.loads(capsys.readouterr().out)["samples"] == count


def test_images_that_were_not_held_out_are_one_line(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path / "run", "--epochs", "1") == 0
    capsys.readouterr()
    assert cifar("evaluate", tmp_path / "run", "--cpu", "--split", "validation") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: split: 'validation': no images were held out when")


def test_the_trainer_never_sees_what_is_held_out() -> None:
    trainer = make_trainer(tiny_recipe(validation=0.25, global_batch_size=12))
    held_out = {image.tobytes() for image in trainer.dataset.validation.images}
    seen = {image.tobytes() for image in trainer.dataset.train.images}
    assert (len(trainer.validation_images), len(trainer.dataset.train)) == (24, 72)
    assert not held_out & seen
    assert trainer.fingerprint == make_trainer().fingerprint, "of the whole data set"
