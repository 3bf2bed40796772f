"""The range test: its arithmetic on curves made by hand, its training, and the commands."""

import ast
import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import shlex
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import make_dataset, save_npz
from PIL import Image
from test_multiprocess import launch
from test_run import assert_same
from training import (
    TINY,
    TINY_OPTIONS,
    after_step,
    cifar,
    complaints,
    finish,
    kill,
    metrics,
    reset_accelerate,
    resume,
    start,
    tiny_recipe,
    train,
)

from cifar import commands, run_folder
from cifar.checkpoint import load_weights
from cifar.config import Recipe, RunConfig, TrainConfig
from cifar.errors import TrainingError
from cifar.lr_finder import RisingTrainer, find_curve
from cifar.range_test import Curve, RangeTest, suggest, tuned
from cifar.train_options import read_train_options

SHORT = RangeTest(lowest=1e-4, highest=10, steps=40)
SHORT_OPTIONS = ("--lowest", "1e-4", "--highest", "10", "--steps", "40")


def lr_find(npz: Path, output: Path, *options: object) -> int:
    """`cifar lr-find` on the toy data set."""
    return cifar("lr-find", "--cpu", "--data", f"npz:{npz}", "--output", output,
                 "--model", "resnet20-w4", "-b", "32", *SHORT_OPTIONS, *options)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_npz(tmp_path_factory.mktemp("toy") / "toy.npz", make_dataset())


@pytest.fixture(scope="module")
def found(toy: Path) -> Path:
    """The folder of one `cifar lr-find`, which several tests look into."""
    folder = toy.parent / "found"
    assert lr_find(toy, folder) == 0
    return folder


def test_every_step_multiplies_the_learning_rate_by_the_same_factor() -> None:
    test = RangeTest(lowest=0.5, highest=2.0**20, steps=22)
    assert [test.lr_of(step) for step in range(22)] == pytest.approx(
        [2.0 ** (step - 1) for step in range(22)], rel=1e-12
    )


def curve_of(*losses: float, steps: int = 20, guess: float = 1.0) -> Curve:
    curve = Curve(RangeTest(lowest=1, highest=2.0 ** (steps - 1), steps=steps), guess)
    for loss in losses:
        curve.add(loss)
    return curve


def test_losses_are_averaged_over_a_tenth_of_the_steps() -> None:
    """Of 20 steps: by halves. The average starts at 0, which is corrected for."""
    curve = curve_of(4.0, 2.0, 2.0)
    assert curve.smoothed == pytest.approx([4.0, 2 / 0.75, 2 / 0.875])
    assert (curve.losses, curve.lrs) == ([4.0, 2.0, 2.0], pytest.approx([1, 2, 4]))
    ninths = curve_of(3.0, 1.0, steps=100)
    assert ninths.smoothed == pytest.approx([3.0, (0.9 * 0.3 + 0.1) / 0.19])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_curve_before_it(loss: float) -> None:
    curve = curve_of(2.0, 1.0, loss, 1.0)
    assert curve.losses == [2.0, 1.0] and curve.is_broken and curve.is_over


def test_a_loss_of_four_times_the_lowest_ends_the_curve_with_it() -> None:
    curve = curve_of(1.0, 1.0, 7.0, 50.0)
    assert curve.losses == [1.0, 1.0, 7.0] and curve.is_broken, "3.875 / 0.875 is 4.43"
    assert not curve_of(1.0, 1.0, 6.2).is_broken, "3.475 / 0.875 is 3.97"


def test_a_loss_that_is_hardly_worse_than_guessing_is_not_broken() -> None:
    losses = [*[0.1] * 10, 8.0]
    curve = curve_of(*losses, guess=4.0)
    assert curve.smoothed[-1] > 4 * min(curve.smoothed) and not curve.is_broken
    assert curve_of(*losses, guess=3.6).is_broken, "4.05 on average, of 3.96"


def test_a_curve_is_over_when_all_steps_are_done() -> None:
    curve = curve_of(*[1.0] * 19)
    assert not curve.is_over
    curve.add(1.0)
    curve.add(1.0)
    assert curve.is_over and not curve.is_broken and len(curve.losses) == 20


