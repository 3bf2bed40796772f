import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

from bench import measure, worker
from bench.environment import code_digest, collect, cpu_model
from bench.job import DEVICE, Job
from bench.measure import clock, compilation, inference, outcome, training
from bench.measure.batches import Timed
from bench.measure.clock import HostClock
from bench.measure.compilation import break_even, excess, first_steps, measure_compilation
from bench.measure.subject import Subject
from bench.measure.training import (
    PACE_STEPS,
    UNBOUNDED_STEPS,
    fitting_steps,
    has_settled,
    measure_training,
    planned_steps,
)
from bench.protocol import Protocol
from bench.record import Measurement, Record
from bench.record_file import parse_record
from bench.spec import CAPTURE_STEPS, Cell, Plan, Suite, Task, expand, grid, warm_up_span
from bench.unfinished import PENDING, is_unfinished
from cifar import device_memory, memory
from cifar.config import RunConfig
from cifar.data.config import parse_data
from cifar.data.dataset import Dataset
from cifar.data.sources import load_dataset
from cifar.device_memory import reset_peak_memory
from cifar.errors import CifarError, ConfigError, UnsupportedError
from cifar.process import worker_environment
from cifar.serialize import to_json
from cifar.trainer import Trainer

PROTOCOL = Protocol(
    warmup_steps=1,
    timed_steps=3,
    min_timed_seconds=0.0,
    throughput_seconds=0.01,
    inference_batch_sizes=(1, 8),
    inference_iterations=4,
)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_cell(npz: Path, **options: object) -> Cell:
    return grid(
        ["resnet20-w4"], ["fp32"], batch_sizes=(16,), data=parse_data(f"npz:{npz}"), **options
    )[0]


def bf16_cell(npz: Path) -> Cell:
    cell = make_cell(npz)
    return replace(cell, train=replace(cell.train, precision="bf16"))


def make_subject(cell: Cell, protocol: Protocol = PROTOCOL) -> Subject:
    dataset = load_dataset(cell.train.data)
    samples = planned_steps(protocol, 16) * 16
    trainer = Trainer(cell.train, RunConfig(), dataset, train_samples=samples)
    return Subject(trainer, protocol)


def collect_all(subject: Subject) -> dict[str, list[Measurement]]:
    found: dict[str, list[Measurement]] = {}
    for metric in (*measure.CORE, *measure.BASIC.values()):
        for measurement in metric(subject):
            subject.taken.append(measurement)
            found.setdefault(measurement.name, []).append(measurement)
    return found


def test_budget_in_steps() -> None:
    assert planned_steps(Protocol(), 128) == UNBOUNDED_STEPS
    assert planned_steps(Protocol(train_samples=12_800), 128) == 100
    assert planned_steps(Protocol(train_samples=12_850), 128) == 100


def test_speed_only_cell(npz: Path) -> None:
    found = collect_all(make_subject(make_cell(npz)))
    (throughput,) = found["train_throughput"]
    assert len(throughput.samples[0]) == 3
    assert throughput.labels["samples_per_step"] == 16
    assert throughput.value == pytest.approx(3 * 16 / sum(throughput.samples[0]))
    (top1,) = found["top1"]
    assert top1.status == "absent"
    assert "not trained" in top1.reason
    by_size = {each.labels["batch_size"]: each for each in found["inference_latency"]}
    assert {size: len(each.samples[0]) for size, each in by_size.items()} == {1: 4, 8: 4}
    assert found["peak_memory_bytes"][0].value > 50 * 2**20


def test_the_seconds_of_a_training_hold_all_of_its_steps(npz: Path) -> None:
    subject = make_subject(make_cell(npz), replace(PROTOCOL, train_samples=20 * 16))
    before = time.monotonic()
    found = {each.name: each for each in measure_training(subject)}
    whole = found["training_seconds"]
    assert (whole.unit, whole.better, whole.status) == ("s", "lower", "ok")
    timed = sum(found["train_throughput"].samples[0])
    steps = found["first_step"].samples[0] + found["warmup_step"].samples[0]
    assert timed + sum(steps) < whole.value < time.monotonic() - before
    assert subject.trainer.step == 20


def test_speed_alone_has_no_seconds_of_a_training(npz: Path) -> None:
    assert "training_seconds" not in collect_all(make_subject(make_cell(npz)))


