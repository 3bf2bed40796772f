"""A search for a recipe: what is drawn and pruned, resuming, trials side by side, the answer."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fake_worker import (
    DATA,
    begun_trial,
    environment,
    reached,
    record_of,
    trial_of,
)
from test_bench_cli import FAKE, bench, environ

from bench import runs, trials
from bench.best import changes, command, render, summarise
from bench.columns import DASH, trial_columns
from bench.commands import main
from bench.counters import usable_cores
from bench.devices import Device, Machine
from bench.frontier_search import FrontierSearch
from bench.job import RECORD_FILE, Job
from bench.launchers import launch
from bench.record import Record
from bench.record_file import append_record
from bench.runs import Run
from bench.sampler import JUDGED_AFTER, propose, verdict
from bench.space import Parameter, Range, read_parameter, value_of, with_values
from bench.spec import Cell, Plan, Suite, Task
from bench.table import render_markdown
from bench.trial_rows import told_apart, trial_rows
from bench.tuning import SUITE, Trial, Tuning, best_of, told_by, trial_protocol, trials_of
from bench.tuning_options import build_search, options_class
from bench.unfinished import no_validation, pruned
from cifar.cli import parse
from cifar.config import ModelConfig, TrainConfig
from cifar.errors import ConfigError
from cifar.files import write_atomic
from cifar.recipes import get_config
from cifar.serialize import from_json, to_json
from cifar.train_options import read_train_options

pytestmark = pytest.mark.usefixtures("own_locks")

CORES = ",".join(f"cpu:{core}" for core in sorted(usable_cores())[:2])
NAMED = get_config("sgd")
BASE = with_values(
    replace(NAMED, model=ModelConfig(name="resnet20"), precision="fp32"),
    {"epochs": 4, "validation": 0.1},
)


def space_of(**texts: str) -> tuple[Parameter, ...]:
    return tuple(read_parameter(field, text) for field, text in texts.items())


SPACE = space_of(lr="0.01..1", global_batch_size="32,64,128")
TUNING = Tuning(space=SPACE, trials=12)


def make(values: Mapping[str, object]) -> TrainConfig:
    return with_values(BASE, values)


def trial(number: int, lr: float, **fields: object) -> Trial:
    """A finished trial, unless its fields say otherwise."""
    train = make({"lr": lr})
    top1 = reached(train)
    known = {"state": "finished", "top1": top1, "loss": 1 - top1, "curve": (top1 / 2, top1)}
    return Trial(number=number, train=train, **known | {"samples": 100} | fields)


# --- What is drawn ---


def drawn(train: TrainConfig | None, *names: str) -> tuple[object, ...]:
    assert train is not None
    return tuple(value_of(train, name) for name in names or ("lr", "global_batch_size"))


def test_a_draw_depends_on_seed_number_and_trials_alone() -> None:
    past = [trial(number, 0.02 * (number + 1)) for number in range(11)]
    for known in ([], past):
        first = propose(TUNING, make, 11, known)
        assert propose(TUNING, make, 11, list(reversed(known))) == first
        assert propose(TUNING, make, 12, known) != first
        assert propose(replace(TUNING, seed=1), make, 11, known) != first
    assert propose(TUNING, make, 11, past) != propose(TUNING, make, 11, past[:10])


def test_every_kind_of_field_is_drawn_and_remembered() -> None:
    """Beyond the first ten, which know of nothing."""
    space = space_of(global_batch_size="32..512", dropout="0..0.5", lr="0.1,0.2",
                     rand_magnitude="3..9", augment="none|rand-augment",
                     schedule="cosine,linear")  # fmt: skip
    known: list[Trial] = []
    for number in range(14):
        train = propose(Tuning(space=space, trials=14), make, number, known)
        assert train is not None
        assert all(each.holds(value_of(train, each.field)) for each in space)
        assert isinstance(train.recipe.global_batch_size, int)
        known.append(Trial(number=number, train=train, state="finished", top1=0.5, loss=1.0))
    sizes = {each.train.recipe.global_batch_size for each in known}
    assert len(sizes) > 10 and any(size < 128 for size in sizes), "half of a logarithmic scale"


def test_draws_lie_in_the_space_and_spread_over_it() -> None:
    found = [drawn(propose(TUNING, make, number)) for number in range(40)]
    rates, sizes = zip(*found, strict=True)
    assert all(0.01 <= rate <= 1 for rate in rates) and set(sizes) == {32, 64, 128}
    assert 10 <= sum(rate < 0.1 for rate in rates) <= 30, "half of a logarithmic scale"


def test_draws_come_to_lie_where_trials_were_good() -> None:
    """Of 20 trials those of a large learning rate were the better ones."""
    grid = [0.01 * 100 ** (step / 19) for step in range(20)]
    past = [trial(n, lr, top1=lr, loss=0.0, curve=()) for n, lr in enumerate(grid)]
    rates = [drawn(propose(TUNING, make, number, past))[0] for number in range(20, 40)]
    assert sum(rate > 0.3 for rate in rates) > 10, "a quarter of the scale"


def test_what_diverged_or_had_no_room_is_kept_away_from() -> None:
    """Where the others finished equally well."""
    grid = [0.01 * 100 ** (step / 19) for step in range(20)]
    for state in ("diverged", "oom"):
        bad = {"state": state, "top1": None, "loss": None, "curve": ()}
        past = [trial(n, lr, **(bad if lr > 0.1 else {"top1": 0.5})) for n, lr in enumerate(grid)]
        rates = [drawn(propose(TUNING, make, number, past))[0] for number in range(20, 40)]
        assert sum(rate > 0.1 for rate in rates) < 5, f"half of the scale {state}"


def test_nothing_is_tried_twice_and_an_end_is_an_end() -> None:
    tuning = Tuning(space=space_of(global_batch_size="32,64", optimizer="sgd,adam"), trials=4)
    known: list[Trial] = []
    for number in range(4):
        running = [each.train for each in known[2:]]
        train = propose(tuning, make, number, known[:2], running)
        assert train is not None
        known.append(Trial(number=number, train=train, state="failed"))
    assert len({drawn(each.train, "global_batch_size", "optimizer") for each in known}) == 4
    assert propose(tuning, make, 4, known) is None


def test_what_no_trial_reads_makes_no_other_setting() -> None:
    space = space_of(augment="crop|cutout", cutout_size="4,8")
    known: list[Trial] = []
    while (train := propose(Tuning(space=space, trials=4), make, len(known), known)) is not None:
        known.append(Trial(number=len(known), train=train, state="failed"))
    assert len(known) == 3, "crop; cutout of 4; cutout of 8"


def test_what_does_not_go_together_is_not_drawn() -> None:
    space = space_of(schedule="one-cycle,cosine", warmup_epochs="0,1")
    tuning = Tuning(space=space, trials=4)
    known: list[Trial] = []
    while (train := propose(tuning, make, len(known), known)) is not None:
        known.append(Trial(number=len(known), train=train, state="failed"))
    found = {drawn(each.train, "schedule", "warmup_epochs") for each in known}
    assert found == {("one-cycle", 0.0), ("cosine", 0.0), ("cosine", 1.0)}


# --- What is pruned ---


def finished(*second_epochs: float) -> list[Trial]:
    """Trials that reached so much after their second epoch, the half after their first."""
    return [
        trial(number, 0.1, curve=(top1 / 2, top1, 1.0), top1=1.0)
        for number, top1 in enumerate(second_epochs)
    ]


FIVE = finished(0.1, 0.2, 0.3, 0.4, 0.5)
"""Their median after two epochs is 0.3."""


@pytest.mark.parametrize(
    ("curve", "is_pruned"),
    [((0.0,), False), ((0.1, 0.29), True), ((0.1, 0.3), False), ((0.35, 0.1), False),
     ((0.1, 0.3, 0.9), True), ((), False)],
)  # fmt: skip
def test_a_trial_below_the_median_is_pruned_from_its_second_epoch_on(curve, is_pruned) -> None:
    """What counts is the best that it has reached; after three epochs the others had 1."""
    assert bool(verdict(TUNING, FIVE, curve, 4)) == is_pruned


def test_the_reason_says_when_and_why() -> None:
    assert verdict(TUNING, FIVE, (0.1, 0.2875), 4) == (
        "pruned after epoch 2 of 4: top-1 28.75% is below the median of the 5 trials that came "
        "to their end"
    )


def test_too_few_finished_trials_prune_none() -> None:
    assert len(FIVE) == JUDGED_AFTER
    assert verdict(TUNING, FIVE[1:], (0.0, 0.0), 4) == ""
    stopped = [replace(each, state="pruned", top1=None, loss=None) for each in FIVE]
    assert verdict(TUNING, [*FIVE[1:], *stopped], (0.0, 0.0), 4) == ""
    assert verdict(replace(TUNING, pruning=False), FIVE, (0.0, 0.0), 4) == ""


# --- What records tell ---


def job_of(number: int, lr: float = 0.1, **values: object) -> Job:
    cell = Cell(train=make({"lr": lr, **values}))
    task = Task(cell=cell, protocol=trial_protocol(), repeat=number)
    return Job(task=task, suite=SUITE, run_id="run")


def a_record(number: int, lr: float = 0.1, epochs: int = 4, kind: str = "", **fields) -> Record:
    """A finished trial's record; with a kind one that was pruned or diverged after `epochs`."""
    job = job_of(number, lr)
    names = {"suite": SUITE, "run_id": "run"}
    if not kind:
        return replace(trial_of(job), **names, **fields)
    begun = replace(begun_trial(job, epochs), **names)
    if kind == "pruned":
        return pruned(begun, "why pruned")
    found = (*begun.measurements, no_validation("diverged", "loss: not finite"))
    return replace(begun, status="ok", reason="", measurements=found)