LRS = [10.0**power for power in range(10)]


@pytest.mark.parametrize(
    ("smoothed", "expected"),
    [
        ([2.6, 2.2, 2.0, 1.9, 1.6, 1.2, 1.0, 1.3, 1.5, 2.3], 4e5),
        ([2.6, 1.7, 1.9, 2.0, 1.6, 1.5, 1.0, 1.3, 1.5, 2.3], 4e5),
        ([2.6, 2.2, 1.9, 1.5, 1.2, 2.5, 1.3, 1.0, 1.1, 4.0], 4e3),
        ([2.6, 2.2, 2.0, 1.9, 1.9, 1.4, 2.2, 2.3, 3.0, 2.3], 4e5),
        ([2.6, 2.2, 2.0, 1.9, 1.9, 1.4, 2.3, 2.5, 3.0, 2.3], 1e5),
        ([2.6, 2.2, 2.0, 1.9, 1.4, 1.0, 1.1, 1.2, 2.0, 2.2], 4e4),
    ],
    ids=["valley", "noise before", "the first of two", "narrow", "narrower", "unbroken"],
)
def test_the_suggestion_is_bounded_by_where_learning_begins_and_where_the_loss_breaks(
    smoothed: list[float], expected: float
) -> None:
    """Guessing has a loss of 2, and 2.2 is hardly worse."""
    assert suggest(LRS, smoothed, 2.0) == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_the_break() -> None:
    assert curve_of(1.0, 1.0, 0.5, math.nan).suggest() == pytest.approx(0.8), "a tenth of 8"


@pytest.mark.parametrize(
    ("smoothed", "told"),
    [
        ([math.inf], "does not fall below 2, that of guessing, at learning rates 1 to 1;"),
        ([2.6, 2.0, 1.97, 2.0, 9.0], r"does not fall below 2, .* rates 1 to 1e\+04; try .*--steps"),
        ([2.6, 2.0, 1.9, 1.8, 1.5, 1.0], r"falls late .* rates 1 to 1e\+05; try .*--highest"),
    ],
)
def test_a_curve_that_shows_too_little_suggests_nothing(smoothed: list[float], told: str) -> None:
    with pytest.raises(TrainingError, match=f"^range test: the loss {told}"):
        suggest(LRS[: len(smoothed)], smoothed, 2.0)


def test_what_is_found_has_two_digits_and_muon_s_step_in_proportion() -> None:
    recipe = Recipe(optimizer="muon", lr=0.1, muon_step=0.03)
    for optimizer, step in (("muon", 0.037), ("sgd", 0.03)):
        config = TrainConfig(recipe=dataclasses.replace(recipe, optimizer=optimizer))
        with mock.patch.object(Curve, "suggest", return_value=0.1234):
            found = tuned(config, curve_of())
        assert (found.recipe.lr, found.recipe.muon_step) == (0.12, step)
        assert dataclasses.replace(found.recipe, lr=0.1, muon_step=0.03) == config.recipe


def test_muon_s_step_is_never_longer_than_any_that_is_known_to_be_of_use() -> None:
    recipe = Recipe(optimizer="muon", lr=0.005, muon_step=0.03)
    with mock.patch.object(Curve, "suggest", return_value=0.2):
        found = tuned(TrainConfig(recipe=recipe), curve_of())
    assert (found.recipe.lr, found.recipe.muon_step) == (0.042, 0.25), "not 1.2"


def rising(test: RangeTest = SHORT, **fields: Any) -> RisingTrainer:
    reset_accelerate()
    config = {name: fields.pop(name) for name in ("accumulation_steps",) if name in fields}
    config = TrainConfig(model=TINY, recipe=tiny_recipe(**fields), **config)
    return RisingTrainer(config, RunConfig(cpu=True), make_dataset(), test)


def test_nothing_is_frozen_in_a_range_test() -> None:
    trainer = rising(frozen_epochs=1)
    before = trainer.module.conv1.weight.clone()
    trainer.train_step()
    assert not torch.equal(trainer.module.conv1.weight, before)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw"])
