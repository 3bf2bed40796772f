"""Tables: what shares a row, what is compared, and how it looks (golden files).

After an intended change write the golden files anew: `UPDATE_GOLDEN=1 pytest tests/test_table.py`.
"""

import csv
import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.columns import DASH
from bench.protocol import Protocol
from bench.record import DataFacts, Environment, Measurement, Record
from bench.rows import rows
from bench.selection import filter_rows, parse_filter, sort_rows
from bench.spec import Cell, grid
from bench.table import render_csv, render_markdown, render_terminal
from bench.unfinished import explained, unfinished
from cifar.config import Recipe
from cifar.data.config import DataConfig
from cifar.errors import UserError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

ENVIRONMENT = Environment(
    cpu_model="AMD EPYC 7B13",
    cpu_count=2,
    memory_bytes=8 * 2**30,
    os="Linux 6.8",
    python="3.11.7",
    torch="2.15.0",
    accelerate="1.15.0",
    numpy="2.0",
    code_digest="0123456789abcdef",
    git_sha="a" * 40,
    git_dirty=False,
    worker_env={"OMP_WAIT_POLICY": "PASSIVE"},
    threads=2,
    started="2026-01-01T00:00:00+00:00",
)
DATA = DataFacts(
    name="shapes",
    fingerprint="fedcba9876543210",
    train_samples=10_000,
    test_samples=2_000,
    classes=10,
)
TRAINED = Protocol(train_samples=12_800)


def scalar(name, unit, value, better="lower"):
    return Measurement(name=name, unit=unit, better=better, samples=((value,),))


def latency(size, *samples):
    return Measurement(
        name="inference_latency", unit="s/sample", better="lower", samples=(samples,),
        labels={"batch_size": size},
    )  # fmt: skip


def busy(size, seconds, batches=10, **labels):
    """The throughput of a device on which so many batches in a row took so many seconds."""
    return Measurement(
        name="inference_throughput", unit="samples/s", better="higher", samples=((seconds,),),
        labels={"batch_size": size, "samples_per_step": size * batches, **labels},
    )  # fmt: skip


def top1_after(trained_samples, value):
    found = scalar("top1", "fraction", value, "higher")
    return replace(found, labels={"trained_samples": trained_samples})


def measurements(*, rate=200.0, top1=None):
    trained = [] if top1 is None else [top1_after(12_800, top1)]
    return (
        Measurement(
            name="train_throughput", unit="samples/s", better="higher",
            samples=((128 / rate,) * 3,), labels={"samples_per_step": 128},
        ),
        latency(1, 0.004, 0.005, 0.006),
        busy(1, 0.04),
        latency(256, 0.0015, 0.0025),
        busy(256, 5.0),
        scalar("param_count", "1", 269_722),
        scalar("checkpoint_bytes", "bytes", 1_100_000),
        scalar("peak_memory_bytes", "bytes", 300 * 2**20),
        *trained,
    )  # fmt: skip


def make_cell(model="resnet20", precision="fp32", **options):
    options = {"recipe": Recipe(name="default"), **options}
    return grid([model], [precision], **options)[0]


def make_record(cell=None, *, found=None, **changes):
    record = Record(
        run_id="run", cell=cell or make_cell(), protocol=TRAINED, status="ok", started="",
        duration_s=1.0, environment=ENVIRONMENT, data=DATA,
        measurements=measurements(top1=0.9) if found is None else found,
    )  # fmt: skip
    return replace(record, **changes)


def broken(cell, status, reason, **changes):
    return make_record(
        cell, status=status, reason=reason, found=(), environment=None, data=None, **changes
    )