def test_a_record_tells_what_became_of_its_trial() -> None:
    whole = told_by(a_record(0, lr=0.2))
    assert (whole.state, whole.top1, whole.loss, whole.samples) == ("finished", 1.0, 0.0, 100)
    assert whole.curve == (0.25, 0.5, 0.75, 1.0) and whole.is_answer
    half = told_by(a_record(3, lr=0.2, epochs=2, kind="pruned"))
    assert (half.state, half.top1, half.curve) == ("pruned", None, (0.25, 0.5))
    assert (half.number, half.reason, half.is_answer) == (3, "why pruned", True)
    lost = told_by(a_record(1, epochs=1, kind="diverged"))
    assert (lost.state, lost.reason, lost.is_answer) == ("diverged", "loss: not finite", True)
    for status, is_answer in (("oom", True), ("failed", False), ("timeout", False)):
        died = replace(begun_trial(job_of(2), 1), status=status, reason="why")
        assert (told_by(died).state, told_by(died).is_answer) == (status, is_answer)
        assert told_by(died).top1 is None


def test_a_pruned_trial_is_no_failure_and_no_accuracy() -> None:
    record = a_record(0, kind="pruned", epochs=2)
    assert (record.status, record.finished, record.exit_code) == ("ok", True, 0)
    assert record.value("validation_top1") is None
    assert record.find("validation_top1").status == "absent"