def test_only_the_learning_rate_rises(optimizer: str) -> None:
    """One-cycle and its momentum, too, wait for the training."""
    trainer = rising(optimizer=optimizer, schedule="one-cycle", ema_decay=0.9)
    (group, *_), seen = trainer.optimizer.param_groups, []
    for _ in range(5):
        trainer.train_step()
        seen.append((group["lr"], group["betas"][0] if optimizer == "adamw" else group["momentum"]))
    momentum = 0.6 if optimizer == "muon" else 0.9
    assert seen == [(SHORT.lr_of(step), momentum) for step in range(5)]
    assert trainer.average is None and trainer.total_steps == 40


def test_muon_s_step_rises_in_proportion() -> None:
    """At twice the recipe's learning rate it is twice the recipe's."""
    trainer = rising(RangeTest(lowest=0.1), optimizer="muon", lr=0.05, muon_step=0.01)
    weight = trainer.optimizer.param_groups[0]["params"][0].detach()
    before = weight.clone()
    trainer.train_step()
    moved = float((weight - before).norm() / before.norm())
    assert moved == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    "fields", [{}, {"sam_rho": 0.1}, {"mixup": 1.0}, {"accumulation_steps": 2}]
)
def test_the_loss_of_a_step_is_that_of_its_first_pass(fields: dict[str, Any]) -> None:
    """Of all its micro-batches, which have as many images each."""
    trainer, computed = rising(**fields), []
    compute_loss = trainer.compute_loss

    def watched(*words: Any) -> Any:
        loss, logits = compute_loss(*words)
        computed.append(loss.item())
        return loss, logits

    trainer.compute_loss = watched
    trainer.train_step()
    trainer.train_step()
    if "accumulation_steps" in fields:
        expected = [(computed[0] + computed[1]) / 2, (computed[2] + computed[3]) / 2]
    else:
        expected = [computed[0], computed[trainer.config.recipe.passes]]
    assert trainer.losses.read() == pytest.approx(expected, rel=1e-6)
    trainer.train_step()
    assert len(trainer.losses.read()) == 1, "those since the last reading"


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.2, "mixup": 1.0}])
def test_guessing_has_the_loss_of_equal_chances(fields: dict[str, Any]) -> None:
    trainer = rising(accumulation_steps=2, **fields)
    assert trainer.loss_of_guessing() == pytest.approx(math.log(10))


def curve_with(test: RangeTest, *, check_every: int | None = None, **fields: Any) -> Curve:
    reset_accelerate()
    config = TrainConfig(model=TINY, recipe=tiny_recipe(**fields))
    return find_curve(config, RunConfig(cpu=True, check_every=check_every), make_dataset(), test)


def test_a_test_is_the_same_however_often_its_losses_are_read() -> None:
    """It stops once the loss has broken, and the curve ends with that loss."""
    test = RangeTest(lowest=1e-3, highest=1e6, steps=30)
    often, seldom = curve_with(test, check_every=1), curve_with(test, check_every=30)
    assert (often.losses, often.smoothed) == (seldom.losses, seldom.smoothed)
    assert often.is_broken and seldom.is_broken and len(often.losses) < 30


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "lr-find.csv").read_text())))


def test_the_curve_is_written_as_a_picture_and_numbers(found: Path) -> None:
    assert {path.name for path in found.iterdir()} == {"lr-find.csv", "lr-find.json", "lr-find.png"}
    rows = rows_of(found)
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    lrs, losses, smoothed = (
        [float(row[name]) for row in rows] for name in ("lr", "loss", "smoothed")
    )
    assert lrs == [SHORT.lr_of(step) for step in range(len(rows))]
    told = json.loads((found / "lr-find.json").read_text())
    assert told["loss_of_guessing"] == pytest.approx(math.log(10))
    curve = Curve(SHORT, told["loss_of_guessing"])
    for loss in losses:
        curve.add(loss)
    assert smoothed == curve.smoothed
    assert (told["lowest"], told["highest"], told["steps"]) == (1e-4, 10, 40)
    assert told["steps_taken"] == len(rows) and told["is_broken"] == curve.is_broken
    assert told["config"]["model"]["width"] == 4 and told["config"]["recipe"]["optimizer"] == "muon"
    assert told["suggested"]["lr"] == float(f"{curve.suggest():.2g}")
    with Image.open(found / "lr-find.png") as picture:
        picture.load()
        assert min(picture.size) > 300


