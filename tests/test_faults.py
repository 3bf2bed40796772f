"""Faults in a worker: what they do, what they say they cost, and that a record tells of them."""

from pathlib import Path

import pytest
import torch
from test_measure import make_cell
from training import make_trainer, tiny_recipe

from bench import faults, worker
from bench.faults import InjectedFault
from bench.job import Fault, Job
from bench.measure import clock as measure_clock
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record_file import parse_record
from bench.spec import Task
from cifar.serialize import to_json

SLEEP = Fault(kind="sleep", seconds=0.05)
PROTOCOL = Protocol(warmup_steps=0, timed_steps=2, inference_batch_sizes=())


class Clock:
    """Time that passes only while somebody sleeps or multiplies."""

    def __init__(self) -> None:
        self.now = 0.0
        self.products = 0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def mm(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.now += 0.004
        self.products += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(faults, "time", made)
    monkeypatch.setattr(measure_clock, "time", made)
    monkeypatch.setattr(faults.torch, "mm", made.mm)
    return made


def test_a_sleep_is_slept_once_a_step_and_the_step_is_taken(clock: Clock) -> None:
    trainer = make_trainer(tiny_recipe(), trainer={"update": InjectedFault(SLEEP).update})
    plain = make_trainer(tiny_recipe())
    for each in (trainer, plain):
        each.train_step()
        each.train_step()
    assert clock.now == pytest.approx(0.1)
    for name, weight in plain.weights().items():
        assert torch.equal(weight, trainer.weights()[name]), name


def test_as_many_products_as_take_the_seconds_asked_for(clock: Clock) -> None:
    fault = InjectedFault(Fault(kind="matmul", seconds=0.05))
    trainer = make_trainer(trainer={"update": fault.update})
    fault.install(trainer)
    (measured,) = fault.measure(Subject(trainer, PROTOCOL))
    # 0.05 s are 12.5 products of 4 ms: 12, which cost 48 ms by themselves.
    assert measured.samples == (pytest.approx((0.048,) * faults.REPEATS),)
    clock.products = 0
    trainer.train_step()
    assert clock.products == 12


def test_a_wrong_dtype_has_no_cost_to_measure() -> None:
    fault = InjectedFault(Fault(kind="wrong-dtype"))
    (measured,) = fault.measure(Subject(make_trainer(), PROTOCOL))
    assert (measured.status, measured.value) == ("absent", None)


def run(folder: Path, npz: Path, fault: Fault | None) -> tuple[int, str]:
    folder.mkdir()
    job = Job(task=Task(cell=make_cell(npz), protocol=PROTOCOL), fault=fault)
    (folder / "cell.json").write_text(to_json(job))
    return worker.main(folder), (folder / "record.json").read_text()


def test_a_worker_s_record_tells_of_the_fault(npz: Path, tmp_path: Path) -> None:
    make_trainer()
    code, text = run(tmp_path / "job", npz, SLEEP)
    record = parse_record(text)
    assert (code, record.status, record.valid) == (0, "ok", False)
    assert any("injected fault: sleep:0.05" in reason for reason in record.invalid)
    costs = [each for each in record.measurements if each.name == "fault_seconds"]
    assert [len(each.samples[0]) for each in costs] == [faults.REPEATS] * 2
    assert min(value for each in costs for value in each.samples[0]) >= 0.05
    throughput = record.find("train_throughput")
    assert throughput is not None
    assert min(throughput.samples[0]) >= 0.05


def test_a_worker_that_runs_in_another_dtype_fails_and_names_it(npz: Path, tmp_path: Path) -> None:
    make_trainer()
    code, text = run(tmp_path / "job", npz, Fault(kind="wrong-dtype"))
    record = parse_record(text)
    assert (code, record.status) == (1, "failed")
    assert "bfloat16" in record.reason


def test_a_worker_without_a_fault_has_a_record_without_one(npz: Path, tmp_path: Path) -> None:
    make_trainer()
    code, text = run(tmp_path / "job", npz, None)
    record = parse_record(text)
    assert (code, record.status) == (0, "ok")
    assert not any("fault" in reason for reason in record.invalid)
    assert record.find("fault_seconds") is None
