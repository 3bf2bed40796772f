import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import finish, make_trainer, never_waiting, start, tiny_recipe

from bench.measure import anatomy
from bench.measure.anatomy import PARTS, Timeline, measure_anatomy
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement
from cifar.config import RunConfig
from cifar.meter import Meter
from cifar.trainer import Trainer
from cifar.training_state import live_tensors, set_aside

STEPS = 3
PROTOCOL = Protocol(timed_steps=STEPS, min_timed_seconds=0.0)
SECONDS = {"data": 0.25, "forward": 0.5, "backward": 1.0, "zero": 0.125, "step": 2.0, "other": 4.0}
"""All sums of these are exact."""


class FakeClock:
    """Time passes only where a test says so; `cost` is what a mark takes after it was set."""

    now = 0.0
    cost = 0.0
    made: list["FakeClock"]

    def __init__(self, _device: object = None) -> None:
        self.marks: list[float] = []
        FakeClock.made.append(self)

    def mark(self) -> None:
        self.marks.append(FakeClock.now)
        FakeClock.now += FakeClock.cost

    def seconds(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.marks)]


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> type[FakeClock]:
    FakeClock.now, FakeClock.cost, FakeClock.made = 0.0, 0.0, []
    monkeypatch.setattr(anatomy, "make_clock", FakeClock)
    return FakeClock


def takes(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **options: Any) -> Any:
        FakeClock.now += seconds
        return function(*args, **options)

    return slow


def timed_trainer(monkeypatch: pytest.MonkeyPatch, **config: Any) -> Trainer:
    """A real trainer, each part of whose steps takes its time of `SECONDS` on the fake clock."""
    trainer = make_trainer(**config)
    for owner, name, part in (
        (trainer, "batches_of", "data"),
        (trainer, "compute_loss", "forward"),
        (trainer, "backward", "backward"),
        (trainer.optimizer, "zero_grad", "zero"),
        (trainer.optimizer, "step", "step"),
        (Meter, "add", "other"),
    ):
        monkeypatch.setattr(owner, name, takes(SECONDS[part], getattr(owner, name)))
    return trainer


def measure(trainer: Trainer) -> dict[str, Measurement]:
    subject = Subject(trainer, PROTOCOL)
    return {each.name: each for each in measure_anatomy(subject)}


def samples(value: float) -> tuple[tuple[float, ...], ...]:
    return ((value,) * STEPS,)


def test_parts_of_a_step_by_hand(monkeypatch: pytest.MonkeyPatch, fake_clock: Any) -> None:
    found = measure(timed_trainer(monkeypatch))
    assert found["step_data"].samples == samples(0.25)
    assert found["step_forward"].samples == samples(0.5)
    assert found["step_backward"].samples == samples(1.0)
    assert found["step_optimizer"].samples == samples(2.125)
    assert found["step_other"].samples == samples(4.0)
    assert found["anatomy_overhead"].samples == samples(0.0)
    assert found["pipeline_share"].samples == samples(0.25 / 7.875)
    assert {each.unit for name, each in found.items() if name.startswith("step_")} == {"s"}


def test_micro_batches_add_up(monkeypatch: pytest.MonkeyPatch, fake_clock: Any) -> None:
    found = measure(timed_trainer(monkeypatch, accumulation_steps=4))
    values = [found[f"step_{part}"].value for part in PARTS]
    assert values == [0.25, 4 * 0.5, 4 * 1.0, 2.125, 4 * 4.0]