def test_the_command_that_is_printed_trains_with_what_was_found(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: Path
) -> None:
    """Which is the same for the same seed."""
    capsys.readouterr()
    assert lr_find(toy, tmp_path / "a", "--muon-step", "0.03") == 0
    assert (tmp_path / "a" / "lr-find.csv").read_bytes() == (found / "lr-find.csv").read_bytes()
    *_, line, command = capsys.readouterr().out.splitlines()
    told = json.loads((tmp_path / "a" / "lr-find.json").read_text())["suggested"]
    lr, step = f"{told['lr']:g}", f"{told['muon_step']:g}"
    assert line == f"suggested: lr {lr}, muon-step {step}; the curve is in {tmp_path / 'a'}"
    assert shlex.split(command) == [
        *("cifar", "train", "--cpu", "--data", f"npz:{toy}", "--model", "resnet20-w4", "-b", "32"),
        *("--lr", lr, "--muon-step", step),
    ]
    read = read_train_options(shlex.split(command)[2:])
    assert read.train.recipe.lr == told["lr"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--resume", "runs/x"), "--resume: is for cifar train; leave it out"),
        (("--lr", "0.1"), "--lr: is what is looked for; leave it out"),
        (("--lr=auto",), "--lr: is what is looked for; leave it out"),
        (("--output-dir", "x"), "--output-dir: is for the folder of a run; name .* with --output"),
        (("--save_every", "3"), "--save-every: is for cifar train; leave it out"),
        (("--no-report",), "--no-report: is for cifar train; leave it out"),
        (("--lowest", "0"), "lowest: 0.0: give a positive number"),
        (("--lowest", "1", "--highest", "1"), "highest: 1.0: give more than the lowest, 1"),
        (("--highest", "inf"), "highest: inf: give more than the lowest, 0.0001"),
        (("--steps", "19"), "steps: 19: give 20 to 100000"),
        (("--augment", "flip", "--crop-padding", "3"), "crop-padding: 3: is for crop"),
        (("--max-skipped-steps", "3"), "max-skipped-steps: '3': is for fp16"),
        (("--model", "resnet19"), "model: 'resnet19': choose one of"),
        (("-b", "97"), "batch-size: 97: larger than the 96 training images"),
        (("--output", "toy.npz/x"), "output: 'toy.npz/x': cannot be written; give another folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    npz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(npz.parent)
    assert lr_find(npz, npz.parent / "found", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"cifar: {told}", line)
    assert [path.name for path in npz.parent.iterdir()] == ["toy.npz"]


def test_a_curve_that_suggests_nothing_is_one_line_and_there_to_be_looked_at(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--lowest", "1e-9", "--highest", "1e-8", "--steps", "20")
    assert lr_find(toy, tmp_path / "found", *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"; the curve is in {tmp_path / 'found'}")
    assert line.startswith("cifar: range test: the loss does not fall below 2.3")
    assert len(rows_of(tmp_path / "found")) == 20
    assert json.loads((tmp_path / "found" / "lr-find.json").read_text())["suggested"] is None


def auto(test: RangeTest = SHORT) -> contextlib.AbstractContextManager[object]:
    """While entered, `--lr auto` makes this test."""
    return mock.patch.object(commands, "RangeTest", return_value=test)


@pytest.fixture(scope="module")
def trained(toy: Path) -> Path:
    """The folder of a run with `--lr auto`."""
    folder = toy.parent / "trained"
    with auto():
        assert train(toy, folder, "--lr", "auto") == 0
    return folder


def test_lr_auto_trains_bit_for_bit_as_with_the_number_it_finds(
    toy: Path, tmp_path: Path, found: Path, trained: Path
) -> None:
    """And the curve is that of lr-find with the same options."""
    recipe = run_folder.read_config(trained).train.recipe
    told = json.loads((trained / "lr-find" / "lr-find.json").read_text())["suggested"]
    assert told == {"lr": recipe.lr, "muon_step": recipe.muon_step}
    assert recipe.lr not in (0.05, 0.15), "those of the options and of the recipe"
    for name in ("lr-find.csv", "lr-find.png"):
        assert (trained / "lr-find" / name).read_bytes() == (found / name).read_bytes()
    given = tmp_path / "given"
    assert train(toy, given, "--lr", recipe.lr, "--muon-step", recipe.muon_step) == 0
    assert_same(given, trained)
    assert not (given / "lr-find").exists()


def test_a_run_that_is_resumed_keeps_the_number(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cifar.run.find_lr", None)  # is not called
    lr, before = run_folder.read_config(trained).train.recipe.lr, metrics(trained)
    assert resume(trained, "--lr", "auto") == 2
    assert capsys.readouterr().err == (
        f"cifar: lr: 'auto': the run to resume has {lr!r}; leave it out, or start a new run\n"
    )
    assert resume(trained, "--lr", lr) == 0
    assert metrics(trained) == before


def test_lr_auto_that_finds_nothing_is_one_line_and_leaves_no_run(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with auto(RangeTest(lowest=1e-9, highest=1e-8, steps=20)):
        assert train(toy, tmp_path / "run", "--lr", "auto") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the loss does not fall" in line and "cifar lr-find" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["lr-find", "train"])
def test_a_signal_ends_a_test_with_one_line_and_leaves_nothing(
    toy: Path, tmp_path: Path, command: str, number: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "folder"
    with auto(), after_step(3, kill(number)):
        words = (folder, "--lr", "auto") if command == "train" else (folder,)
        assert (train if command == "train" else lr_find)(toy, *words) == 128 + number
    assert capsys.readouterr().err == (
        f"cifar: stopped by signal {number} after step 3 of the range test; nothing is kept\n"
    )
    assert not folder.exists()


TWO = """
import os, sys
from pathlib import Path
from cifar import lr_finder
from cifar.commands import main
find_curve = lr_finder.find_curve
def written(*words):
    curve = find_curve(*words)
    name = os.environ["CURVES"] + os.environ["RANK"]
    Path(name).write_text(repr((curve.losses, curve.smoothed, curve.is_broken)))
    return curve
lr_finder.find_curve = written
sys.exit(main())
"""
"""Every process writes down the curve that it got."""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_get_the_same_curve_and_train_with_one_learning_rate(
    toy: Path, tmp_path: Path
) -> None:
    """Losses are the means of both: that of guessing shows it."""
    (tmp_path / "two.py").write_text(TWO)
    options = ("--cpu", "--data", f"npz:{toy}", "--model", "resnet20-w4", "-b", 32,
               *SHORT_OPTIONS, "--output", tmp_path / "found")  # fmt: skip
    program = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "two.py")
    environment = {"CURVES": f"{tmp_path}/curve", "CIFAR_RESTARTED": "1"}
    process = start(*program, "lr-find", *options, environment=environment)
    code, out, err = finish(process)
    assert code == 0, err
    assert complaints(err) == [] and out.count("suggested: lr ") == out.count("cifar train ") == 1
    curves = [(tmp_path / f"curve{rank}").read_text() for rank in range(2)]
    assert curves[0] == curves[1]
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "found")]
    assert losses == ast.literal_eval(curves[0])[0]
    told = json.loads((tmp_path / "found" / "lr-find.json").read_text())
    assert told["loss_of_guessing"] == pytest.approx(math.log(10))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_find_a_learning_rate_and_train_with_it(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--data", f"npz:{toy}", "--output-dir", folder, "--epochs", 1, "--lr", "auto")
    code, out, err = finish(launch(2, "train", "--cpu", *TINY_OPTIONS, *options))
    assert code == 0, err
    recipe = run_folder.read_config(folder).train.recipe
    assert f"range test: trains with lr {recipe.lr:g}, muon-step {recipe.muon_step:g}\n" in out
    assert out.count("range test: trains") == out.count("epoch 1/1") == 1 and complaints(err) == []
    assert recipe.lr != 0.05 and float(rows_of(folder / "lr-find")[0]["lr"]) == 1e-4
    assert load_weights(folder)[0].step == 3