def test_the_best_trial_comes_first_and_the_smaller_loss_decides() -> None:
    same = {"top1": 0.8, "curve": (0.8,)}
    known = [
        trial(0, 0.1, state="failed", top1=None, loss=None, curve=()),
        trial(1, 0.1, state="pruned", top1=None, loss=None, curve=(0.9,)),
        trial(2, 0.1, state="pruned", top1=None, loss=None, curve=(0.1, 0.2)),
        trial(3, 0.1, loss=0.7, **same),
        trial(4, 0.1, loss=0.6, **same),
        trial(5, 0.1, loss=0.1, top1=0.7),
    ]
    assert [each.number for each in sorted(known, key=lambda each: each.rank)] == [4, 3, 5, 2, 1, 0]
    best = best_of(known)
    assert best is not None and best.number == 4
    assert best_of(known[:3]) is None


def test_the_last_record_of_a_trial_counts() -> None:
    records = [a_record(0, status="failed", reason="why", measurements=()), a_record(1, lr=0.02)]
    assert [each.number for each in trials_of(records)] == [1, 0]
    assert [each.number for each in trials_of([*records, a_record(0, lr=0.2)])] == [0, 1]


# --- The answer ---


def test_changes_are_those_that_a_training_reads() -> None:
    values = {"lr": 0.3, "augment": ("cutout",), "cutout_size": 8, "muon_step": 0.5, "dropout": 0.1}
    assert [(each.option, each.recipe, each.best) for each in changes(make(values))] == [
        ("epochs", "10", "4"),
        ("lr", "0.1", "0.3"),
        ("augment", "crop alternating-flip", "cutout"),
        ("cutout-size", "16", "8"),
        ("dropout", "0", "0.1"),
    ]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": 0.123456789, "weight_decay": 1e-5, "augment": ()},
        {"augment": ("crop", "trivial-augment"), "crop_padding": 3, "muon_step": 0.5},
        {"optimizer": "adamw", "schedule": "one-cycle", "momentum": 0.95},
        {"global_batch_size": 512, "dropout": 0.25, "label_smoothing": 0.0},
    ],
)
def test_the_command_trains_with_the_settings(values, tmp_path) -> None:
    train = with_values(replace(make(values), channels_last=True, seed=3), {"validation": 0.2})
    words = command(train)
    assert words[:2] == ["cifar", "train"]
    options = read_train_options(words[2:])
    asked = with_values(options.train, {"validation": 0.2, "muon_step": train.recipe.muon_step})
    assert asked == replace(train, seed=4), "a seed that was not searched with"


def test_the_command_keeps_width_gates_and_images() -> None:
    model = ModelConfig(name="resnet34", width=29, squeeze_excitation=True, dropout=0.2)
    words = command(replace(BASE, model=model, seed=2**31 - 1))
    train = read_train_options(words[2:]).train
    assert (train.model, train.data, train.seed) == (model, BASE.data, 0)


def search_of(*words: str) -> tuple[TrainConfig, tuple[Parameter, ...]]:
    """What all trials start from, and what is searched."""
    suite, tuning = build_search(parse(options_class(), words, prog="", description="", example=""))
    return suite.plans[0].cells[0].train, tuning.space


@pytest.mark.parametrize(
    ("words", "lr", "fields"),
    [
        (("sgd", "--optimizer", "adamw"), 0.001, {"lr", "weight_decay"}),
        (("sgd", "--optimizer", "muon"), 0.15, {"lr", "muon_step", "weight_decay"}),
        (("default", "--optimizer", "sgd"), 0.1, {"lr", "weight_decay"}),
        (("default", "--optimizer", "muon"), 0.15, {"lr", "muon_step", "weight_decay"}),
    ],
)
def test_the_usual_space_is_the_chosen_optimizer_s(words, lr, fields) -> None:
    train, space = search_of(*words)
    (rates,) = [each for each in space if each.field == "lr"]
    assert (train.recipe.optimizer, train.recipe.lr) == (words[2], lr)
    assert isinstance(rates, Range) and rates.low == lr / 10
    assert {each.field for each in space} >= fields
    assert not {each.field for each in space} & ({"muon_step", "weight_decay"} - fields)


def test_optimizers_are_not_compared_at_the_learning_rate_of_one() -> None:
    for rate in ((), ("--lr", "0.1")):
        with pytest.raises(ConfigError, match=r"optimizer: 'sgd,adamw': 0\.1 suits sgd; search "):
            search_of("sgd", "--optimizer", "sgd,adamw", *rate)
    _, space = search_of("sgd", "--optimizer", "sgd,adamw", "--lr", "0.001..0.1")
    assert {each.field for each in space} == {"optimizer", "lr"}


@pytest.mark.parametrize("model", [(), ("--model", "torchvision:resnet18")])
def test_the_command_keeps_a_library_s_size_and_weights(model) -> None:
    """Also where the search is told another of its networks."""
    options = parse(options_class(), ["resnet50-finetune", *model, "--lr", "0.001..0.1"],
                    prog="", description="", example="")  # fmt: skip
    suite, _ = build_search(options)
    searched = suite.plans[0].cells[0].train
    found = read_train_options(command(searched)[2:]).train.model
    assert found == searched.model
    assert found.resize == 224 and found.pretrained is not None