def quick_records():
    """What `bench run quick --seeds 3` may leave on a machine that is short of memory."""
    records = []
    for precision, factor in (("fp32", 1.0), ("bf16", 1.5)):
        for seed, top1 in enumerate((0.90, 0.92, 0.91)):
            cell = make_cell(precision=precision, seeds=seed + 1)
            seeded = replace(cell, train=replace(cell.train, seed=seed))
            found = measurements(rate=factor * (200.0 + seed), top1=top1 - factor / 100)
            records.append(make_record(seeded, found=found))
    speed = Protocol()
    absent = Measurement(
        name="top1", unit="fraction", better="higher", status="absent", reason="not trained"
    )
    found = (*measurements(rate=38.0), absent)
    records.append(make_record(make_cell("resnet18"), protocol=speed, found=found))
    wide = make_cell("resnet18", "bf16")
    records.append(broken(wide, "oom", "CUDA | out of memory\ntried 2 GiB", protocol=speed))
    return records


def only(table):
    (row,) = table
    return row


def check_golden(name, text):
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_inference_throughput_is_that_of_a_busy_device_and_sorts_the_fastest_first():
    slow = make_record(
        make_cell("resnet110"),
        found=(latency(64, 0.02), busy(64, 6.4), busy(64, 3.2, backend="exported")),
    )
    fast = make_record(found=(latency(64, 0.03), busy(64, 2.56)))
    table = rows([slow, fast])
    assert table[0]["inference_throughput_b64"] == 100.0, "640 images in 6.4 s"
    assert table[0]["inference_throughput_b64_exported"] == 200.0
    ordered = sort_rows(table, "inference_throughput_b64")
    assert [row["model"] for row in ordered] == ["resnet20", "resnet110"]


def test_golden_markdown():
    check_golden("quick.md", render_markdown(rows(quick_records())))


def test_golden_csv():
    check_golden("quick.csv", render_csv(rows(quick_records())))


def test_golden_terminal():
    check_golden("quick.txt", render_terminal(rows(quick_records()), width=110))


def test_seeds_and_repeats_share_a_row():
    tops, rates = (0.90, 0.92, 0.94), (100.0, 400.0, 200.0)
    records = []
    for index, (top1, rate) in enumerate(zip(tops, rates, strict=True)):
        cell = make_cell()
        cell = replace(cell, train=replace(cell.train, seed=min(index, 1)))
        records.append(make_record(cell, repeat=index, found=measurements(rate=rate, top1=top1)))
    row = only(rows(records))
    assert (row["runs"], row["top1_n"]) == (3, 2), "the second seed ran twice"
    assert row["top1"] == pytest.approx((0.90 + 0.93) / 2)
    assert row["top1_std"] == pytest.approx(0.03 / 2**0.5)
    assert row["train_throughput"] == pytest.approx(200.0)
    assert "91.50 ± 2.12 (n=2)" in render_markdown([row])


def test_a_row_tells_its_straggler():
    ranks = ((0.1, 0.1), (0.4, 0.4), (0.1, 0.1), (0.1, 0.1))
    rate = Measurement(
        name="train_throughput", unit="samples/s", better="higher",
        samples=ranks, labels={"samples_per_step": 512},
    )  # fmt: skip
    row = only(rows([make_record(found=(rate,))]))
    assert row["train_throughput"] == pytest.approx(1280.0), "two steps of 0.4 s"
    assert row["train_throughput_straggler_ratio"] == pytest.approx(4.0)
    assert "train_throughput_straggler_ratio" not in only(rows([make_record()]))


def test_percentiles_pool_the_runs():
    records = [
        make_record(repeat=repeat, found=(latency(1, *samples),))
        for repeat, samples in enumerate([(0.1, 0.2, 0.3), (0.4, 0.5)])
    ]
    row = only(rows(records))
    assert row["inference_latency_b1"] == pytest.approx((0.2 + 0.45) / 2)
    assert row["inference_latency_b1_p50"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("count", "p95", "p99"), [(19, None, None), (20, 19.05, None), (100, 95.05, 99.01)]
)
def test_percentiles_are_left_out_where_too_few_samples_tell_them(count, p95, p99):
    samples = [float(value) for value in range(1, count + 1)]
    records = [
        make_record(found=(latency(1, *samples[:7]),)),
        make_record(found=(latency(1, *samples[7:]),), repeat=1),
    ]
    row = only(rows(records))
    assert row["inference_latency_b1_p50"] == pytest.approx((1 + count) / 2)
    # Ranks 0.95 (n - 1) and 0.99 (n - 1), counted from 0, of the values 1 to n.
    assert row["inference_latency_b1_p95"] == (p95 and pytest.approx(p95))
    assert row["inference_latency_b1_p99"] == (p99 and pytest.approx(p99))
    (line,) = csv.DictReader(io.StringIO(render_csv([row])))
    assert (line["inference_latency_b1_p99"] == "") == (p99 is None)