def test_the_parts_add_up_to_the_whole_step_and_marks_are_its_overhead(
    monkeypatch: pytest.MonkeyPatch, fake_clock: type[FakeClock]
) -> None:
    """A marked step has 12 marks, of which all but the last cost it time; a plain one has 2."""
    fake_clock.cost = 0.0625
    found = measure(timed_trainer(monkeypatch))
    marked = [clock for clock in fake_clock.made if len(clock.marks) == 12][2:]
    plain = [clock for clock in fake_clock.made if len(clock.marks) == 2][2:]
    assert len(marked) == len(plain) == STEPS
    for index, clock in enumerate(marked):
        parts = [found[f"step_{part}"].samples[0][index] for part in PARTS]
        assert sum(parts) == clock.marks[-1] - clock.marks[0] == 7.875 + 11 * 0.0625
    assert found["step_data"].samples == samples(0.25 + 0.0625)
    assert found["anatomy_overhead"].samples == samples((7.875 + 0.6875) / (7.875 + 0.0625) - 1)


def test_real_parts_take_time_and_the_order_of_marks_is_right() -> None:
    found = measure(make_trainer())
    for part in PARTS:
        assert len(found[f"step_{part}"].samples[0]) == STEPS
        assert min(found[f"step_{part}"].samples[0]) > 0


def test_pairs_fill_the_protocol_s_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """At half a second per step, four of a kind take the two seconds."""
    monkeypatch.setattr(anatomy, "seconds_of", lambda work, _: [work(), 1.0][1])
    protocol = replace(PROTOCOL, min_timed_seconds=2.0)
    found = {e.name: e for e in measure_anatomy(Subject(make_trainer(), protocol))}
    assert len(found["step_data"].samples[0]) == 4


def test_the_order_within_pairs_alternates_and_the_first_two_do_not_count(
    fake_clock: type[FakeClock],
) -> None:
    order: list[str] = []

    def step(kind: str, seconds: float) -> Callable[[Trainer], Timeline]:
        def take(_trainer: Trainer) -> Timeline:
            timeline = Timeline(FakeClock())
            timeline.begin()
            FakeClock.now += 100.0 if kind not in order else seconds
            timeline.end("data")
            order.append(kind)
            return timeline

        return take

    told: list[int] = []
    subject = Subject(make_trainer(), PROTOCOL)
    pairs = anatomy._pairs(subject, step("a", 1.0), step("b", 2.0), lambda: told.append(len(order)))
    assert "".join(order) == "ba" + "ab" + "ba" + "ab" + "ba"
    assert told == [10], "before anything is waited for"
    assert [(a["data"], b["data"]) for a, b in pairs] == [(1.0, 2.0)] * STEPS


def test_one_process_has_no_communication() -> None:
    absent = measure(make_trainer())["step_communication"]
    assert (absent.status, absent.samples) == ("absent", ())
    assert "one process" in absent.reason


@pytest.mark.parametrize(
    ("before", "recipe"),
    [(1, {}), (4, {"optimizer": "adamw", "lr": 0.01, "ema_decay": 0.9}), (6, {})],
)
def test_training_goes_on_as_if_nothing_had_been_measured(
    before: int, recipe: dict[str, Any]
) -> None:
    """Of the six planned steps, `before` come first; the marked ones pass the end of an epoch."""
    weights, metrics = [], []
    for measured in (True, False):
        trainer = make_trainer(tiny_recipe(**recipe), accumulation_steps=2)
        for _ in range(before):
            trainer.train_step()
        trainer.module.eval()  # as inference leaves it
        if measured:
            measure(trainer)
            assert not trainer.module.training
            assert not {"batches_of", "optimizer_step"} & vars(trainer).keys()
        assert trainer.step == before
        trainer.module.train()
        while trainer.step < 8:
            trainer.train_step()
        weights.append({name: t.clone() for name, t in live_tensors(trainer).items()})
        metrics.append(trainer.meter.train_metrics())
    assert metrics[0] == metrics[1]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name, t in weights[0].items() if not torch.equal(t, weights[1][name])] == []


def test_measured_steps_train_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.module.eval()
    modes = []
    trainer.module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    measure(trainer)
    assert modes == [True] * 2 * (2 + STEPS)


def test_a_step_that_fails_leaves_the_trainer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    before = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    steps = iter(range(3))

    def failing(*_: object) -> None:
        if next(steps, None) is None:
            raise RuntimeError("out of memory")
        step()

    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(trainer)
    assert trainer.step == 0
    assert all(torch.equal(before[name], t) for name, t in trainer.weights().items())
    assert not {"batches_of", "optimizer_step"} & vars(trainer).keys()
    assert "backward" not in vars(trainer)