def test_the_time_to_the_first_timed_step_counts_from_the_launch(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(make_cell(npz))
    before = time.monotonic()
    monkeypatch.setenv("BENCH_LAUNCHED", str(before - 1000))
    found = {each.name: each for each in measure_training(subject)}
    after = time.monotonic()
    waited = found["time_to_first_timed_step"]
    assert (waited.unit, waited.better, waited.status) == ("s", "lower", "ok")
    timed = sum(found["train_throughput"].samples[0])
    warm = found["first_step"].samples[0] + found["warmup_step"].samples[0]
    assert 1000 + sum(warm) <= waited.value <= 1000 + after - before - timed


def test_the_time_to_the_first_timed_step_is_absent_without_a_launcher(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENCH_LAUNCHED", raising=False)
    found = {each.name: each for each in measure_training(make_subject(make_cell(npz)))}
    waited = found["time_to_first_timed_step"]
    assert (waited.status, waited.reason) == ("absent", "no launcher set BENCH_LAUNCHED")


def test_the_budget_is_trained_and_scored(npz: Path) -> None:
    subject = make_subject(make_cell(npz), replace(PROTOCOL, train_samples=20 * 16))
    found = collect_all(subject)
    assert subject.trainer.samples_seen == 320
    (top1,) = found["top1"]
    assert top1.value == subject.trainer.evaluate().top1
    assert top1.labels["trained_samples"] == 320
    assert top1.labels["samples"] == 50
    assert len(found["train_throughput"][0].samples[0]) == 3


def test_a_budget_shorter_than_the_window_times_what_there_is(npz: Path) -> None:
    subject = make_subject(make_cell(npz), replace(PROTOCOL, train_samples=4 * 16))
    found = collect_all(subject)
    assert len(found["train_throughput"][0].samples[0]) == 1
    assert subject.trainer.step == 4


@pytest.mark.parametrize(
    ("allowed", "kind"),
    [(True, "resident set while training"), (False, "resident set since the process started")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own memory is measured there")
def test_the_peak_of_memory_says_since_when_it_is(
    npz: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, kind: str
) -> None:
    if not allowed:
        refused = mock.Mock(side_effect=PermissionError)
        monkeypatch.setattr(memory, "Path", lambda _: SimpleNamespace(write_text=refused))
        monkeypatch.setattr(device_memory, "peak_resident", lambda: 2**30)
    (peak,) = collect_all(make_subject(make_cell(npz)))["peak_memory_bytes"]
    assert peak.labels["kind"] == kind


def test_sizes_are_those_of_the_model(npz: Path) -> None:
    subject = make_subject(make_cell(npz))
    found = {each.name: each.value for each in outcome.measure_size(subject)}
    module = subject.trainer.module
    assert found["param_count"] == sum(p.numel() for p in module.parameters())
    payload = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert payload < found["checkpoint_bytes"] < payload + 20_000


def test_latency_is_seconds_of_a_batch_by_its_size_and_throughput_that_of_all_in_a_row(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(make_cell(npz))
    timed = Timed(each=[0.4, 0.8], row=2.0, in_row=10)
    monkeypatch.setattr(inference, "time_batches", lambda *_: timed)
    found = {
        (each.name, each.labels["batch_size"]): each
        for each in inference.measure_inference(subject)
    }
    assert found["inference_latency", 8].samples == ((0.05, 0.1),)
    assert found["inference_latency", 1].samples == ((0.4, 0.8),)
    assert found["inference_throughput", 8].value == 40.0, "80 images in 2 s"
    assert found["inference_throughput", 1].value == 5.0


def test_inference_stops_after_its_seconds_but_not_before_three_batches(npz: Path) -> None:
    protocol = replace(
        PROTOCOL, inference_seconds=1e-9, inference_iterations=50, min_timed_seconds=9.0
    )
    subject = make_subject(make_cell(npz), protocol)
    found = [e for e in inference.measure_inference(subject) if e.name == "inference_latency"]
    assert [len(each.samples[0]) for each in found] == [3, 3]


def test_host_clock_gives_the_time_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 1.5, 3.5])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(moments))
    host = HostClock()
    for _ in range(3):
        host.mark()
    assert host.seconds() == [0.5, 2.0]


def test_a_warm_up_has_settled_when_two_spans_agree() -> None:
    assert has_settled([], 0)
    assert not has_settled([1.0, 1.0, 1.0], 2)
    assert has_settled([9.0, 1.0, 1.0, 1.04, 1.04], 2)
    assert not has_settled([1.0, 1.0, 1.06, 1.06], 2)
    assert not has_settled([1.06, 1.06, 1.0, 1.0], 2), "still getting faster"


def test_a_span_of_a_warm_up_is_shorter_where_steps_are_long() -> None:
    assert [warm_up_span(5, seconds) for seconds in (0.01, 0.2, 0.21, 0.4, 1.0, 9.0)] == [
        *(5, 5, 5, 3, 1, 1)
    ]
    assert warm_up_span(0, 9.0) == 0


def test_steps_of_seconds_are_warm_after_the_second_that_took_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def warm_up(first: float, *further: float) -> tuple[list[float], bool]:
        steps = iter(further)
        monkeypatch.setattr(training, "seconds_of_a_step", lambda _: next(steps))
        return training._warm_up(pretend("cpu", replace(PROTOCOL, warmup_steps=5)), first)

    assert warm_up(2.4, 2.4, 9.0) == ([2.4], True)
    assert warm_up(3.0, 2.4, 2.4, 9.0) == ([2.4, 2.4], True), "the first one was slow"
    assert warm_up(0.3, *[0.2] * 12) == ([0.2] * 9, True), "ten short ones with the first"


def test_the_warm_up_ends_at_its_cap_and_says_so(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "has_settled", lambda *_: False)
    subject = make_subject(
        make_cell(npz), replace(PROTOCOL, max_warmup_steps=4, inference_warmup=1)
    )
    (warm,) = collect_all(subject)["warmup_step"]
    assert (len(warm.samples[0]), warm.labels["settled"]) == (4, False)


def test_a_window_of_seconds_holds_as_many_steps_as_the_warm_up_s_pace_allows(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "seconds_of_a_step", lambda _: 0.5)
    subject = make_subject(make_cell(npz), replace(PROTOCOL, timed_seconds=3.0))
    assert len(collect_all(subject)["train_throughput"][0].samples[0]) == 6


def test_a_window_is_as_long_as_its_seconds_and_as_its_least() -> None:
    steps, seconds = Protocol(timed_steps=20, min_timed_seconds=2.0), Protocol(timed_seconds=3.0)
    assert fitting_steps(steps, 0.01) == 200
    assert fitting_steps(steps, 0.5) == 20
    assert fitting_steps(replace(steps, min_timed_seconds=0.0), 0.01) == 20
    assert fitting_steps(steps, None) == 20, "nothing tells"
    assert fitting_steps(seconds, 0.4) == 8


def pretend(device: str, protocol: Protocol, *, left: int = 100, compiled: bool = False) -> Any:
    """A subject with `left` steps before it; its trainer counts those that are taken."""
    config = SimpleNamespace(compile=compiled, compile_mode="default")
    trainer = SimpleNamespace(step=0, total_steps=left, config=config)

    def train_step() -> None:
        trainer.step += 1

    trainer.train_step = train_step
    return SimpleNamespace(trainer=trainer, protocol=protocol, device=torch.device(device))


def test_the_pace_of_a_gpu_is_that_of_steps_waited_for_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds_of(work: Callable[[], None], _: torch.device) -> float:
        work()
        return 1.0

    monkeypatch.setattr(training, "seconds_of", seconds_of)
    warm, timed = [9.0, 0.5, 0.3, 0.4], PROTOCOL.timed_steps
    wanted = replace(PROTOCOL, min_timed_seconds=2.0)
    gpu = pretend("cuda", wanted)
    assert training._pace(gpu, warm) == 1.0 / PACE_STEPS
    assert gpu.trainer.step == PACE_STEPS
    for subject in (
        pretend("cpu", wanted),
        pretend("cuda", PROTOCOL),  # no seconds to fill
        pretend("cuda", wanted, left=PACE_STEPS + timed + 1),  # and two that are observed
    ):
        assert training._pace(subject, warm) == 0.4, "the median of the last span of one step"
        assert subject.trainer.step == 0
    assert training._pace(pretend("cpu", wanted), []) is None


@pytest.mark.parametrize(("compiled", "steps"), [(False, 0), (True, CAPTURE_STEPS)])
def test_a_compiled_cell_takes_the_steps_that_capture_before_its_window(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, steps: int
) -> None:
    monkeypatch.setattr(training, "seconds_of_a_step", lambda _: 1.0)
    protocol = replace(PROTOCOL, warmup_steps=0, max_warmup_steps=0, inference_warmup=0)
    subject = pretend("cpu", protocol, compiled=compiled)
    assert training._warm_up(subject, 30.0) == ([1.0] * steps, True)


def test_a_budget_holds_the_steps_that_capture() -> None:
    protocol = replace(PROTOCOL, warmup_steps=0, train_samples=5 * 16)
    plans = {
        compiled: Plan(
            protocol=protocol,
            cells=grid(["resnet20"], ["fp32"], compile=(compiled,), batch_sizes=(16,)),
        )
        for compiled in (False, True)
    }
    assert expand(Suite(name="", description="", plans=(plans[False],)))
    with pytest.raises(ConfigError, match=r"train-samples: 80: give 0 .* at least 96"):
        expand(Suite(name="", description="", plans=(plans[True],)))


def test_compile_seconds_by_hand() -> None:
    first = Measurement(name="first_step", unit="s", better="lower", samples=((30.0,), (3.0,)))
    warm = replace(first, name="warmup_step", samples=((2.5, 7.0, 9.0), (4.5, 1.0, 9.0)))
    assert first_steps([first], 1) == [3.0]
    assert first_steps([first, warm], 0) == [30.0, 2.5, 7.0], "two further steps"
    assert excess([30.0, 2.5, 7.0], 2.0) == 28.0 + 0.5 + 5.0
    assert excess([3.0, 4.5, 1.0], 4.0) == 0.5
    cold = Measurement(name="compile_seconds", unit="s", better="lower", samples=((28.0,), (0.0,)))
    assert break_even(cold, [[1.0, 1.0], [2.0, 2.0]], [[2.5], [9.0]]).value == 4, "28 / (9 - 2)"
    slower = break_even(cold, [[2.0]], [[1.5]])
    assert slower.status == "absent" and "0.5 s longer" in slower.reason


def test_cold_and_warm_are_told_from_the_same_steps(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eager step takes 3 s and a compiled one 2 s, but for the first ones of either kind."""
    monkeypatch.setattr("cifar.accelerator.check_compiler", lambda _: None)
    subject = make_subject(make_cell(npz, compile=(True,)))
    trainer, used = subject.trainer, subject.trainer.model
    again = iter([7.0, 5.0, 1.0])

    def seconds(_: Subject) -> float:
        if trainer.model is trainer.wrapped:
            return 3.0
        return 2.0 if trainer.model is used else next(again)

    for name in ("seconds_of_a_step", "pace_of_steps"):
        monkeypatch.setattr(compilation, name, seconds)
    for name, value in (("first_step", (30.0,)), ("warmup_step", (4.0, 2.5, 9.0))):
        each = Measurement(name=name, unit="s", better="lower", samples=(value,))
        subject.taken.append(each)
    found = {each.name: each.value for each in measure_compilation(subject)}
    assert found["compile_seconds"] == 28.0 + 2.0 + 0.5
    assert found["warm_compile_seconds"] == 5.0 + 3.0
    assert (found["compiled_step"], found["eager_step"]) == (2.0, 3.0)
    assert found["compile_break_even"] == 31


@pytest.mark.slow
def test_a_compiled_cell_says_what_compiling_cost(npz: Path) -> None:
    cell = make_cell(npz, compile=(True,))
    found = collect_all(make_subject(cell))
    (cold,), (warm,) = found["compile_seconds"], found["warm_compile_seconds"]
    assert cold.value > warm.value > 0
    assert len(found["eager_step"][0].samples[0]) == len(found["compiled_step"][0].samples[0])
    assert found["compile_break_even"][0].status in ("ok", "absent")


def test_an_eager_cell_says_nothing_of_compiling(npz: Path) -> None:
    assert not {"compile_seconds", "eager_step"} & collect_all(make_subject(make_cell(npz))).keys()


def run_worker(folder: Path, cell: Cell, protocol: Protocol = PROTOCOL) -> int:
    folder.mkdir()
    (folder / "cell.json").write_text(to_json(Job(task=Task(cell=cell, protocol=protocol))))
    return worker.main(folder)


def test_worker_writes_one_good_record(npz: Path, tmp_path: Path, dataset: Dataset) -> None:
    cell = make_cell(npz)
    assert run_worker(tmp_path / "job", cell) == 0
    record = record_in(tmp_path / "job")
    assert record.status == "ok"
    assert record.cell == cell
    assert record.data is not None
    assert record.data.fingerprint == load_dataset(cell.train.data).fingerprint()
    assert record.environment is not None
    assert record.environment.code_digest == code_digest()
    assert record.effective["samples_seen"] > 64


def record_in(folder: Path) -> Record:
    return parse_record((folder / "record.json").read_text())


def test_what_breaks_after_the_training_leaves_the_record_of_it(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is: the launcher tells it from how the process ended."""

    def broken(subject: Subject) -> Iterator[Measurement]:
        known = record_in(tmp_path / "job")
        assert known.reason == "not measured: broken, never"
        yield subject.measurement("half", "s", "lower", [1.0])
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    later = {"flops": measure.BASIC["flops"], "broken": broken, "never": broken}
    monkeypatch.setattr(worker, "BASIC", later)
    with pytest.raises(RuntimeError, match="illegal memory"):
        run_worker(tmp_path / "job", make_cell(npz))
    record = record_in(tmp_path / "job")
    assert (record.status, record.reason) == ("ok", "not measured: broken, never")
    assert is_unfinished(record)
    for name in ("train_throughput", "param_count", "train_flops"):
        assert record.value(name) is not None
    assert [record.find(name).reason for name in ("broken", "never")] == [PENDING, PENDING]
    assert record.effective["samples_seen"] > 0


def test_what_breaks_in_the_training_leaves_a_record_of_where_and_of_which_images(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Subject) -> Iterator[Measurement]:
        raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(worker, "CORE", (full,))
    with pytest.raises(torch.OutOfMemoryError):
        run_worker(tmp_path / "job", make_cell(npz))
    record = record_in(tmp_path / "job")
    assert (record.status, record.reason, record.measurements) == ("failed", PENDING, ())
    assert is_unfinished(record)
    assert record.environment is not None
    assert_names_its_images(record, npz)


def test_what_breaks_while_reading_the_images_leaves_a_record_of_where(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> Dataset:
        raise MemoryError

    monkeypatch.setattr(worker, "load_dataset", full)
    with pytest.raises(MemoryError):
        run_worker(tmp_path / "job", make_cell(npz))
    record = record_in(tmp_path / "job")
    assert is_unfinished(record)
    assert record.environment is not None and record.data is None


def test_training_alone_is_all_that_is_measured(npz: Path, tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, warmup_steps=0, training_alone=True)
    assert run_worker(tmp_path / "job", make_cell(npz), protocol) == 0
    record = record_in(tmp_path / "job")
    assert (record.status, record.reason) == ("ok", "")
    assert record.value("train_throughput") and record.value("peak_memory_bytes")
    absent = ("top1", "param_count", "train_flops", "inference_latency", "eager_step")
    assert [record.find(name) for name in absent] == [None] * len(absent)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these precisions")
def test_worker_says_what_a_cpu_cannot_run(npz: Path, tmp_path: Path, precision: str) -> None:
    cell = make_cell(npz)
    cell = replace(cell, train=replace(cell.train, precision=precision))
    assert run_worker(tmp_path / "job", cell) == 0
    record = record_in(tmp_path / "job")
    assert record.status == "unsupported"
    assert precision in record.reason
    assert_names_its_images(record, npz)


def assert_names_its_images(record: Record, npz: Path) -> None:
    dataset = load_dataset(parse_data(f"npz:{npz}"))
    assert record.data is not None
    assert record.data.fingerprint == dataset.fingerprint()
    assert (record.data.train_samples, record.data.test_samples) == (96, 50)


NAMED = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("there", "environ", "seen", "told"),
    [
        (0, {}, "cpu", "cpu"),
        (0, {}, "cuda", "cuda"),  # NVML cannot be asked
        (2, {}, "cuda", "cuda"),
        (2, {}, "cpu", "NVML sees 2 GPU(s), and torch none"),
        (1, {NAMED: "7"}, "cpu", f"NVML sees 1 GPU(s), and torch none under {NAMED}=7"),
        *((2, {NAMED: hidden}, "cpu", "cpu") for hidden in ("", "-1", "-1,0", "NoDevFiles")),
        (2, {NAMED: "", DEVICE: "cpu"}, "cpu", "cpu"),
        (0, {NAMED: "GPU-1", DEVICE: "cuda"}, "cpu", f"torch none under {NAMED}=GPU-1"),
        (2, {NAMED: "", DEVICE: "cuda"}, "cpu", f"torch none under {NAMED}="),
        (2, {NAMED: "", DEVICE: "cpu"}, "cuda", "cpu"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_expected_all_the_same(
    monkeypatch: pytest.MonkeyPatch, there: int, environ: dict[str, str], seen: str, told: str
) -> None:
    monkeypatch.setattr(worker, "installed_gpus", lambda: there)
    if told in ("cpu", "cuda"):
        assert worker.expected_device(seen, environ) == told
        return
    with pytest.raises(CifarError) as caught:
        worker.expected_device(seen, environ)
    assert told in str(caught.value)
    assert "set CUDA_VISIBLE_DEVICES= to measure the CPU on purpose" in str(caught.value)


def test_a_torch_that_was_built_for_cpus_measures_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "installed_gpus", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert worker.expected_device("cpu", {}) == "cpu"
    with pytest.raises(CifarError, match="as it was built without CUDA"):
        worker.expected_device("cpu", {DEVICE: "cuda"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_worker_does_not_measure_the_cpu_of_a_machine_whose_gpus_it_cannot_see(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "installed_gpus", lambda: 2)
    monkeypatch.delenv(NAMED, raising=False)
    assert run_worker(tmp_path / "job", make_cell(npz)) == 1
    record = record_in(tmp_path / "job")
    assert (record.status, record.measurements) == ("failed", ())
    assert record.reason.startswith("device: cpu: NVML sees 2 GPU(s), and torch none")
    assert_names_its_images(record, npz)


@pytest.mark.parametrize(
    ("kernels", "told"),
    [(False, "has no bf16 kernels and emulates them"), (True, "has no bf16 instructions")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has instructions")
def test_worker_refuses_another_formats_speed_where_the_protocol_does(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: bool, told: str
) -> None:
    """As of a CPU without AVX-512, and of one with it but without its bf16 extension."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    monkeypatch.setattr("cifar.precision.platform.machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    protocol = replace(PROTOCOL, allow_emulated=False)
    assert run_worker(tmp_path / "job", bf16_cell(npz), protocol) == 0
    record = record_in(tmp_path / "job")
    assert (record.status, record.measurements) == ("unsupported", ())
    assert told in record.reason
    assert_names_its_images(record, npz)


def test_worker_says_that_there_is_no_compiler(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert run_worker(tmp_path / "job", make_cell(npz, compile=(True,))) == 0
    record = record_in(tmp_path / "job")
    assert record.status == "unsupported"
    assert "'no-such-compiler' was not found" in record.reason
    assert_names_its_images(record, npz)


def test_worker_says_that_memory_cannot_be_limited(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int | None) -> None:
        raise UnsupportedError("memory-limit: 9: this system enforces none")

    monkeypatch.setattr(worker, "limit_memory", refuse)
    assert run_worker(tmp_path / "job", make_cell(npz)) == 0
    record = record_in(tmp_path / "job")
    assert (record.status, record.reason[:12]) == ("unsupported", "memory-limit")
    assert_names_its_images(record, npz)


def test_worker_measures_the_trainers_emulation_and_says_so(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernels in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda k=kernels: k)
        folder = tmp_path / f"kernels-{kernels}"
        assert run_worker(folder, bf16_cell(npz)) == 0
        record = record_in(folder)
        assert record.status == "ok"
        assert ("emulates" in record.reason) is not kernels
        assert record.effective["emulated"] is not kernels
        assert record.effective["autocast"] == "bfloat16"
        assert record.effective["input_dtype"] == ("bfloat16" if kernels else "float32")


def test_worker_fails_when_the_effective_configuration_differs(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nhwc(Trainer):
        def _build_model(self, is_resumed: bool) -> None:
            super()._build_model(is_resumed)
            self.module.to(memory_format=torch.channels_last)

    monkeypatch.setattr(worker, "Trainer", Nhwc)
    assert run_worker(tmp_path / "job", make_cell(npz)) == 1
    record = record_in(tmp_path / "job")
    assert record.status == "failed"
    assert "weight_channels_last: True where False was asked" in record.reason


def test_worker_records_what_disturbed_the_windows(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Monitor, "report", lambda _: ([], ["a goat"]))
    assert run_worker(tmp_path / "job", make_cell(npz), replace(PROTOCOL, warmup_steps=0)) == 0
    record = record_in(tmp_path / "job")
    assert (record.status, record.invalid[0]) == ("ok", "a goat")
    sizes = PROTOCOL.inference_batch_sizes
    assert {f"inference b{size}: a goat" for size in sizes} <= set(record.invalid)


def test_worker_records_the_wrong_number_of_processes(npz: Path, tmp_path: Path) -> None:
    cell = replace(make_cell(npz), num_processes=2)
    assert run_worker(tmp_path / "job", cell) == 1
    record = record_in(tmp_path / "job")
    assert record.status == "failed"
    assert "num-processes" in record.reason


def test_environment_is_complete_and_keeps_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MY_TOKEN", "secret")
    environment = collect()
    assert environment.torch == torch.__version__
    assert environment.worker_env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "secret" not in to_json(environment)
    assert (environment.git_sha is None) == bool(environment.git_reason)


def test_git_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    environment = collect()
    assert environment.git_sha is None
    assert environment.git_reason == "git is not installed"


@pytest.mark.multiprocess
def test_two_processes_leave_one_record_with_samples_of_both(npz: Path, tmp_path: Path) -> None:
    options = ["--models", "resnet20-w4", "--precisions", "fp32", "-b", "16"]
    options += ["--num-processes", "2", "--data", f"npz:{npz}", "--train-samples", "96"]
    options += ["--warmup-steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", *options, "--runs-dir", str(tmp_path / "runs")],
        env=worker_environment(2, os.environ),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "runs").glob("*/records.jsonl")
    record = parse_record(path.read_text())
    throughput = record.find("train_throughput")
    assert throughput is not None
    assert len(throughput.samples) == 2
    assert record.effective["wrapper"] == "DistributedDataParallel"
    assert record.effective["num_processes"] == 2
    assert record.find("top1").labels["samples"] == 50


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("AMD EPYC", "AMD EPYC (family 25 model 17)"),
        ("Intel(R) Xeon(R) Platinum 8488C", "Intel(R) Xeon(R) Platinum 8488C"),
    ],
)
def test_a_cpu_without_a_number_in_its_name_is_told_by_its_family(
    tmp_path: Path, name: str, told: str
) -> None:
    lines = "processor: {}\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {}\n"
    info = tmp_path / "cpuinfo"
    info.write_text("".join(lines.format(number, name) for number in range(2)))
    assert cpu_model(info) == told
    assert cpu_model(tmp_path / "absent")


@pytest.mark.gpu
def test_what_was_reserved_and_freed_is_not_in_the_peak(npz: Path) -> None:
    """And the step after the mark is set anew takes all that a window's steps need."""
    subject = make_subject(make_cell(npz))
    trainer, device = subject.trainer, subject.device
    for _ in range(3):
        trainer.train_step()
    torch.empty(2**30, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved(device) >= 2**30
    reset_peak_memory(device)
    trainer.train_step()
    asked = torch.cuda.memory_stats(device)["num_device_alloc"]
    for _ in range(5):
        trainer.train_step()
    assert torch.cuda.memory_stats(device)["num_device_alloc"] == asked
    assert torch.cuda.max_memory_reserved(device) < 2**30


@pytest.mark.gpu
def test_the_memory_of_cuda_graphs_is_in_the_peak(npz: Path) -> None:
    """Replaying a graph takes none that is counted, so it would look like a fraction of eager's."""
    cell = make_cell(npz)
    graphs = replace(cell, train=replace(cell.train, compile=True, compile_mode="reduce-overhead"))
    eager, replayed = (
        collect_all(make_subject(each))["peak_memory_bytes"][0].value for each in (cell, graphs)
    )
    assert replayed > 0.5 * eager
    torch._dynamo.reset()


def test_a_window_of_short_steps_holds_more_of_them(npz: Path) -> None:
    subject = make_subject(make_cell(npz), replace(PROTOCOL, min_timed_seconds=0.5))
    (steps,) = (each for each in measure_training(subject) if each.name == "train_throughput")
    assert len(steps.samples[0]) > PROTOCOL.timed_steps


@pytest.mark.gpu
@pytest.mark.parametrize("alone", [False, True])
def test_training_alone_takes_no_step_that_is_undone(
    npz: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    woken: list[Subject] = []
    monkeypatch.setattr(training, "_wake_up", woken.append)
    subject = make_subject(make_cell(npz), replace(PROTOCOL, training_alone=alone))
    assert [*measure_training(subject)]
    assert len(woken) == (not alone)
