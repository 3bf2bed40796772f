"""Metrics by hand, over one, two and four processes, of which one is a straggler."""

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_worker import record_of
from training import make_trainer

from bench.job import Job
from bench.measure import anatomy, clock, memory, ranks, training
from bench.measure import subject as subject_module
from bench.measure.anatomy import PARTS
from bench.measure.batches import Timed
from bench.measure.compilation import break_even
from bench.measure.inference import Candidate
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement
from bench.rows import rows
from bench.spec import Task, grid

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


@pytest.mark.parametrize("more", [(), (500,), (200, 900, 300)])
def test_the_memory_of_a_group_is_that_of_the_rank_that_takes_most(
    monkeypatch: pytest.MonkeyPatch, others: Others, more: tuple[int, ...]
) -> None:
    others([(MIB * each,) for each in more])
    (found,) = peak(monkeypatch, "cpu", was_reset=True)
    assert found.samples == tuple((float(MIB * each),) for each in (300, *more))
    assert found.value == MIB * max(300, *more, 0)
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


@pytest.mark.parametrize(
    ("count", "value", "percentiles"),
    [
        (1, 13.0, (13.0, 23.8, None)),
        (2, 38.0, (25.5, 47.55, None)),
        (4, 88.0, (50.5, 95.05, 99.01)),
    ],
)
def test_latency_percentiles_pool_all_ranks_and_the_headline_is_the_slowest_s(
    others: Others, count: int, value: float, percentiles: tuple[float | None, ...]
) -> None:
    """The first rank's batches take 1 to 25 s, the next one's 26 to 50 s, and so on."""
    batches = [[float(25 * rank + each) for each in range(1, 26)] for rank in range(count)]
    others(batches[1:], [(4.0 + rank,) for rank in range(1, count)])
    candidate = Candidate(pretend("cpu", count), None, "eager", None)
    timed = Timed(each=batches[0], row=4.0, in_row=10)
    latency, throughput = candidate._times(timed, 1)
    assert latency.value == value
    assert throughput.value == 10 / (4 + count - 1), "ten images on the slowest device"
    task = Task(cell=grid(["resnet20"], ["fp32"])[0], protocol=Protocol())
    (row,) = rows([record_of(Job(task=task), measurements=(latency, throughput))])
    told = [row[f"inference_latency_b1_p{each}"] for each in (50, 95, 99)]
    assert told == [each and pytest.approx(each) for each in percentiles]
    assert row["inference_throughput_b1"] == throughput.value


@pytest.mark.parametrize("slower", [(), (2.0,), (1.5, 3.0, 0.5)])
def test_seconds_of_a_training_by_hand(
    monkeypatch: pytest.MonkeyPatch, slower: tuple[float, ...]
) -> None:
    """Six steps, of which the first takes 8 s and each other one half a second.

    The second and the fifth are observed; two are timed between them. It was launched 100 s before.
    Another rank's seconds are as many times as long.
    """
    now = [0.0]
    told = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    for module in (training, clock):
        monkeypatch.setattr(module, "time", told)
    monkeypatch.setattr(training, "find_counter", lambda *_, **__: "none here")
    monkeypatch.setattr(
        subject_module,
        "gather",
        lambda mine, _: (tuple(mine), *(tuple(each * one for one in mine) for each in slower)),
    )
    monkeypatch.setenv("BENCH_LAUNCHED", "-100")
    trainer = make_trainer(trainer={"train_samples": 6 * 32})
    step = trainer.train_step

    def slow_step() -> None:
        now[0] += 0.5 if trainer.step else 8.0
        step()

    monkeypatch.setattr(trainer, "train_step", slow_step)
    protocol = Protocol(train_samples=6 * 32, warmup_steps=0, timed_steps=2, min_timed_seconds=0.0)
    found = {each.name: each for each in training.measure_training(Subject(trainer, protocol))}
    longest = max(1.0, *slower, 0.0)
    assert found["first_step"].value == 8 * longest
    assert found["time_to_first_timed_step"].value == (100 + 8 + 0.5) * longest
    assert found["training_seconds"].value == (8 + 5 * 0.5) * longest
    assert found["train_throughput"].value == 2 * 32 / (2 * 0.5 * longest)
    assert found["training_seconds"].samples[0] == (10.5,)


def test_short_steps_of_a_rank_alone_fill_the_least_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 0.25 s a step, as one tells that is waited for; the next one warms up as well."""
    now, taken = [0.0], []
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(ranks, "align", lambda _: None)

    def step() -> None:
        now[0] += 0.25
        taken.append(1)

    subject = pretend("cpu", 2, alone=contextlib.nullcontext, train_step=step)
    subject.protocol = Protocol(timed_steps=3, min_timed_seconds=2.0)
    assert ranks._steps_alone(subject, lambda: None) == [0.25] * 8
    assert len(taken) == 10
    monkeypatch.setattr(ranks, "least", lambda count, _: min(count, 5))
    assert len(ranks._steps_alone(subject, lambda: None)) == 5, "as many as the slowest rank"