def repeated(*rates, precision="fp32"):
    cell = make_cell(precision=precision)
    return [
        make_record(cell, repeat=repeat, found=measurements(rate=rate))
        for repeat, rate in enumerate(rates)
    ]


def test_six_runs_bound_their_median_and_five_do_not():
    rates = (400.0, 410.0, 412.0, 413.0, 418.0, 430.0)
    row = only(rows(repeated(*rates)))
    # 0.357143 of the way from the extremes to their neighbours, see test_stats.
    assert row["train_throughput"] == pytest.approx(412.5)
    assert row["train_throughput_low"] == pytest.approx(403.571, abs=0.001)
    assert row["train_throughput_high"] == pytest.approx(425.714, abs=0.001)
    assert row["train_throughput_n"] == 6
    # Every run has the same sizes and latencies: nothing varies.
    assert [key for key in row if key.endswith("_low")] == ["train_throughput_low"]
    few = only(rows(repeated(*rates[:5])))
    assert few["runs"] == 5
    assert not [key for key in few if key.endswith(("_low", "_high"))]


def test_the_unit_of_an_interval_is_the_run_and_not_its_steps():
    records = [
        make_record(repeat=repeat, found=(latency(1, 0.001, 0.004 + repeat / 1000, 0.02),))
        for repeat in range(6)
    ]
    row = only(rows(records))
    assert row["inference_latency_b1_n"] == 6
    assert row["inference_latency_b1_low"] == pytest.approx(0.004357, abs=1e-6)
    assert row["inference_latency_b1_high"] == pytest.approx(0.008643, abs=1e-6)
    assert row["inference_latency_b1_p50"] == pytest.approx(0.0065), "pooled: 9th and 10th of 18"


def test_intervals_have_the_digits_of_their_number_and_are_explained():
    records = repeated(998.0, 999.0, 999.0, 1000.0, 1001.0, 1002.0)
    records += [
        replace(
            record, measurements=(*record.measurements[:1], latency(1, 0.00995 + 1e-4 * number))
        )
        for number, record in enumerate(repeated(9, 9, 9, 10, 10, 10.0, precision="bf16"))
    ]
    text = render_terminal(rows(records), width=200)
    assert "1,000 [998, 1,002]" in text
    assert "9.50 [9.00, 10.00]" in text
    assert "10.2 [10.0, 10.4]" in text
    assert "[ ]: 95 % interval of the median over processes" in text
    assert "[ ]" not in render_terminal(rows(repeated(1.0, 2.0)), width=200)


def test_a_ratio_of_repeated_cells_has_an_interval():
    slow, fast = (100.0, 101.0, 102.0, 103.0, 104.0, 105.0), (150.0, 151.0, 153.0, 154.0, 156.0)
    table = rows([*repeated(*slow), *repeated(*fast, 157.0, precision="bf16")])
    assert [row["vs_fp32"] for row in table] == [1.0, pytest.approx(153.5 / 102.5)]
    assert "vs_fp32_low" not in table[0]
    low, high = table[1]["vs_fp32_low"], table[1]["vs_fp32_high"]
    assert 150 / 105 <= low < 153.5 / 102.5 < high <= 157 / 100
    assert f"1.50x [{low:.2f}, {high:.2f}]" in render_terminal(table, width=200)
    few = rows([*repeated(*slow), *repeated(*fast, precision="bf16")])
    assert "vs_fp32_low" not in few[1]