def test_the_answer_is_the_recipe_s_difference_and_its_command() -> None:
    known = [trial(0, 0.1), trial(1, 0.2), trial(2, 0.4), replace(trial(3, 0.5), state="pruned")]
    best = summarise(known, ["lr", "global_batch_size"])
    assert best is not None
    assert (best.trial, best.validation_top1, best.finished, best.trials) == (2, 1.0, 3, 4)
    assert best.recipe_validation_top1 == reached(BASE)
    text = render(best)
    assert text.startswith(
        f"best: trial 2, top-1 100.00% on the held-out images after 4 epochs (with the values of "
        f"sgd: {reached(BASE):.2%})\nchanges to sgd:\n  epochs  10 -> 4\n  lr      0.1 -> 0.2\n"
    )
    assert "to train with it: cifar train --recipe sgd --model resnet20 --data shapes" in text
    assert "the best of 4 trials on the 100 images" in text and "seeds other than 0" in text
    half = summarise([trial(0, 0.1, top1=0.5)], ["lr"])
    assert half is not None and half.validation_error == pytest.approx(0.05), "0.5 / sqrt(100)"
    assert "standard error of 5.00%" in half.note
    assert summarise(known[:1], ["global_batch_size"]).recipe_validation_top1 is not None
    assert summarise(known[1:], ["lr"]).recipe_validation_top1 is None, "it was not tried"
    assert summarise(known[3:], ["lr"]) is None


# --- The loop ---


def make_run(root: Path, tuning: Tuning = TUNING, base: TrainConfig = BASE) -> Run:
    plan = Plan(protocol=trial_protocol(), cells=(Cell(train=base),))
    suite = Suite(name=SUITE, description="", plans=(plan,))
    return runs.create(suite, root, tuning=tuning)


class FakeLaunch:
    """Trains nothing; `odd` trials (counted from 0) have another status or raise."""

    def __init__(self, odd: dict[int, str] | None = None, epochs: int = 4) -> None:
        self._odd, self._epochs = odd or {}, epochs
        self.seen: dict[int, TrainConfig] = {}
        self.places: list[Mapping[str, str]] = []

    def __call__(
        self, job: Job, folder: Path, *, variables: Mapping[str, str], watch: Callable[[Path], str]
    ) -> Record:
        number = job.task.repeat
        self.seen[number] = job.task.cell.train
        self.places.append(variables)
        status = self._odd.get(number, "ok")
        names = {"run_id": job.run_id, "suite": job.suite}
        if status == "interrupt":
            raise KeyboardInterrupt
        if status != "ok":
            died = {"status": status, "reason": f"why {status}", "measurements": ()}
            return record_of(job, **died, **names)
        folder.mkdir(parents=True)
        for epoch in range(1, self._epochs):
            begun = begun_trial(job, epoch)
            write_atomic(folder / RECORD_FILE, to_json(begun))
            if why := watch(folder):
                return replace(pruned(begun, why), **names)
        return trial_of(job, **names)


def present_of(**fields: object):
    return lambda num_processes, **_: environment(**fields)


def execute(run: Run, launch: object, **options: object) -> list[Record]:
    return trials.execute(run, launch=launch, **{"present": present_of(), **options})


def test_a_search_tries_the_recipe_first_and_keeps_every_record(tmp_path, capsys) -> None:
    run, launch = make_run(tmp_path), FakeLaunch()
    records = execute(run, launch)
    assert list(launch.seen) == list(range(12)) and launch.seen[0] == BASE
    assert run.records() == records
    assert [record.repeat for record in records] == list(range(12))
    assert launch.places == [{}] * 12
    assert sorted(path.name[:3] for path in (run.folder / "cells").iterdir())[-1] == "12-"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        f"[1/12] lr 0.1, batch-size 64 ... top-1 {reached(BASE):.2%} 1 s, about 11 s left"
    )
    assert "about 1 s left" in lines[10] and "left" not in lines[11].rpartition("...")[2]
    states = [each.state for each in trials_of(records)]
    assert states.count("pruned") > 0 and set(states) == {"finished", "pruned"}


def test_a_recipe_outside_of_the_space_is_not_tried(tmp_path) -> None:
    launch = FakeLaunch()
    execute(make_run(tmp_path, replace(TUNING, space=space_of(lr="0.2..1"), trials=2)), launch)
    assert BASE not in launch.seen.values() and len(launch.seen) == 2


