"""Metrics by hand, over one, two and four processes, of which one is a straggler."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.measure import anatomy, memory
from bench.measure import subject as subject_module
from bench.measure.anatomy import PARTS
from bench.measure.compilation import break_even
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement

Others = Callable[..., None]
MIB = 2**20


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """What the other ranks have, after this one's: one sequence for each measurement in turn."""

    def have(*answers: Sequence[Sequence[float]]) -> None:
        turns = iter(answers)

        def gather(mine: Sequence[float], _: torch.device) -> tuple[tuple[float, ...], ...]:
            return (tuple(mine), *map(tuple, next(turns)))

        monkeypatch.setattr(subject_module, "gather", gather)

    return have


def pretend(device: str, count: int = 1, **trainer: Any) -> Subject:
    """A subject of one of `count` processes without anything to train."""
    place = SimpleNamespace(index=0, count=count)
    parts = {"device": torch.device(device), "place": place, **trainer}
    subject = Subject.__new__(Subject)
    subject.trainer, subject.protocol = SimpleNamespace(**parts), Protocol()
    subject.taken, subject.invalid = [], []
    return subject


def peak(monkeypatch: pytest.MonkeyPatch, device: str, **options: bool) -> list[Measurement]:
    """The memory of a process whose mark is at 300 MiB, of which 400 MiB are reserved on a GPU."""
    monkeypatch.setattr(memory.device_memory, "peak_memory", lambda _: 300 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 400 * MIB)
    return list(memory.measure_peak(pretend(device), **options))


@pytest.mark.parametrize("ranks", [(), (500,), (200, 900, 300)])
def test_the_memory_of_a_group_is_that_of_the_rank_that_takes_most(
    monkeypatch: pytest.MonkeyPatch, others: Others, ranks: tuple[int, ...]
) -> None:
    others([(MIB * each,) for each in ranks])
    (found,) = peak(monkeypatch, "cpu", was_reset=True)
    assert found.samples == tuple((float(MIB * each),) for each in (300, *ranks))
    assert found.value == MIB * max(300, *ranks, 0)
    assert (found.name, found.unit, found.better) == ("peak_memory_bytes", "bytes", "lower")


def test_a_gpu_tells_what_was_reserved_as_well(
    monkeypatch: pytest.MonkeyPatch, others: Others
) -> None:
    others([(100 * MIB,), (350 * MIB,)], [(800 * MIB,), (200 * MIB,)])
    allocated, reserved = peak(monkeypatch, "cuda", was_reset=True)
    assert allocated.labels["kind"] == "allocated on the device"
    assert (allocated.value, reserved.value) == (350 * MIB, 800 * MIB)
    assert reserved.name == "peak_memory_reserved_bytes"
    assert reserved.samples[0] == (400 * MIB,)


def test_a_mark_that_could_not_be_reset_says_so(
    monkeypatch: pytest.MonkeyPatch, others: Others
) -> None:
    others([])
    (found,) = peak(monkeypatch, "cpu", was_reset=False)
    assert found.labels["kind"] == "resident set since the process started"


def test_communication_of_four_processes_is_that_of_the_slowest(others: Others) -> None:
    """Steps of 3 and 2.5 s, 4 and 2.75 s, and of 3.5 and 3 s: it adds 0.5, 1.25 and 0.5 s."""
    config = SimpleNamespace(parallel=SimpleNamespace(local_steps=1))
    subject = pretend("cpu", 4, config=config, engine=SimpleNamespace(shares_out=False))

    def step(seconds: float) -> dict[str, float]:
        return dict.fromkeys(PARTS, 0.0) | {"backward": seconds - 0.25, "data": 0.25}

    pairs = [(step(a), step(b)) for a, b in ((3.0, 2.5), (4.0, 2.75), (3.5, 3.0))]
    others([(0.25, 0.25, 0.25), (2.0, 1.5, 0.0), (0.5, 0.5, 0.5)])
    found = anatomy._communication(subject, pairs)
    assert found.samples[0] == (0.5, 1.25, 0.5)
    assert found.value == 1.5, "the median of the rank that exchanges longest"
    config.parallel.local_steps = 4
    others([(0.0,) * 3] * 3)
    rounds = anatomy._communication(subject, pairs)
    assert rounds.samples[0] == (0.125, 0.3125, 0.125), "of a round of four steps"


def test_compiling_breaks_even_when_the_slowest_of_four_processes_does() -> None:
    """20 s of compiling on the second rank; the third one's steps take 3 s, and 5 s in eager."""
    cold = Measurement(
        name="compile_seconds", unit="s", better="lower",
        samples=((10.0,), (20.0,), (5.0,), (10.0,)),
    )  # fmt: skip
    compiled = [[1.0, 1.0, 9.0], [1.0, 2.0, 1.0], [3.0, 3.0, 3.0], [2.0, 2.0, 2.0]]
    eager = [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0], [5.0, 5.0, 1.0], [4.0, 4.0, 4.0]]
    assert break_even(cold, compiled, eager).value == 10, "20 / (5 - 3)"
    assert break_even(cold, compiled, [[3.0]] * 4).status == "absent", "a straggler saves nothing"