@pytest.mark.parametrize(
    "change",
    [
        {"cell": make_cell(channels_last=(True,))},
        {"cell": make_cell(compile=(True,))},
        {"cell": make_cell(batch_sizes=(64,))},
        {"cell": make_cell(recipe=Recipe(lr=0.3))},
        {"cell": replace(make_cell(), num_processes=2)},
        {"cell": replace(make_cell(), launcher="fsdp")},
        {"protocol": Protocol(train_samples=25_600)},
        {"environment": replace(ENVIRONMENT, cpu_count=4)},
        {"environment": replace(ENVIRONMENT, torch="2.16.0")},
        {"environment": replace(ENVIRONMENT, code_digest="f" * 16)},
        {"environment": replace(ENVIRONMENT, threads=1)},
        {"data": replace(DATA, fingerprint="0" * 16)},
    ],
)
def test_what_differs_has_its_own_row_and_is_not_compared(change):
    first, second = make_record(), make_record(make_cell(precision="bf16"))
    assert len(rows([first, replace(first, run_id="other", **change)])) == 2
    cell = change.get("cell")
    other = {**change, "cell": replace(
        cell, train=replace(cell.train, precision="bf16")
    )} if isinstance(cell, Cell) else change  # fmt: skip
    table = rows([first, replace(second, **other)])
    assert [row["vs_fp32"] for row in table] == [1.0, None]


def test_tables_tell_the_samples_that_were_trained_and_not_the_budget():
    protocol = Protocol(train_samples=12_850)
    first = make_record(protocol=protocol)
    broke = broken(make_cell("resnet18"), "oom", "no room", protocol=protocol)
    text = render_markdown(rows([first, broke]))
    assert "top-1 after 12,800 training samples" in text, "100 batches of 128"
    assert "12,850" not in text and "Trained" not in text
    found = (*measurements(), top1_after(6_400, 0.5))
    half = make_record(protocol=Protocol(train_samples=6_400), found=found)
    table = rows([broke, first, half])
    assert [row["trained_samples"] for row in table] == [None, 12_800, 6_400]
    text = render_markdown(table)
    assert "training samples" not in text
    for model, trained in (("resnet18", DASH), ("resnet20", "12,800"), ("resnet20", "6,400")):
        assert f"| {model} | 128 | {trained} |" in text


def test_rows_that_stand_apart_tell_why():
    """Of a software that no caption names, of the worker's settings, of a protocol."""

    def further(*others):
        """The columns that tell a record from others, and what they show."""
        text = render_markdown(
            rows([make_record(), *(replace(each, run_id="b") for each in others)])
        )
        heading, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
        cells = [line.strip("| ").split(" | ") for line in (heading, *lines)]
        columns = {name: list(shown) for name, *shown in zip(*cells)}
        return {
            name: columns[name] for name in ("Software", "Worker", "Protocol") if name in columns
        }

    newer = replace(ENVIRONMENT, accelerate="1.16.0", tools={"deepspeed": "0.19"})
    assert further(make_record(environment=newer)) == {
        "Software": ["accelerate 1.15.0", "accelerate 1.16.0, deepspeed 0.19"]
    }
    other = replace(ENVIRONMENT, worker_env={"OMP_WAIT_POLICY": "ACTIVE"})
    assert further(make_record(environment=other)) == {
        "Worker": [r"OMP_WAIT_POLICY=PASSIVE", r"OMP_WAIT_POLICY=ACTIVE"]
    }
    longer = replace(TRAINED, timed_steps=TRAINED.timed_steps + 1)
    assert further(make_record(protocol=longer)) == {
        "Protocol": [TRAINED.digest[:8], longer.digest[:8]]
    }
    assert further(make_record(make_cell("resnet32"), protocol=longer)) == {}
    assert further(make_record(make_cell("resnet32"), environment=other)) == {}


def on_cifar(*words, **options):
    cell = make_cell(*words, **options)
    return replace(cell, train=replace(cell.train, data=DataConfig(source="cifar10")))


def test_published_figures_are_of_the_recipe_s_network_and_images():
    recipe = Recipe(name="resnet18-jitter")
    same = make_record(on_cifar("resnet18", recipe=recipe))
    others = (
        make_record(on_cifar("resnet20", recipe=recipe)),
        make_record(make_cell("resnet18", recipe=recipe)),
        make_record(on_cifar("resnet18", recipe=recipe), protocol=Protocol(validation_alone=True)),
    )
    assert rows([same])[0]["published_top1"] == 0.9402
    for record in others:
        assert not [name for name in rows([record])[0] if name.startswith("published")]


