"""FLOPs, peaks and utilisation, with rates and processes made up by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_dataset
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training import TINY, make_trainer, reset_accelerate, save_weights, taught_by, tiny_recipe

from bench import worker
from bench.job import Job
from bench.measure import FURTHER, training, utilization
from bench.measure import subject as subject_module
from bench.measure.subject import Subject
from bench.measure.utilization import (
    measure_flops,
    measure_utilization,
    model_flops_utilization,
)
from bench.protocol import METRICS, Protocol
from bench.record import Measurement
from bench.record_file import parse_record
from bench.rows import rows
from bench.spec import Task, grid
from cifar.config import ModelConfig, RunConfig
from cifar.cost import forward_flops, train_flops
from cifar.data.config import parse_data
from cifar.data.loader import Place
from cifar.data.sources import load_dataset
from cifar.serialize import to_json

CASES = {
    "MATRIX_SIZES": {"cpu": (16, 32)},
    "IMAGES": {"cpu": 2},
    "CHANNELS_AND_SIDES": ((4, 8), (8, 4)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that no device needs time for."""
    for name, value in CASES.items():
        monkeypatch.setattr(utilization, name, value)


def make_subject(taken: Sequence[Measurement] = (), **config: object) -> Subject:
    return Subject(make_trainer(**config), Protocol(), taken)


def taken(flops: float = 12.0, seconds: float = 2.0) -> tuple[Measurement, ...]:
    """A net of so many FLOPs per sample, and steps of 64 samples in so many seconds."""
    return (
        Measurement(name="train_flops", unit="FLOP/sample", better="lower", samples=((flops,),)),
        Measurement(
            name="train_throughput", unit="samples/s", better="higher",
            labels={"samples_per_step": 64}, samples=((seconds, seconds),),
        ),
    )  # fmt: skip


def test_flops_are_those_of_the_net_that_is_trained_on_its_images() -> None:
    data = make_dataset(size=12, classes=7, channels=1)
    subject = Subject(make_trainer(data=data), Protocol())
    config = subject.trainer.model_config
    assert (config.num_classes, config.in_channels) == (7, 1)
    found = {each.name: (each.value, each.unit) for each in measure_flops(subject)}
    assert found == {
        "forward_flops": (forward_flops(config, (12, 12)), "FLOP/sample"),
        "train_flops": (train_flops(config, (12, 12)), "FLOP/sample"),
    }


@pytest.mark.parametrize(("rho", "passes"), [(0.0, 1), (0.1, 2)])
def test_flops_of_training_are_also_the_teacher_s_forward_ones(
    tmp_path: Path, rho: float, passes: int
) -> None:
    other = make_trainer(model=ModelConfig(name="resnet20", width=6))
    distillation = taught_by(save_weights(tmp_path / "teacher", other))
    trainer = make_trainer(tiny_recipe(sam_rho=rho), distillation=distillation)
    found = {each.name: each.value for each in measure_flops(Subject(trainer, Protocol()))}
    student, teacher = trainer.model_config, other.model_config
    assert found["forward_flops"] == forward_flops(student, (16, 16))
    one_pass = train_flops(student, (16, 16)) + forward_flops(teacher, (16, 16))
    assert found["train_flops"] == passes * one_pass
    with FlopCounterMode(display=False) as counter:
        trainer.train_step()
    assert counter.get_total_flops() == 32 * found["train_flops"]


@pytest.mark.parametrize(("num_processes", "fraction"), [(1, 0.6), (2, 0.3), (4, 0.15)])
def test_utilization_by_hand(num_processes: int, fraction: float) -> None:
    """3 FLOPs a sample at 200 samples/s are 600 of the 1,000 FLOP/s of each device."""
    assert model_flops_utilization(3.0, 200.0, 1000.0, num_processes) == pytest.approx(fraction)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_work_of_a_case_is_what_it_says(precision: str, channels_last: bool) -> None:
    chosen = make_subject(precision=precision, channels_last=channels_last)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if chosen.trainer.emulated:
        dtype = torch.float32  # as its training's kernels
    for cases in (utilization._matrix_products, utilization._convolutions):
        for case in cases(chosen):
            with FlopCounterMode(display=False) as counter:
                output = case.work()
            assert counter.get_total_flops() == case.flops
            assert output.dtype == dtype
            if case.labels["kind"] == "convolution":
                nhwc = output.is_contiguous(memory_format=torch.channels_last)
                assert nhwc == channels_last


