"""A run's own line of the suite's table, and the short look at its latency."""

import csv
import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.columns import result_columns
from cifar import latency
from cifar.comparison import Comparison

RUN = Comparison(
    model="resnet20",
    precision="bf16",
    batch_size=64,
    num_processes=1,
    top1=0.86214,
    checkpoint_bytes=1_090_519,
    param_count=272_474,
    inference_latency={1: 0.00537, 64: 0.001244},
    train_throughput=226.4,
    training_seconds=2213.6,
    peak_memory_bytes=961 * 2**20,
)


def test_a_line_by_hand() -> None:
    assert RUN.to_markdown() == (
        "### bf16, 1 process\n\n"
        "| Model | Batch | Top-1 (%) | Size (MiB) | Params (M) | Inference b1 (ms/sample) "
        "| Inference b64 (ms/sample) | Train (images/s) | Training (s) | Peak memory (MiB) |\n"
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| resnet20 | 64 | 86.21 | 1.04 | 0.27 | 5.37 | 1.24 | 226 | 2,214 | 961 |\n"
    )
    assert replace(RUN, num_processes=2).to_markdown().startswith("### bf16, 2 processes\n")


def test_the_csv_has_the_suite_s_names_and_base_units() -> None:
    (row,) = csv.DictReader(io.StringIO(RUN.to_csv()))
    assert row == {
        "model": "resnet20", "precision": "bf16", "batch_size": "64", "num_processes": "1",
        "top1": "0.86214", "checkpoint_bytes": "1090519", "param_count": "272474",
        "inference_latency_b1": "0.00537", "inference_latency_b64": "0.001244",
        "train_throughput": "226.4", "training_seconds": "2213.6",
        "peak_memory_bytes": str(961 * 2**20),
    }  # fmt: skip


def test_the_suite_s_table_of_such_a_row_says_the_same() -> None:
    identity = dict.fromkeys(
        ("layout", "compile", "launcher", "accumulation_steps", "data", "recipe"), "x"
    )
    (row,) = csv.DictReader(io.StringIO(RUN.to_csv()))
    numbers = {name: float(value) for name, value in row.items() if name[0] not in "mpbn"}
    shown = {
        "model": "resnet20", "batch_size": 64, "num_processes": 1, "torch": "x", "code": "x",
        "status": "ok", "runs": 1, "trained_samples": 1, "top1_n": 1, "vs_fp32": None,
        "param_count": 272_474.0, "peak_memory_bytes": 961.0 * 2**20, **identity, **numbers,
    }  # fmt: skip
    cells = {column.heading: column.show(shown) for column in result_columns([shown])}
    del cells["vs fp32"]
    headings, values = (
        [each.strip() for each in RUN.to_markdown().splitlines()[line].strip("|").split("|")]
        for line in (2, 4)
    )
    assert cells | {"Top-1 (%)": "86.21"} == dict(zip(headings, values, strict=True))


@pytest.mark.parametrize(
    ("batches", "timed", "median"),
    [([0.5] * 60, 5, 0.5), ([0.01] * 60, 50, 0.01), ([9.0] * 60, 3, 9.0), ([1, 7, 1.5], 3, 1.5)],
)
def test_latency_is_the_median_of_batches_after_a_warm_up(
    monkeypatch: pytest.MonkeyPatch, batches: list[float], timed: int, median: float
) -> None:
    """Until 2 s are over, but three batches at least and 50 at most."""
    now, calls = [0.0], [0]
    seconds = [100.0] * latency.WARM_UP + batches

    def run(images: Tensor) -> Tensor:
        now[0] += seconds[calls[0]]
        calls[0] += 1
        return images

    monkeypatch.setattr("cifar.latency.time.perf_counter", lambda: now[0])
    assert latency.latency(run, torch.zeros(4, 3, 2, 2)) == pytest.approx(median / 4)
    assert calls[0] == latency.WARM_UP + timed