def test_published_figures_stand_beside_ours_where_a_recipe_has_some():
    def measured(recipe, seconds):
        found = (*measurements(top1=0.95), scalar("training_seconds", "s", seconds))
        return make_record(on_cifar("resnet18", recipe=recipe), found=found)

    jitter, other = Recipe(name="resnet18-jitter"), Recipe(name="other", lr=0.2)
    text = render_markdown(rows([measured(jitter, 90.4), measured(other, 1234.5)]))
    heading, _, jitter, other = [line for line in text.splitlines() if line.startswith("|")]
    cells = dict(zip(heading.split(" | "), zip(jitter.split(" | "), other.split(" | "))))
    assert cells["Published top-1 (%)"] == ("94.02", DASH)
    assert cells["Published (MiB)"] == ("42.70", DASH)
    assert cells["Published (ms/sample)"] == ("27.7", DASH)
    assert cells["Training (s)"] == ("90.4", "1,234"), "half of an even digit is rounded down"
    bf16 = make_record(on_cifar("resnet18", "bf16", recipe=Recipe(name="resnet18-muon")))
    both = render_markdown(rows([bf16, measured(Recipe(name="resnet18-jitter"), 1.0)]))
    assert both.count("\n### ") == 1 and "\n### all precisions\n" in both
    assert re.findall(r"^\| resnet18 \|.*\| (fp32|bf16) \|", both, re.MULTILINE) == ["bf16", "fp32"]
    without = render_markdown(rows([make_record()]))
    assert "Published" not in without and "Training (s)" not in without


def test_vs_fp32_is_the_ratio_to_the_otherwise_equal_row():
    records = [
        make_record(make_cell(precision="bf16"), found=measurements(rate=300.0)),
        make_record(make_cell(), found=measurements(rate=200.0)),
        make_record(make_cell("resnet32"), found=measurements(rate=1000.0)),
    ]
    assert [row["vs_fp32"] for row in rows(records)] == [pytest.approx(1.5), 1.0, 1.0]


def test_a_task_that_was_tried_again_counts_once():
    cell = make_cell()
    failed = broken(cell, "failed", "crash")
    assert only(rows([failed, make_record(cell)]))["status"] == "ok"
    other_run = make_record(cell, run_id="other")
    assert only(rows([make_record(cell), make_record(cell), other_run]))["runs"] == 2


@pytest.mark.parametrize("status", ["failed", "unsupported", "oom", "timeout"])
def test_what_did_not_finish_is_a_row_with_its_status(status):
    records = [make_record(), broken(make_cell(precision="bf16"), status, "why " * 40)]
    table = rows(records)
    assert [row["status"] for row in table] == ["ok", status]
    markdown = render_markdown(table)
    assert f"| {status} |" in markdown
    assert markdown.count(f"{status}: why why") == 1
    assert f"{status}: " + "why " * 39 + "why\n" in markdown
    assert f"{status}: why" in render_terminal(table, width=200)
    assert "why " * 39 in render_csv(table)


def test_some_failed_runs_of_a_cell_are_told_beside_its_numbers():
    records = [make_record(), broken(make_cell(), "timeout", "after 60 s", repeat=1)]
    row = only(rows(records))
    assert (row["status"], row["runs"]) == ("timeout", 1)
    assert "timeout: 1 of 2 runs: after 60 s" in render_markdown([row])
    assert "90.00 (n=1)" in render_markdown([row])


def test_a_run_where_everything_died_is_still_shown():
    text = render_markdown(rows([broken(make_cell(), "failed", "no such launcher")]))
    assert text.startswith("## unknown\n")
    assert "failed: no such launcher" in text


def test_a_failed_measurement_of_a_finished_cell_says_so():
    failed = Measurement(
        name="peak_memory_bytes", unit="bytes", better="lower", status="failed", reason="no /proc"
    )
    text = render_markdown(rows([make_record(found=(failed,))]))
    assert "| failed |" in text
    assert "| partly failed |" in text
    assert "- resnet20 partly failed: peak_memory_bytes: no /proc\n" in text


