"""bench's numbers against those of a loop written by hand; the comparing part by hand."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import loop
import loop_table
import pytest
import torch
from training import ROOT, reset_accelerate
from turns import is_known, ratio, take_turns

from bench.measure.subject import Subject
from bench.record import Measurement

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
NOISY = "too noisy to tell: run it on an idle machine"


def test_the_loops_are_short() -> None:
    parts = (loop.training, loop.inference_loop, loop.wait)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) <= 40


def test_contestants_take_turns_in_changing_order_until_it_is_enough() -> None:
    turns: list[str] = []

    def contestant(name: str):
        return lambda: turns.append(name) or float(len(turns))

    taken = take_turns(
        {name: contestant(name) for name in "abc"}, 20, lambda taken: len(taken["a"]) == 8
    )
    assert [len(times) for times in taken.values()] == [8, 8, 8]
    rounds = ["".join(turns[start : start + 3]) for start in range(0, 24, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert len(take_turns({"a": lambda: 1.0}, 5)["a"]) == 5


def test_a_ratio_by_hand() -> None:
    interval = ratio([2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [1.0, 4.0, 2.0, 2.0, 2.0, 2.0])
    # Of 2, 1, 3, 4, 5 and 6.
    assert interval == pytest.approx((3.5, 1.357143, 5.642857))
    assert is_known(interval, 2.15)
    assert not is_known(interval, 2.14)


def test_the_ratios_are_looked_at_whenever_the_rounds_have_doubled() -> None:
    assert [each for each in range(200) if loop.is_look(each)] == [10, 20, 40, 80, 160]


@pytest.mark.parametrize(("noisy", "rounds"), [(1, 10), (9, 20), (60, 50)])
def test_a_contest_ends_at_a_look(noisy: int, rounds: int) -> None:
    """In so many rounds at first the loop takes half or twice as long, in turns."""
    count = itertools.count(-1)  # of which the first one warms up

    def wavering() -> float:
        turn = next(count)
        return (1.0, 4.0)[turn % 2] if turn < noisy else 2.0

    found = loop.compete({"bench": lambda: 2.0, "loop": wavering}, 50, ("loop/bench",))
    assert found["rounds"] == rounds
    assert found["known_within_1_percent"] is (rounds < 50)


@pytest.mark.parametrize(("device", "long"), [("cpu", False), ("cuda", True)])
def test_bench_on_a_gpu_is_held_against_windows_twice_as_long(
    monkeypatch: pytest.MonkeyPatch, device: str, long: bool
) -> None:
    contest = mock.Mock(trainer=SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(loop, "compete", lambda *words: words)
    _, (contestants, _, decisive) = next(loop.agree(contest, SimpleNamespace(steps=7, pairs=9)))
    assert ("bench_long" in contestants) is ("bench_long/bench" in decisive) is long
    for run in contestants.values():
        run()
    asked = [each.args[0] for each in contest.bench_training.call_args_list]
    assert asked == ([7, 14] if long else [7])


@pytest.fixture
def contest() -> loop.Contest:
    reset_accelerate()
    return loop.Contest(
        SimpleNamespace(model="resnet20-w4", precision="fp32", channels_last=False, batch_size=16)
    )


def test_the_loop_trains_on_what_it_is_given(contest: loop.Contest) -> None:
    torch.manual_seed(0)
    model = contest.model()
    before = [parameter.clone() for parameter in model.parameters()]
    assert loop.training(model, contest.plain_input(), bf16=False)(2) > 0
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)
    assert next(contest.plain_input())[0].shape == (16, 3, 32, 32)
    assert not torch.equal(next(contest.same_input())[0], next(contest.plain_input())[0])
    fixed = contest.fixed_batch()
    assert next(fixed)[0] is next(fixed)[0]


def test_a_contest_tells_every_ratio_and_whether_it_is_known() -> None:
    found = loop.compete(
        {"bench": lambda: 2.0, "loop": lambda: 3.0, "control": lambda: 3.0},
        50,
        ("loop/bench", "control/loop"),
    )
    assert found == {
        "rounds": 10,
        "known_within_1_percent": True,
        "bench_ms_per_sample": 2000.0,
        "loop/bench": (1.5, 1.5, 1.5),
        "control/loop": (1.0, 1.0, 1.0),
    }


def test_bench_s_throughput_becomes_seconds_per_sample(
    contest: loop.Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = Measurement(
        name="train_throughput",
        unit="samples/s",
        better="higher",
        labels={"samples_per_step": 16},
        samples=((0.5, 1.5),),
    )
    steps: list[int] = []

    def measure(subject: Subject) -> list[Measurement]:
        steps.append(subject.protocol.timed_steps)
        return [rate]

    monkeypatch.setattr(loop, "measure_training", measure)
    assert contest.bench_training(2) == 1 / 16  # 32 samples in 2 s
    assert steps == [2]


def test_a_window_without_marks_is_as_long_as_its_steps(
    contest: loop.Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([10.0, 13.0])
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    assert contest.unmarked(3) == 1 / 16
    assert contest.trainer.step == contest.warm_up + 3


@pytest.mark.parametrize("batch", [1, 3])
def test_bench_s_latency_is_found_among_what_else_it_measures(
    contest: loop.Contest, batch: int
) -> None:
    """For real, one batch of a tiny net."""
    assert 0 < contest.bench_inference(batch, 1) < 60


def test_the_trainer_does_what_the_loops_do(contest: loop.Contest) -> None:
    recipe = contest.trainer.config.recipe
    assert (recipe.name, recipe.ema_decay, recipe.label_smoothing) == ("sgd", 0.0, 0.0)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("agree", ["train", "latency_b1", "latency_b2"]),
        ("input", ["train"]),
        ("timm", ["train", "latency_b1", "latency_b2"]),
        ("cost", ["train"]),
    ],
)
def test_every_part_is_printed_before_the_next_one_starts(
    what: str, parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reset_accelerate()
    printed: list[dict[str, object]] = []

    def compete(contestants: loop.Contestants, *_: object) -> dict[str, object]:
        printed.extend(map(json.loads, capsys.readouterr().out.splitlines()))
        return {"before": len(printed), "contestants": list(contestants)}

    monkeypatch.setattr(loop, "compete", compete)
    words = ["--model", "resnet20-w4", "--batch-size", "16", "--inference-batch-size", "2"]
    assert loop.main([what, *words]) == 0
    printed.extend(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(line["part"], line["before"]) for line in printed] == list(
        zip(parts, range(len(parts)), strict=True)
    )
    assert all({"bench", "control"} <= set(line["contestants"]) for line in printed)


@pytest.mark.parametrize(("codes", "code"), [([0, -9], 1), ([1, 0], 1), ([0, 0], 0)])
def test_a_cell_that_died_is_told_by_the_exit_code(
    codes: list[int], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def call(command: list[str]) -> int:
        commands.append(command)
        return codes[len(commands) % 2]

    monkeypatch.setattr(loop, "subprocess", SimpleNamespace(call=call))
    assert loop.main(["cost", "--all"]) == code
    assert len(commands) == 8
    assert not any("--all" in command for command in commands)


def run(*options: str) -> dict[str, dict[str, Any]]:
    """The lines of a real run, by part; skips the test where this machine emulates the cell."""
    script = Path(__file__).with_name("loop.py")
    done = subprocess.run(
        [sys.executable, str(script), *options],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if "skipped" in lines[0]:
        pytest.skip(lines[0]["skipped"])
    return {line["part"]: line for line in lines}


CELLS = [
    ("--model", model, "--precision", precision, *(["--channels-last"] * channels_last))
    for model, precision, channels_last in itertools.product(
        loop.MODELS, loop.PRECISIONS, loop.LAYOUTS
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_bench_agrees_with_the_loop(cell: tuple[str, ...]) -> None:
    found = run("agree", *cell)
    assert len(found) == 3
    for part, result in found.items():
        numerator = "same_input" if part == "train" else "loop"
        assert result["known_within_1_percent"], NOISY
        assert abs(result[f"control/{numerator}"][0] - 1) <= 0.01, NOISY
        assert abs(result[f"{numerator}/bench"][0] - 1) <= 0.02, part
        if "bench_long/bench" in result:
            assert abs(result["bench_long/bench"][0] - 1) <= 0.01, "a window's beginning is slow"


@pytest.mark.slow
@pytest.mark.parametrize("model", loop.MODELS)
def test_measuring_costs_less_than_1_percent(model: str) -> None:
    found = run("cost", "--model", model)["train"]
    assert found["known_within_1_percent"], NOISY
    assert abs(found["control/unmarked"][0] - 1) <= 0.01, NOISY
    assert found["bench/unmarked"][0] < 1.01


def test_a_table_tells_the_ratio_that_a_mode_is_about() -> None:
    line = {
        "what": "agree",
        "model": "resnet20",
        "precision": "bf16",
        "channels_last": True,
        "batch_size": 64,
        "part": "latency_b128",
        "rounds": 20,
        "known_within_1_percent": False,
        "control/loop": (1.0, 0.98, 1.02),
        "loop/bench": (0.995, 0.98, 1.01),
    }
    skipped = {"what": "agree", "model": "resnet18", "skipped": "this CPU has no bf16 kernels"}
    (row,) = loop_table.table([line, skipped]).splitlines()[2:]
    assert row == (
        "| resnet20 | bf16 | NHWC | 128 | latency | 20 | bench / loop "
        "| 0.995 [0.980, 1.010] ? | 1.000 [0.980, 1.020] |"
    )