def test_the_best_case_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 * 16**3 = 8,192 FLOPs in 2 s beat 2 * 32**3 = 65,536 in 32 s; outliers do not count.

    Convolutions: 2 images * 2 FLOPs * (4 * 8 * 3)**2 = 36,864 FLOPs for both shapes.
    """
    monkeypatch.setattr(utilization, "PEAK_SECONDS", 1e9)
    seconds = iter([[1.0, 2.0, 64.0], [0.5, 32.0, 32.0], [8.0], [4.0]])
    monkeypatch.setattr(utilization, "_seconds", lambda *_: next(seconds))
    matmul, convolution, used = measure_utilization(make_subject(taken()))
    assert matmul.labels == {"kind": "matmul", "size": 16}
    assert matmul.samples == ((8192.0, 4096.0, 128.0),)
    assert (matmul.value, matmul.unit, matmul.better) == (4096.0, "FLOP/s", "higher")
    assert convolution.labels == {"kind": "convolution", "channels": 8, "side": 4, "images": 2}
    assert convolution.value == 9216.0
    assert used.value == pytest.approx(12 * 32 / 9216)
    assert used.labels == {"peak_flops": 9216.0, "peak_kind": "convolution"}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_slowest_process_s_peak_counts(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """A straggler at half the rate: every device is held to its 9,216 / 2 FLOP/s."""
    monkeypatch.setattr(utilization, "PEAK_SECONDS", 1e9)
    monkeypatch.setattr(utilization, "_seconds", lambda *_: [4.0])

    def gathered(mine: Sequence[float], _: object) -> tuple[tuple[float, ...], ...]:
        return (*(tuple(mine),) * (ranks - 1), tuple(value / 2 for value in mine))

    monkeypatch.setattr(subject_module, "gather", gathered)
    chosen = make_subject(taken())
    monkeypatch.setattr(chosen.trainer, "place", Place(0, ranks))
    matmul, convolution, used = measure_utilization(chosen)
    assert (matmul.value, convolution.value) == (16384 / 2, 9216 / 2)
    assert matmul.labels["size"] == 32
    assert used.value == pytest.approx(12 * 32 / (ranks * 16384 / 2))


@pytest.mark.parametrize(("elapsed", "fits"), [(0.9, True), (1.1, False)])
def test_a_slow_device_is_spared_the_larger_cases(
    monkeypatch: pytest.MonkeyPatch, elapsed: float, fits: bool
) -> None:
    """Five repetitions of 65,536 FLOPs at 8,192 a second take 40 s: 41 s are allowed."""
    moments = iter([0.0, elapsed, 0.0, 0.0])
    monkeypatch.setattr(utilization.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(utilization, "PEAK_SECONDS", 41.0)
    tried = iter([1.0, 2.0])
    monkeypatch.setattr(utilization, "_seconds", lambda *_: [next(tried)])
    chosen = make_subject()
    best, peak = utilization._best(chosen, utilization._matrix_products(chosen), lambda: None)
    assert (best, peak.labels["size"]) == ((32768.0, 32) if fits else (8192.0, 16))


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 3), (1e9, 100)])
def test_repetitions_are_bounded(
    monkeypatch: pytest.MonkeyPatch, seconds: float, kept: int
) -> None:
    monkeypatch.setattr(utilization, "CASE_SECONDS", seconds)
    calls: list[Tensor] = []
    chosen = make_subject()
    found = utilization._seconds(chosen, lambda: calls.append(torch.ones(9).exp()), lambda: None)
    assert (len(found), len(calls)) == (kept, kept + 2)
    assert min(found) > 0


class Steady:
    """A counter of 480 J between its last two readings, the first and the last of the window."""

    source, update_seconds, settles, idle_seconds = "steady", 0.0, False, 0.0

    def __init__(self) -> None:
        self._counts = iter([0, 0, 0, 0, 480])

    def read(self) -> tuple[int, ...]:
        return (next(self._counts),)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        return after[0] - before[0]


def test_a_record_holds_what_its_cell_costs(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset_accelerate()
    monkeypatch.setattr(training, "find_counter", lambda *_, **__: Steady())
    (cell,) = grid([TINY.label], ["fp32"], batch_sizes=(16,), data=parse_data(f"npz:{npz}"))
    protocol = Protocol(
        warmup_steps=1,
        timed_steps=3,
        min_timed_seconds=0.0,
        inference_batch_sizes=(),
        metrics=("utilization",),
    )
    (tmp_path / "cell.json").write_text(to_json(Job(task=Task(cell=cell, protocol=protocol))))
    assert worker.main(tmp_path) == 0
    record = parse_record((tmp_path / "record.json").read_text())
    (row,) = rows([record])
    used = record.find("model_flops_utilization")
    assert used is not None
    peak = max(row["peak_flops_matmul"], row["peak_flops_convolution"])
    assert used.labels["peak_flops"] == peak
    assert row["model_flops_utilization"] == pytest.approx(
        row["train_flops"] * row["train_throughput"] / peak
    )
    assert row["train_flops"] == train_flops(TINY, (16, 16))
    assert row["train_energy"] == 480 / (3 * 16)


@pytest.mark.parametrize(("emulated", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_peak_is_that_of_the_kernels_that_train(emulated: bool, dtype: torch.dtype) -> None:
    subject = make_subject(precision="bf16")
    subject.trainer.emulated = emulated
    assert utilization._random(subject, 2, 2).dtype == dtype


def test_more_than_the_peak_is_no_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilization, "PEAK_SECONDS", 1e9)
    monkeypatch.setattr(utilization, "_seconds", lambda *_: [1e12])
    *_, used = measure_utilization(make_subject(taken()))
    assert used.status == "failed" and "of the measured peak: it is no peak" in used.reason


def test_sam_costs_twice() -> None:
    plain, sam = (
        {each.name: each.value for each in utilization.measure_flops(make_subject(recipe=recipe))}
        for recipe in (tiny_recipe(), tiny_recipe(sam_rho=0.1))
    )
    assert sam["train_flops"] == 2 * plain["train_flops"]
    assert sam["forward_flops"] == plain["forward_flops"]


def test_the_protocol_knows_the_metric() -> None:
    assert "utilization" in METRICS
    assert FURTHER["utilization"] is measure_utilization


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_gpu_reaches_its_peak_on_saturating_shapes(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if torch.cuda.get_device_capability() < (8, 0) and precision in ("tf32", "bf16"):
        pytest.skip(f"this GPU has no {precision}")
    monkeypatch.undo()
    chosen = make_subject(taken(), run=RunConfig(), precision=precision, channels_last=True)
    saturated = list(measure_utilization(chosen))
    assert 0 < saturated[2].value < 1
    monkeypatch.setattr(utilization, "MATRIX_SIZES", {"cuda": (256,)})
    monkeypatch.setattr(utilization, "IMAGES", {"cuda": 1})
    for large, small in zip(saturated[:2], measure_utilization(chosen), strict=False):
        assert large.value > 2 * small.value


def test_a_cell_is_measured_with_its_teacher_or_fails_for_want_of_it(
    npz: Path, tmp_path: Path
) -> None:
    data = parse_data(f"npz:{npz}")
    teacher = save_weights(tmp_path / "teacher", make_trainer(data=load_dataset(data)))
    (cell,) = grid([TINY.label], ["fp32"], batch_sizes=(16,), data=data)
    cell = replace(cell, train=replace(cell.train, distillation=taught_by(teacher)))
    protocol = Protocol(
        warmup_steps=0, timed_steps=1, min_timed_seconds=0.0, inference_batch_sizes=()
    )
    (tmp_path / "cell.json").write_text(to_json(Job(task=Task(cell=cell, protocol=protocol))))
    reset_accelerate()
    assert worker.main(tmp_path) == 0
    record = parse_record((tmp_path / "record.json").read_text())
    assert record.cell == cell and record.status == "ok"
    assert record.value("train_flops") == train_flops(TINY, (16, 16)) + forward_flops(
        TINY, (16, 16)
    )
    save_weights(teacher, make_trainer(data=load_dataset(data), seed=1))
    reset_accelerate()
    assert worker.main(tmp_path) != 0
    record = parse_record((tmp_path / "record.json").read_text())
    assert record.status == "failed" and "teacher: " in record.reason
    assert "other weights than those that were learnt from" in record.reason