def compiled(seconds=None, reason="wrong outputs"):
    """The compiled backend's latency at batch 1, or that it failed for a reason."""
    return Measurement(
        name="inference_latency", unit="s/sample", better="lower",
        labels={"batch_size": 1, "backend": "compiled"},
        samples=((seconds, seconds),) if seconds else (),
        status="ok" if seconds else "failed", reason="" if seconds else reason,
    )  # fmt: skip


def test_a_backend_that_is_wrong_in_some_runs_is_told_beside_the_others_numbers():
    found = [compiled(reason="a crash"), *map(compiled, (1, 2, 3, 4)), compiled(), compiled()]
    difference = scalar("output_max_difference", "1", 0.1)
    wrong = replace(difference, samples=(), status="failed", reason="wrong outputs")
    labelled = [
        replace(wrong if each.status == "failed" else difference, labels={"backend": "compiled"})
        for each in found
    ]
    records = [
        make_record(repeat=repeat, found=(*measurements(), *both))
        for repeat, both in enumerate(zip(found, labelled, strict=True))
    ]
    row = only(rows(records))
    assert (row["status"], row["runs"]) == ("ok", 7)
    key = "inference_latency_b1_compiled"
    assert (row[key], row[f"{key}_p50"]) == (2.5, 2.5), "of those that were right"
    assert (row[f"{key}_status"], row[f"{key}_failed"]) == ("failed", 3)
    assert "inference_latency_b1_failed" not in row
    assert row["failed_measurements"] == (
        f"{key}, output_max_difference_compiled: 3 of 7: wrong outputs"
    )
    text = render_markdown([row])
    assert "| partly failed |" in text
    assert f"- resnet20 partly failed: {row['failed_measurements']}" in text


def test_what_is_absent_has_not_failed():
    absent = Measurement(
        name="train_energy", unit="J/sample", better="lower", status="absent", reason="no counter"
    )
    row = only(rows([make_record(found=(*measurements(), absent))]))
    assert (row["train_energy_status"], row["failed_measurements"]) == ("absent", "")
    assert "train_energy_failed" not in row
    assert "Status" not in render_markdown([row])


def test_hardware_has_its_own_section():
    other = replace(ENVIRONMENT, gpu_names=("NVIDIA H200",), driver="550")
    text = render_markdown(rows([make_record(), make_record(run_id="gpu", environment=other)]))
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## amd-epyc-7b13-2c",
        "## nvidia-h200-x1",
    ]


def test_constant_columns_move_to_the_caption():
    same = render_markdown(rows([make_record(), make_record(make_cell("resnet32"))]))
    assert "| Layout |" not in same
    assert "- Cells: contiguous, eager, 1 process, ddp" in same
    differ = render_markdown(rows([make_record(), make_record(make_cell(channels_last=(True,)))]))
    assert "| Layout |" in differ
    assert "| channels-last |" in differ


def test_a_new_metric_is_a_column_of_the_csv():
    found = (*measurements(), scalar("joules", "J/sample", 2.5))
    (line,) = csv.DictReader(io.StringIO(render_csv(rows([make_record(found=found)]))))
    assert line["joules"] == "2.5"
    assert line["checkpoint_bytes"] == "1100000.0"


def test_a_measurement_cannot_take_the_place_of_what_was_run():
    odd = [scalar(name, "1", 253.8) for name in ("status", "model", "precision", "runs")]
    (row,) = rows([make_record(found=tuple(odd))])
    assert (row["status"], row["model"], row["precision"], row["runs"]) == (
        *("ok", "resnet20", "fp32"),
        1,
    )


def test_markup_of_markdown_and_of_the_terminal_is_escaped():
    table = rows([broken(make_cell(), "failed", "a|b [red]c[/red] <d>")])
    assert r"failed: a\|b \[red]c\[/red] \<d>" in render_markdown(table)
    assert "a|b [red]c[/red] <d>" in render_terminal(table, width=150)


