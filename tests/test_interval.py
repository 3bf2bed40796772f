"""How often processes agree: by hand, with a clock that is told."""

import pytest

from cifar import interval
from cifar.interval import CheckInterval


def plain(steps: int) -> int:
    return steps


def even(steps: int) -> int:
    return steps + steps % 2


@pytest.mark.parametrize(
    ("given", "device", "processes", "steps"),
    [
        (None, "cpu", 1, 10),
        (None, "cpu", 2, 1),
        (None, "cuda", 1, 20),
        (None, "cuda", 2, 1),
        (7, "cuda", 2, 7),
        (7, "cpu", 1, 7),
    ],
)
def test_it_begins_with_what_suits_the_device(
    given: int | None, device: str, processes: int, steps: int
) -> None:
    assert CheckInterval(given, device, processes, plain).steps == steps


@pytest.mark.parametrize(
    ("pace", "steps"), [(0.0, 1), (0.01, 20), (0.1, 20), (0.11, 18), (0.7, 2), (1.5, 1), (60.0, 1)]
)
def test_several_gpus_agree_about_every_two_seconds(pace: float, steps: int) -> None:
    several = CheckInterval(None, "cuda", 2, plain)
    several.learn(pace)
    assert several.steps == steps
    fixed, alone, on_cpu = (
        *(CheckInterval(5, "cuda", 2, plain), CheckInterval(None, "cuda", 1, plain)),
        CheckInterval(None, "cpu", 2, plain),
    )
    for each, before in ((fixed, 5), (alone, 20), (on_cpu, 1)):
        each.learn(pace)
        assert each.steps == before


def test_it_is_one_at_which_all_have_the_same_weights() -> None:
    several = CheckInterval(None, "cuda", 2, even)
    assert several.steps == 2
    several.learn(0.7)
    assert several.steps == 2
    several.learn(0.11)
    assert several.steps == 18


def test_the_pace_is_that_since_it_was_last_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 104.0, 104.5, 105.0])
    monkeypatch.setattr(interval.time, "monotonic", lambda: next(times))
    several = CheckInterval(None, "cuda", 2, plain)
    assert [several.pace(step) for step in (0, 8, 8, 9)] == [0.0, 0.5, 0.0, 0.5]