def test_what_is_set_aside_was_changed_within() -> None:
    trainer = make_trainer(tiny_recipe(ema_decay=0.9))
    trainer.train_step()
    before = {name: tensor.clone() for name, tensor in live_tensors(trainer).items()}
    groups = {name.partition(".")[0] for name in before}
    assert groups == {"model", "optimizer", "ema"}
    with set_aside(trainer):
        trainer.train_step()
        inside = live_tensors(trainer)
        changed = {
            name.partition(".")[0]
            for name, tensor in inside.items()
            if not torch.equal(before[name], tensor)
        }
    assert changed == groups
    assert trainer.average.updates == trainer.step == 1


TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from test_anatomy import FakeClock, measure, make_trainer
from bench.measure import anatomy
from cifar.distributed import leave
from cifar.training_state import live_tensors

trainer = make_trainer()
rank = dist.get_rank()
for _ in range(2):
    trainer.train_step()

def slow_average(_state, bucket):
    FakeClock.now += 1.0 + rank
    dist.all_reduce(bucket.buffer())  # waited for: else gloo's thread drops Python objects at exit
    done = torch.futures.Future()
    done.set_result(bucket.buffer() / 2)
    return done

trainer.wrapped.register_comm_hook(None, slow_average)
FakeClock.made = []
anatomy.make_clock = FakeClock
before = {name: tensor.clone() for name, tensor in live_tensors(trainer).items()}
found = measure(trainer)["step_communication"]
after = live_tensors(trainer)
same = all(torch.equal(before[name], tensor) for name, tensor in after.items())
trainer.train_step()
sums = torch.stack([p.detach().double().sum() for p in trainer.module.parameters()])
both = [torch.empty_like(sums) for _ in range(2)]
dist.all_gather(both, sums)
verdict = [same, torch.equal(*both)]
everyone = [None, None]
dist.all_gather_object(everyone, verdict)
if rank == 0:
    print("RESULT", json.dumps([found.samples, found.value, everyone]))
del trainer, before, after
leave()
"""
"""Averaging gradients takes 1 s on the first process's fake clock and 2 s on the second's."""


@pytest.mark.multiprocess
def test_communication_is_what_steps_without_it_lack(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2, script,
                    Path(__file__).parent)  # fmt: skip
    code, out, err = finish(process)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT")]
    found, value, verdicts = json.loads(line.removeprefix("RESULT"))
    assert found == [[1.0] * STEPS, [2.0] * STEPS]
    assert value == 2.0
    assert verdicts == [[True, True]] * 2, "weights are as before, and equal after a further step"


@pytest.mark.gpu
def test_parts_on_a_gpu_are_spans_of_its_stream_and_the_loss_scale_is_kept() -> None:
    trainer = make_trainer(run=RunConfig(), precision="fp16")
    for _ in range(3):
        trainer.train_step()
    before = {name: tensor.clone() for name, tensor in live_tensors(trainer).items()}
    scaler, skipped = trainer.scaler.state_dict(), trainer.meter.skipped_steps
    found = measure(trainer)
    assert all(min(found[f"step_{part}"].samples[0]) > 0 for part in PARTS)
    assert trainer.scaler.state_dict() == scaler
    assert trainer.meter.skipped_steps == skipped
    assert all(torch.equal(before[name], t) for name, t in live_tensors(trainer).items())


@pytest.mark.gpu
def test_marked_steps_never_wait_for_the_gpu() -> None:
    trainer = make_trainer(run=RunConfig())
    for _ in range(4):
        trainer.train_step()
    anatomy._marked_step(trainer)
    with never_waiting():
        timeline = anatomy._marked_step(trainer)  # within an epoch: the sixth step of six
    assert sum(timeline.seconds().values()) > 0
