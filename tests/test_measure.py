import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from bench import measure, worker
from bench.environment import code_digest, collect
from bench.job import Job
from bench.measure import clock, inference, outcome, training
from bench.measure.clock import HostClock
from bench.measure.compilation import break_even, cold_seconds
from bench.measure.subject import Subject
from bench.measure.training import UNBOUNDED_STEPS, has_settled, planned_steps
from bench.record import Measurement, Record
from bench.record_file import parse_record
from bench.spec import Cell, Protocol, Task, grid
from bench.unfinished import PENDING, is_unfinished
from cifar.config import RunConfig, parse_data
from cifar.data.dataset import Dataset
from cifar.data.sources import load_dataset
from cifar.process import worker_environment
from cifar.serialize import to_json
from cifar.trainer import Trainer

PROTOCOL = Protocol(
    warmup_steps=1, timed_steps=3, inference_batch_sizes=(1, 8), inference_iterations=4
)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_cell(npz: Path, **options: object) -> Cell:
    return grid(
        ["resnet20-w4"], ["fp32"], batch_sizes=(16,), data=parse_data(f"npz:{npz}"), **options
    )[0]


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
    subject = make_subject(make_cell(npz), replace(PROTOCOL, train_samples=2 * 16))
    found = collect_all(subject)
    assert len(found["train_throughput"][0].samples[0]) == 1
    assert subject.trainer.step == 2


def test_sizes_are_those_of_the_model(npz: Path) -> None:
    subject = make_subject(make_cell(npz))
    found = {each.name: each.value for each in outcome.measure_size(subject)}
    module = subject.trainer.module
    assert found["param_count"] == sum(p.numel() for p in module.parameters())
    payload = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert payload < found["checkpoint_bytes"] < payload + 20_000


def test_latency_is_seconds_of_a_batch_divided_by_its_size(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(make_cell(npz))
    monkeypatch.setattr(inference, "_time_batches", lambda *_: [0.4, 0.8])
    found = {
        each.labels["batch_size"]: each
        for each in inference.measure_inference(subject)
        if each.name == "inference_latency"
    }
    assert found[8].samples == ((0.05, 0.1),)
    assert found[1].samples == ((0.4, 0.8),)


def test_inference_stops_after_its_seconds_but_not_before_three_batches(npz: Path) -> None:
    protocol = replace(PROTOCOL, inference_seconds=1e-9, inference_iterations=50)
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


def test_the_warm_up_ends_at_its_cap_and_says_so(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "has_settled", lambda *_: False)
    subject = make_subject(make_cell(npz), replace(PROTOCOL, max_warmup_steps=4))
    (warm,) = collect_all(subject)["warmup_step"]
    assert (len(warm.samples[0]), warm.labels["settled"]) == (4, False)


def test_a_window_of_seconds_holds_as_many_steps_as_the_warm_up_s_pace_allows(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "seconds_of_a_step", lambda _: 0.5)
    subject = make_subject(make_cell(npz), replace(PROTOCOL, timed_seconds=3.0))
    assert len(collect_all(subject)["train_throughput"][0].samples[0]) == 6


def test_compile_seconds_by_hand() -> None:
    steps = Measurement(
        name="train_throughput",
        unit="samples/s",
        better="higher",
        labels={"samples_per_step": 8},
        samples=((1.0, 2.0, 3.0), (4.0, 4.0, 9.0)),
    )
    first = Measurement(name="first_step", unit="s", better="lower", samples=((30.0,), (3.0,)))
    cold = cold_seconds([steps, first])
    assert cold.samples == ((28.0,), (0.0,))
    warm = replace(first, name="warmup_step", samples=((2.0, 7.0, 9.0), (4.5, 1.0, 9.0)))
    assert cold_seconds([steps, first, warm]).samples == ((33.0,), (0.5,)), "two further steps"
    assert break_even(cold, [[1.0, 1.0], [2.0, 2.0]], [[2.5], [9.0]]).value == 4, "28 / (9 - 2)"
    slower = break_even(cold, [[2.0]], [[1.5]])
    assert slower.status == "absent" and "0.5 s longer" in slower.reason


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
    record = parse_record((tmp_path / "job" / "record.json").read_text())
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


def test_what_breaks_in_the_training_leaves_no_record(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Subject) -> Iterator[Measurement]:
        raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(worker, "CORE", (full,))
    with pytest.raises(torch.OutOfMemoryError):
        run_worker(tmp_path / "job", make_cell(npz))
    assert not (tmp_path / "job" / "record.json").exists()


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these precisions")
def test_worker_says_what_a_cpu_cannot_run(npz: Path, tmp_path: Path, precision: str) -> None:
    cell = make_cell(npz)
    cell = replace(cell, train=replace(cell.train, precision=precision))
    assert run_worker(tmp_path / "job", cell) == 0
    record = parse_record((tmp_path / "job" / "record.json").read_text())
    assert record.status == "unsupported"
    assert precision in record.reason


def test_worker_refuses_emulation_where_the_protocol_does(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "is_emulated", lambda *_: True)
    assert (
        run_worker(tmp_path / "job", make_cell(npz), replace(PROTOCOL, allow_emulated=False)) == 0
    )
    record = parse_record((tmp_path / "job" / "record.json").read_text())
    assert record.status == "unsupported"
    assert "emulate" in record.reason


def test_worker_fails_when_the_effective_configuration_differs(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nhwc(Trainer):
        def _build_model(self) -> None:
            super()._build_model()
            self.module.to(memory_format=torch.channels_last)

    monkeypatch.setattr(worker, "Trainer", Nhwc)
    assert run_worker(tmp_path / "job", make_cell(npz)) == 1
    record = parse_record((tmp_path / "job" / "record.json").read_text())
    assert record.status == "failed"
    assert "weight_channels_last: True where False was asked" in record.reason


def test_worker_records_what_disturbed_the_window(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Monitor, "report", lambda _: ([], ["a goat"]))
    assert run_worker(tmp_path / "job", make_cell(npz), replace(PROTOCOL, warmup_steps=0)) == 0
    record = parse_record((tmp_path / "job" / "record.json").read_text())
    assert (record.status, record.invalid) == ("ok", ("a goat",))


def test_worker_records_the_wrong_number_of_processes(npz: Path, tmp_path: Path) -> None:
    cell = replace(make_cell(npz), num_processes=2)
    assert run_worker(tmp_path / "job", cell) == 1
    record = parse_record((tmp_path / "job" / "record.json").read_text())
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
