"""The first inference of a fresh process."""

import subprocess
import sys

import pytest
from training import make_trainer, tiny_recipe

from bench.cold import STARTED
from bench.measure import cold
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement


def measured(**config: object) -> dict[str, Measurement]:
    subject = Subject(make_trainer(**config), Protocol())
    return {each.name: each for each in cold.measure_cold(subject)}


def test_a_fresh_process_infers_with_the_weights() -> None:
    found = measured(precision="bf16", channels_last=True, recipe=tiny_recipe(ema_decay=0.5))
    start, first, second = (
        found[name].value
        for name in ("cold_start", "cold_first_inference", "cold_second_inference")
    )
    assert start > first > 0
    assert start > second > 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('no room')", "the process that was to infer: no room"),
        ("print('{}')", "the process that was to infer: "),
        ("print('no number')", "the process that was to infer: Expecting value"),
    ],
)
def test_a_process_that_breaks_down_costs_these_numbers_alone(
    monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    run = subprocess.run
    monkeypatch.setattr(
        cold.subprocess, "run", lambda _, **options: run([sys.executable, "-c", program], **options)
    )
    found = measured()
    assert len(found) == 3
    for each in found.values():
        assert each.status == "failed"
        assert each.reason.startswith(reason)


def test_the_clock_starts_before_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold.time, "monotonic", lambda: 1.0)
    seen: list[str] = []

    def run(_: object, env: dict[str, str], **options: object) -> object:
        seen.append(env[STARTED])
        raise OSError("enough")

    monkeypatch.setattr(cold.subprocess, "run", run)
    assert {each.reason for each in measured().values()} == {
        "the process that was to infer: enough"
    }
    assert seen == ["1.0"]