def test_terminal_keeps_every_word_when_it_is_narrow():
    text = render_terminal(rows(quick_records()), width=60)
    for word in ("resnet20", "1.50x", "12,800", "trained", "(n=3)"):
        assert word in text


def test_no_rows_no_table():
    assert render_markdown([]) == ""
    assert render_terminal([]).strip() == ""


def models(table):
    return [row["model"] for row in table]


def test_sort_puts_the_best_first_and_the_missing_last():
    slow = make_record(make_cell("resnet110"), found=measurements(rate=50.0))
    fast = make_record(make_cell("resnet20"), found=measurements(rate=500.0))
    dead = broken(make_cell("resnet32"), "oom", "memory")
    table = rows([dead, slow, fast])
    assert models(sort_rows(table, "train")) == ["resnet20", "resnet110", "resnet32"]
    assert models(sort_rows(table, "train_throughput")) == ["resnet20", "resnet110", "resnet32"]
    assert models(sort_rows(table, "model")) == ["resnet20", "resnet32", "resnet110"]
    assert models(sort_rows(table, "Inference-B1"))[-1] == "resnet32"


def test_a_column_that_holds_words_and_truths_is_sorted_too():
    table = [{"model": "a", "x": "unobserved"}, {"model": "b", "x": True}, {"model": "c", "x": 1}]
    assert models(sort_rows(table, "x")) == ["b", "c", "a"]


@pytest.mark.parametrize("name", ["top5", "train_throughput_low", "vs_fp32"])
def test_sort_knows_what_is_better_when_large(name):
    table = [{"model": str(value), name: value} for value in (0.2, 0.9, None, 0.5)]
    assert models(sort_rows(table, name)) == ["0.9", "0.5", "0.2", "None"]


@pytest.mark.parametrize("name", ["test_loss", "top1_std", "input_throughput_straggler_ratio"])
def test_sort_knows_what_is_better_when_small(name):
    table = [{"model": str(value), name: value} for value in (0.2, 0.9, None, 0.5)]
    assert models(sort_rows(table, name)) == ["0.2", "0.5", "0.9", "None"]


def test_sort_agrees_with_what_every_metric_says_is_better():
    said = re.compile(r'"(\w+)",\s*"[^"]+",\s*"(higher|lower)"')
    sources = [path.read_text() for path in (ROOT / "bench" / "measure").glob("*.py")]
    better = dict(match for source in sources for match in said.findall(source))
    assert {"train_throughput", "top1", "top5", "test_loss", "peak_flops"} <= better.keys()
    for name, which in better.items():
        table = [{"model": str(value), name: value} for value in (1, 2)]
        assert models(sort_rows(table, name))[0] == {"higher": "2", "lower": "1"}[which], name


def test_filter_wants_all_columns_and_any_of_their_values():
    cells = [make_cell(m, p) for m in ("resnet20", "resnet32") for p in ("fp32", "bf16", "tf32")]
    table = rows([make_record(cell) for cell in cells])
    found = filter_rows(table, parse_filter("model=resnet20, precision=bf16,precision=tf32"))
    assert [(row["model"], row["precision"]) for row in found] == [
        ("resnet20", "bf16"),
        ("resnet20", "tf32"),
    ]
    assert filter_rows(table, parse_filter("batch=128")) == table
    with pytest.raises(UserError, match=r"filter: 'batch=64\|32': no row is left; there are 128"):
        filter_rows(table, parse_filter("batch=64,batch=32"))


def test_unknown_columns_are_named_with_those_that_exist():
    table = rows([make_record()])
    for act in (
        lambda: sort_rows(table, "speed"),
        lambda: filter_rows(table, parse_filter("speed=1")),
    ):
        with pytest.raises(
            UserError, match=r"^column: 'speed': choose a column of the CSV, such as .*train"
        ):
            act()


@pytest.mark.parametrize("text", ["model", "=resnet18", "", "model=a,,"])
def test_a_filter_that_is_not_name_and_value_is_refused(text):
    with pytest.raises(UserError, match=r"^filter: .*: write COLUMN=VALUE"):
        parse_filter(text)