@pytest.mark.parametrize("stop", [1, 7, 11])
def test_a_search_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, stop, capsys) -> None:
    whole = execute(make_run(tmp_path / "whole"), FakeLaunch())
    run = make_run(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        execute(run, FakeLaunch({stop: "interrupt"}))
    assert [record.repeat for record in run.records()] == list(range(stop))
    again = FakeLaunch()
    records = execute(run, again)
    assert list(again.seen) == list(range(stop, 12)), "the one that was killed is run again"
    told = [told_by(record) for record in records]
    assert told == [told_by(record) for record in whole]
    assert f"kept {stop} trial" in capsys.readouterr().err
    last = FakeLaunch()
    assert execute(run, last) == records and not last.seen


def test_a_trial_that_broke_down_is_run_again_with_its_values(tmp_path) -> None:
    run = make_run(tmp_path)
    first = FakeLaunch({3: "failed", 5: "timeout", 6: "oom"})
    records = execute(run, first)
    assert [record.status for record in records].count("ok") == 9
    again = FakeLaunch()
    execute(run, again)
    assert again.seen == {number: first.seen[number] for number in (3, 5)}, "no room is an answer"


def test_what_this_machine_cannot_run_ends_the_search(tmp_path) -> None:
    run, launch = make_run(tmp_path), FakeLaunch(dict.fromkeys(range(12), "unsupported"))
    records = execute(run, launch)
    assert list(launch.seen) == [0, 1, 2] and records[-1].status == "unsupported"
    assert trials.missing(run, present=present_of()) == ([], 9)


def test_values_that_cannot_run_cost_their_trial_alone(tmp_path) -> None:
    run, launch = make_run(tmp_path), FakeLaunch({0: "unsupported", 2: "unsupported"})
    records = execute(run, launch)
    assert list(launch.seen) == [*range(12)], "they are not tried again either"
    assert [record.status for record in records].count("unsupported") == 2
    assert trials.missing(run, present=present_of()) == ([], 0)


def test_a_trial_whose_record_failed_is_neither_a_success_nor_the_best() -> None:
    """What ran was not what was asked, so what it reached tells nothing of the setting."""
    wrong = trial(0, 0.2, state="failed", reason="autocast: off where bfloat16 was asked")
    assert trials.told(wrong, 35.0) == "failed 35 s: autocast: off where bfloat16 was asked"
    assert wrong.top1 == 1.0 and trial(1, 0.01).rank < wrong.rank


def test_other_code_and_other_images_try_anew(tmp_path) -> None:
    run = make_run(tmp_path, replace(TUNING, trials=3))
    execute(run, FakeLaunch())
    data = BASE.data
    for options, left in (
        ({}, 0),
        ({"present": present_of(code_digest="other")}, 3),
        ({"present": present_of(), "fingerprints": {data: "new"}}, 3),
        ({"present": present_of(), "fingerprints": {data: DATA.fingerprint}}, 0),
        ({"present": present_of(threads=8, worker_env={"OMP_NUM_THREADS": "8"})}, 0),
    ):
        following, count = trials.missing(run, **{"present": present_of(), **options})
        assert (len(following), count) == (min(left, 1), left)


def test_a_search_ends_once_everything_was_tried(tmp_path) -> None:
    space = space_of(augment="crop|cutout", cutout_size="4,8")
    run = make_run(tmp_path, Tuning(space=space, trials=4))
    assert len(execute(run, FakeLaunch())) == 3


# --- Side by side ---


SHARED_OUT = {"gpu_names": ("H200",), "cpu_count": 1, "side_by_side": 2}
"""What a trial sees of a machine of two GPUs and two cores."""
TWO = Machine(devices=(Device(name="0", gpu="GPU-a"), Device(name="1", gpu="GPU-b")))


class SideBySide(FakeLaunch):
    """Trials that wait for each other in pairs, and remember which device they had."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._pair = threading.Barrier(2, timeout=60)

    def __call__(self, job: Job, folder: Path, **options: object) -> Record:
        self._pair.wait()
        record = super().__call__(job, folder, **options)
        gpu = {"CUDA_VISIBLE_DEVICES": options["variables"]["CUDA_VISIBLE_DEVICES"]}
        return replace(record, environment=environment(**SHARED_OUT, worker_env=gpu))


def test_two_devices_train_two_trials_at_a_time(tmp_path, capsys) -> None:
    run, launch = make_run(tmp_path, replace(TUNING, trials=8)), SideBySide()
    here = present_of(**SHARED_OUT)
    records = execute(run, launch, present=here, machine=TWO)
    assert sorted(launch.seen) == [record.repeat for record in records] == list(range(8))
    gpus = [place["CUDA_VISIBLE_DEVICES"] for place in launch.places]
    assert sorted(gpus) == ["GPU-a"] * 4 + ["GPU-b"] * 4
    assert len({to_json(train) for train in launch.seen.values()}) == 8
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 16, "of each trial one for its start and one for its end, whole"
    assert lines[0] == "[1/8] lr 0.1, batch-size 64 on 0 ..."
    again, alone = FakeLaunch(), present_of(gpu_names=("H200", "H200"), cpu_count=2)
    assert execute(run, again, present=alone) == records and not again.seen, "whatever the place"


def test_what_runs_beside_a_trial_that_is_interrupted_is_ended(tmp_path) -> None:
    ended = []

    def launch(job: Job, folder: Path, *, variables, watch) -> Record:
        if job.task.repeat == 1:
            raise KeyboardInterrupt
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                watch(folder)
                time.sleep(0.01)
        except CancelledError:
            ended.append(job.task.repeat)
            raise
        raise AssertionError("nothing has ended it")

    run = make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        execute(run, launch, machine=TWO)
    assert ended == [0] and run.records() == []


# --- Watching a process ---


def fake_argv(cell: Cell, folder: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("fake_worker.py")), str(folder)]


def launched(monkeypatch, folder: Path, what: str, watch: Callable[[Path], str]) -> Record:
    monkeypatch.setenv("FAKE", what)
    monkeypatch.setattr("bench.launchers.LOOK_SECONDS", 0.05)
    return launch(job_of(0, lr=0.2), folder, argv_for=fake_argv, grace=0.3, watch=watch)


def child_is_gone(folder: Path) -> bool:
    pid = int((folder / "child").read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_every_epoch_is_judged_once(tmp_path) -> None:
    judged: list[Sequence[float]] = []
    watcher = trials.Watcher(lambda curve: judged.append(curve) or "")
    assert watcher(tmp_path) == "", "nothing is there yet"
    for moment, epochs in ((1, 0), (2, 1), (2, 2), (3, 3)):
        write_atomic(tmp_path / RECORD_FILE, to_json(begun_trial(job_of(0, lr=0.2), epochs)))
        os.utime(tmp_path / RECORD_FILE, (moment, moment))
        watcher(tmp_path)
        watcher(tmp_path)
    assert judged == [(0.25,), (0.25, 0.5), (0.25, 0.5, 0.75)], "the second with the third"


def when_it_has_a_child(folder: Path, answer: Callable[[], str]) -> str:
    return answer() if (folder / "child").exists() else ""


def test_a_trial_is_ended_with_what_it_had_reached(tmp_path, monkeypatch) -> None:
    curves: list[Sequence[float]] = []
    watcher = trials.Watcher(lambda curve: curves.append(curve) or "")

    def watch(folder: Path) -> str:
        watcher(folder)
        return when_it_has_a_child(folder, lambda: "pruned: why")

    record = launched(monkeypatch, tmp_path / "job", "hang", watch)
    assert curves == [(0.25,), (0.25, 0.5)], "two epochs, judged once each"
    told = told_by(record)
    assert (told.state, told.reason, told.curve) == ("pruned", "pruned: why", (0.25, 0.5))
    assert (record.environment, record.returncode != 0) == (environment(), True)
    assert child_is_gone(tmp_path / "job")


def test_a_trial_s_processes_have_its_variables(tmp_path) -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    place = {"CUDA_VISIBLE_DEVICES": "2,3", "OMP_NUM_THREADS": "5"}
    argv = [sys.executable, "-c", code]
    launch(job_of(0), tmp_path, argv_for=lambda *_: argv, variables=place)
    assert (tmp_path / "stdout").read_text() == "2,3 5\n"


def test_a_watched_trial_that_ends_by_itself_is_what_it_is(tmp_path, monkeypatch) -> None:
    for what, state in (("ok", "finished"), ("crash", "failed"), ("early-exit0", "failed")):
        record = launched(monkeypatch, tmp_path / what, what, lambda folder: "")
        assert told_by(record).state == state, record.reason


def test_a_finished_trial_is_not_pruned(tmp_path, monkeypatch) -> None:
    """It has written its record; only its process is still there."""

    def watch(folder: Path) -> str:
        return when_it_has_a_child(folder, lambda: "too late")

    record = launched(monkeypatch, tmp_path / "job", "ok-hang", watch)
    assert (told_by(record).state, record.reason) == ("finished", "")
    assert child_is_gone(tmp_path / "job")
    never = trials.Watcher(lambda curve: "why")
    assert never(tmp_path / "job") == ""


def test_a_search_that_stops_leaves_no_process(tmp_path, monkeypatch) -> None:
    def stop() -> str:
        raise CancelledError

    def watch(folder: Path) -> str:
        return when_it_has_a_child(folder, stop)

    with pytest.raises(CancelledError):
        launched(monkeypatch, tmp_path / "job", "hang", watch)
    assert child_is_gone(tmp_path / "job")


def test_a_watched_trial_has_its_time_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE", "hang")
    monkeypatch.setattr("bench.launchers.LOOK_SECONDS", 0.05)
    job = job_of(0)
    short = replace(job, task=replace(job.task, protocol=trial_protocol(timeout=0.2)))
    record = launch(short, tmp_path, argv_for=fake_argv, grace=0.3, watch=lambda folder: "")
    assert record.status == "timeout"


# --- Tables ---


def some_records() -> list[Record]:
    return [
        a_record(0, lr=0.1),
        a_record(1, lr=0.2),
        a_record(2, lr=0.011, epochs=2, kind="pruned"),
        a_record(3, lr=0.9, epochs=1, kind="diverged"),
        a_record(4, lr=0.5, status="failed", reason="a crash", environment=None,
                 measurements=()),
    ]  # fmt: skip


def test_trials_are_shown_the_best_first_and_no_accuracy_of_what_did_not_finish() -> None:
    text = render_markdown(trial_rows(some_records()), trial_columns)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| Trial | Model | Validation top-1 (%) | Loss | Epochs | lr | Status |",
        "| ---: | :--- | ---: | ---: | ---: | ---: | :--- |",
        "| 2 | resnet20 | 100.00 | 0.0000 | 4 of 4 | 0.2 | ok |",
        f"| 1 | resnet20 | {100 * reached(BASE):.2f} | 0.0753 | 4 of 4 | 0.1 | ok |",
        f"| 3 | resnet20 | {DASH} | {DASH} | 2 of 4 | 0.011 | pruned |",
        f"| 4 | resnet20 | {DASH} | {DASH} | 1 of 4 | 0.9 | diverged |",
        f"| 5 | resnet20 | {DASH} | {DASH} | 0 of 4 | 0.5 | failed |",
    ]
    assert "- resnet20 diverged: trial 4: loss: not finite" in text
    assert "- resnet20 failed: trial 5: a crash" in text
    assert "why pruned" not in text and text.count("## fake-2c") == 1
    assert "Worker" not in text, "that they share the cores tells nothing of an accuracy"


def test_a_trial_s_row_has_what_it_reads() -> None:
    def row(number: int, **values: object) -> Record:
        return trial_of(job_of(number, **values))

    records = [
        row(0, augment=("cutout",), cutout_size=8, lr=0.2),
        row(1, augment=("cutout",), cutout_size=4),
        row(2, augment=(), cutout_size=4, lr=0.05),
    ]
    rows = trial_rows(records)
    assert [(each["lr"], each["augment"], each["cutout_size"]) for each in rows] == [
        (0.2, "cutout", 8), (0.1, "cutout", 4), (0.05, "none", None),
    ]  # fmt: skip
    assert "global_batch_size" not in rows[0], "the same in all"


def test_searches_are_told_apart_from_cells_and_from_each_other() -> None:
    other = [replace(record, run_id="other") for record in some_records()]
    cell = replace(some_records()[0], suite="quick")
    cells, searches = told_apart([*some_records(), cell, *other])
    assert cells == [cell] and searches == [some_records(), other]


def test_bench_table_shows_filters_and_sorts_trials(tmp_path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path / "runs")
    for record in some_records():
        append_record(run.records_file, record)
    monkeypatch.chdir(tmp_path)

    def shown(*words: str) -> list[str]:
        assert main(["table", *words]) == 0
        return re.findall(r"^ *(\d+) +resnet20 ", capsys.readouterr().out, re.MULTILINE)

    assert shown() == shown(run.id) == ["2", "1", "3", "4", "5"]
    assert shown("--sort", "lr") == ["3", "1", "2", "5", "4"]
    assert shown("--sort", "validation_top1") == ["2", "1", "3", "4", "5"]
    assert shown("--filter", "status=pruned") == ["3"]
    assert main(["table", "--format", "csv"]) == 0
    reader = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["validation_top1"] for row in reader][::4] == ["1.0", ""]
    assert not [name for name in reader.fieldnames or () if "test" in name]


def test_records_come_in_the_order_in_which_they_were_made(tmp_path) -> None:
    run = make_run(tmp_path)
    for number in (1, 0):
        record = trial_of(job_of(number), run_id=run.id)
        append_record(run.records_file, replace(record, cell=Cell(train=BASE)))
    assert [record.repeat for record in run.records()] == [1, 0]


def test_a_search_is_neither_run_as_cells_nor_saved(tmp_path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path / "runs")
    append_record(run.records_file, a_record(0))
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["run", "--resume", run.id], "is a search for a recipe; give it to bench search"),
        (["frontier", "--resume", run.id], "is a search for a recipe; give it to bench search"),
        (["save", run.id], "is a search, whose accuracies chose its winner"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_an_old_run_is_no_search(tmp_path, monkeypatch, capsys) -> None:
    plan = Plan(protocol=trial_protocol(), cells=(Cell(train=BASE),))
    other = runs.create(Suite(name="quick", description="", plans=(plan,)), tmp_path / "runs")
    text = (other.folder / "run.json").read_text()
    fields = json.loads(text)
    del fields["tuning"]
    (other.folder / "run.json").write_text(json.dumps(fields))
    assert runs.find(other.id, tmp_path / "runs") == other
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--resume", other.id]) == 2
    assert "is a run of cells; give it to bench run" in capsys.readouterr().err


def test_a_plan_of_earlier_words_is_read(tmp_path) -> None:
    """Of a search that counted its trials side by side, and of a frontier."""
    run = make_run(tmp_path)
    fields = json.loads((run.folder / "run.json").read_text())
    fields["search"] = fields.pop("frontier")
    fields["tuning"]["parallel"] = 2
    (run.folder / "run.json").write_text(json.dumps(fields))
    assert runs.find(run.id, tmp_path).plan == run.plan
    frontier = {"start": 64, "largest": 1024}
    (run.folder / "run.json").write_text(json.dumps({**fields, "search": frontier, "tuning": None}))
    plan = runs.find(run.id, tmp_path).plan
    assert plan.kind == "frontier" and plan.frontier == FrontierSearch(**frontier)


# --- The command line ---

BAD = {
    "recipe: none given: choose one of default, sgd": ["search"],
    "recipe: 'nope': choose one of": ["search", "nope"],
    "space: '': nothing to search: give a range": [
        *("search", "sgd", "--lr", "0.1", "--weight-decay", "0", "-b", "64", "--augment", "crop"),
    ],
    "lr: '1..0.1': is no range": ["search", "sgd", "--lr", "1..0.1"],
    "lr: 0.0: give a positive number": ["search", "sgd", "--lr", "0..1"],
    "--lrr: no such option; did you mean --lr?": ["search", "sgd", "--lrr", "0.1..1"],
    "--patience: no such option": ["search", "sgd", "--patience", "3"],
    "epochs: '1,2': is the same in all trials": ["search", "sgd", "--epochs", "1,2"],
    "validation: 0.0: leaves 0 of 10000": ["search", "sgd", "--validation", "0"],
    "model: 'resnet19': choose one of": ["search", "sgd", "--model", "resnet19"],
    "data: 'nope': write shapes": ["search", "sgd", "--data", "nope"],
    "/missing.npz: no such file": ["search", "sgd", "--data", "npz:missing.npz"],
    "launcher: 'nope': choose one of ddp": ["search", "sgd", "--launcher", "nope"],
    "num-processes: 0: give 1 or more": ["search", "sgd", "--num-processes", "0"],
    "trials: 0: give 1 to 10000": ["search", "sgd", "--trials", "0"],
    "trials: 4: there are only 3 settings": ["search", "sgd", "-b", "32,64,128", "--trials", "4"],
    "batch-size: 8192: is less than two steps in an epoch of 9000": ["search", "sgd", "-b=64,8192"],
    "limit-train: 20000: give at most 10000": ["search", "sgd", "--limit-train", "20000"],
    "seed: -1: give 0 <= seed": ["search", "sgd", "--seed", "-1"],
    "timeout: 0.0: give a positive number": ["search", "sgd", "--timeout", "0"],
    "devices: 'x': give numbers of GPUs": ["search", "sgd", "--devices", "x"],
    "num-processes: 2: --devices names 1; name as many": [
        *("search", "sgd", "--devices", "cpu:0", "--num-processes", "2"),
    ],
    "run: 'nope': no such run": ["search", "--resume", "nope"],
    "lr: 0.1..1: not with --resume": ["search", "--resume", "nope", "--lr", "0.1..1"],
    "recipe: sgd: not with --resume": ["search", "sgd", "--resume", "nope"],
}


@pytest.mark.parametrize(("message", "words"), BAD.items())
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, message, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert message in output.err
    assert output.out == "" and not list(tmp_path.iterdir())


def test_without_optuna_a_search_says_how_to_get_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", "sgd"]) == 2
    assert capsys.readouterr().err == (
        "bench: search: 'optuna': is not installed; pip install optuna\n"
    )


def test_every_option_has_the_text_below_its_field(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "--lr SPACE Highest learning rate (muon: of all but the convolutions)." in text
    assert (
        "--dropout SPACE Probability of dropping a feature before the classifier; 0: none" in text
    )
    assert "-b SPACE, --batch-size SPACE" in text and "--epochs N Passes over" in text
    assert "--augment NAMES[|NAMES...]" in text and "--optimizer NAME[,NAME...]" in text


def test_a_dry_run_shows_the_space_and_starts_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["search", "sgd", "--model", "resnet20", "--lr", "0.01..1", "--epochs", "2"]
    assert main([*words, "--trials", "7", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lr: 0.01 to 1, on a logarithmic scale"
    assert lines[1].startswith("[1/1] resnet20 fp32 b64  about ")
    assert lines[-1].startswith("7 trials to run, about ")
    assert list(tmp_path.iterdir()) == []


def search(cwd: Path, *words: str, fake: str = "ok", **variables: str):
    options = ["--model", "resnet20", "--lr", "0.01..1", "--epochs", "4", "--trials", "3"]
    return bench(cwd, "search", "sgd", *options, *words, fake=fake, **variables)


def test_a_search_ends_with_its_trials_and_the_best_of_them(tmp_path) -> None:
    done = search(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Validation top-1" in " ".join(done.stdout.split())
    assert re.search(r"3 trials in \d+ s; records and logs are in runs/\S+", done.stdout)
    run = runs.newest(tmp_path / "runs")
    best = json.loads((run.folder / "best.json").read_text())
    told = trials_of(run.records())[0]
    assert (best["trial"], best["validation_top1"]) == (told.number + 1, told.top1)
    assert best["recipe_validation_top1"] == pytest.approx(reached(BASE))
    assert best["command"] in done.stdout
    train = read_train_options(shlex.split(best["command"])[2:]).train
    assert (train.recipe.lr, train.recipe.epochs, train.seed) == (told.train.recipe.lr, 4, 1)
    assert [line[:5] for line in done.stderr.splitlines()] == ["[1/3]", "[2/3]", "[3/3]"]
    done = bench(tmp_path, "search", "--resume", run.id, "--dry-run")
    assert done.stdout.splitlines()[-1].startswith("0 trials to run")
    done = bench(
        tmp_path,
        "search",
        "--resume",
        run.id,
        "--devices",
        CORES,
        fake="crash",
        FAKE_LOCKS=f"cifar-{os.getpid()}-",
    )
    assert (done.returncode, done.stderr) == (0, "kept 3 trials\n")


def test_a_trial_that_broke_is_told_by_the_exit_code_and_tried_again(tmp_path) -> None:
    done = search(tmp_path, fake="trial2=crash,ok")
    assert done.returncode == 1
    assert "trial 2: ValueError: the worker broke" in " ".join(done.stdout.split())
    assert "1 did not finish; to try them again: bench search --resume runs/" in done.stdout
    name = runs.newest(tmp_path / "runs").id
    done = bench(tmp_path, "search", "--resume", name)
    assert done.returncode == 0 and "kept 2 trials" in done.stderr
    done = search(tmp_path, fake="crash")
    assert done.returncode == 1 and "no trial came to its end" in done.stdout


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_an_ended_search_goes_on_with_the_trial_that_it_was_in(tmp_path, number) -> None:
    words = ["search", "sgd", "--model", "resnet20", "--lr", "0.01..1", "--epochs", "4"]
    process = subprocess.Popen(
        [sys.executable, str(FAKE), *words, "--trials", "3"],
        cwd=tmp_path,
        env=environ(FAKE="trial2=hang,ok"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (children := list(tmp_path.glob("runs/*/cells/*/child"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    run = runs.newest(tmp_path / "runs")
    assert [record.repeat for record in run.records()] == [0]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "to go on: bench search --resume runs/" in errors.splitlines()[-1]
        assert "best: trial 1" in output, "what is finished is shown"
        assert child_is_gone(children[0].parent)
    killed = from_json(Job, (children[0].parent / "cell.json").read_text())
    done = bench(tmp_path, "search", "--resume", run.id)
    assert done.returncode == 0, done.stderr
    assert child_is_gone(children[0].parent)
    records = runs.newest(tmp_path / "runs").records()
    assert [record.repeat for record in records] == [0, 1, 2]
    assert records[1].cell == killed.task.cell, "the same settings"


def test_two_trials_run_side_by_side_as_processes(tmp_path) -> None:
    done = search(tmp_path, "--devices", CORES, fake="ok", FAKE_LOCKS=f"cifar-{os.getpid()}-")
    assert done.returncode == 0, done.stderr
    run = runs.newest(tmp_path / "runs")
    assert len(run.records()) == 3 and ",".join(run.plan.devices) == CORES
    assert all(f" on {core} ...\n" in done.stderr for core in CORES.split(","))