# --- Disturbed runs ---


def disturbed_records():
    """Three runs of a cell, of which two were disturbed, and one of another that was not."""
    found = [measurements(rate=rate) for rate in (100.0, 150.0, 210.0)]
    why = [("a goat",), ("a duck", "a | cat"), ()]
    cell = make_cell("resnet20")
    runs = [
        make_record(cell, found=each, invalid=invalid, repeat=repeat)
        for repeat, (each, invalid) in enumerate(zip(found, why))
    ]
    return [*runs, make_record(make_cell("resnet18"))]


def test_a_row_of_disturbed_runs_says_so_and_keeps_their_numbers():
    disturbed, calm = rows(disturbed_records())
    assert disturbed["valid"] is False
    assert disturbed["invalid_reason"] == "2 of 3 runs: a duck; a | cat"
    assert disturbed["train_throughput"] == pytest.approx(150.0)
    assert (calm["valid"], calm["invalid_reason"]) == (True, "")


def test_the_only_run_s_reasons_stand_alone():
    row = only(rows(disturbed_records()[:1]))
    assert (row["valid"], row["invalid_reason"]) == (False, "a goat")


def test_a_run_that_broke_down_after_its_training_keeps_its_numbers_and_says_so():
    whole = make_record()
    broken_late = explained(unfinished(replace(whole, repeat=1), ["inference"]), "oom", "no room")
    row = only(rows([whole, broken_late]))
    assert (row["status"], row["runs"]) == ("ok", 2)
    assert row["reason"] == "1 of 2 runs: not measured: inference; no room"
    assert row["train_throughput"] == whole.value("train_throughput")
    assert row["inference_status"] == "failed"
    assert "- resnet20 partly failed: inference: no room" in render_markdown([row])


def test_rows_of_runs_that_did_not_finish_are_neither_valid_nor_not():
    row = only(rows([broken(make_cell(), "oom", "no room", invalid=("a goat",))]))
    assert (row["valid"], row["invalid_reason"]) == (None, "")


@pytest.mark.parametrize("valid", [True, False])
def test_rows_can_be_chosen_by_validity(valid):
    table = filter_rows(rows(disturbed_records()), parse_filter(f"valid={valid}"))
    assert [row["valid"] for row in table] == [valid]


def test_tables_mark_disturbed_rows_and_say_why():
    text = render_markdown(rows(disturbed_records()))
    marked = {line.split()[1]: line.split()[-2] for line in text.splitlines() if "| resnet" in line}
    assert marked == {"resnet20": "invalid", "resnet18": "ok"}
    assert "- resnet20 invalid: 2 of 3 runs: a duck; a \\| cat" in text
    shown = render_terminal(rows(disturbed_records()))
    assert " resnet20 invalid: 2 of 3 runs: a duck; a | cat" in shown


def test_a_row_can_have_failed_and_disturbed_runs():
    failed = broken(make_cell("resnet20"), "oom", "no room", repeat=3)
    text = render_markdown(rows([*disturbed_records(), failed]))
    assert "| oom, invalid |" in text
    assert "- resnet20 oom: 1 of 4 runs: no room" in text
    assert "- resnet20 invalid: 2 of 3 runs: a duck; a \\| cat" in text


def test_tables_without_disturbed_rows_have_no_status():
    assert "Status" not in render_markdown(rows(disturbed_records()[3:]))


def test_the_csv_tells_which_rows_are_valid():
    lines = list(csv.DictReader(io.StringIO(render_csv(rows(disturbed_records())))))
    assert [line["valid"] for line in lines] == ["False", "True"]
    assert lines[0]["invalid_reason"] == "2 of 3 runs: a duck; a | cat"


def test_what_a_good_record_says_of_itself_is_a_note_below_its_table() -> None:
    emulated = replace(make_record(make_cell(precision="bf16")), reason="bf16 is emulated")
    text = render_markdown(rows([make_record(), emulated]))
    assert text.count("note: bf16 is emulated") == 1
    assert "resnet20 note: bf16 is emulated" in text.partition("### bf16")[2]
