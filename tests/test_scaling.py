"""The suites of several devices, their efficiency by hand, their tables and their plot."""

import struct
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_worker import DATA, environment

from bench.columns import DASH, scaling_columns
from bench.efficiency import in_order, scaling_rows, told_apart
from bench.nvml import installed_gpus, visible_gpus
from bench.options import RunOptions, build_suite
from bench.overrides import override
from bench.protocol import Protocol
from bench.record import Measurement, Record
from bench.rows import rows
from bench.save import save, table, write_plot
from bench.scaling import PER_DEVICE, SETTINGS, default_counts, exchange, scaling
from bench.scaling_plot import PLOT, exchange_bars, scaling_lines, scaling_plot
from bench.spec import Cell, expand, grid
from bench.suites import quick
from bench.table import render_markdown
from cifar.config import Parallel
from cifar.errors import ConfigError, OutputError, UnsupportedError
from cifar.strategy import STRATEGIES

# --- Which cells ---


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set how many GPUs and cores there are."""

    def there(gpus: int, cores: int) -> None:
        monkeypatch.setattr("bench.scaling.visible_gpus", lambda _: gpus)
        monkeypatch.setattr("bench.scaling.available_cores", lambda: cores)

    return there


@pytest.mark.parametrize(
    ("gpus", "cores", "counts"),
    [
        (0, 1, (1,)),
        (0, 2, (1, 2)),
        (0, 12, (1, 2, 4)),  # 8 processes would leave four cores idle
        (1, 16, (1,)),
        (6, 16, (1, 2, 4)),
        (8, 3, (1, 2, 4, 8)),
    ],
)
def test_counts_are_powers_of_two_up_to_the_devices(
    machine: Any, gpus: int, cores: int, counts: tuple[int, ...]
) -> None:
    machine(gpus, cores)
    assert default_counts() == counts


def sizes(cells: list[Cell], launcher: str) -> set[tuple[int, int]]:
    """Processes and global batches of a launcher's plain cells."""
    return {
        (cell.num_processes, cell.train.recipe.global_batch_size)
        for cell in cells
        if cell.launcher == launcher and not cell.train.parallel.label
    }


def test_scaling_is_weak_and_strong_over_all_counts_and_launchers() -> None:
    cells = [task.cell for task in expand(scaling(counts=(1, 2, 4)))]
    weak = {(1, PER_DEVICE), (2, 2 * PER_DEVICE), (4, 4 * PER_DEVICE)}
    strong = {(count, 4 * PER_DEVICE) for count in (1, 2, 4)}
    assert sizes(cells, "ddp") == weak | strong
    for launcher in set(STRATEGIES) - {"ddp"}:
        assert sizes(cells, launcher) == {each for each in weak | strong if each[0] > 1}
    changed = [cell for cell in cells if cell.train.parallel.label]
    assert {cell.train.parallel for cell in changed} == set(SETTINGS)
    assert {(cell.launcher, cell.num_processes, cell.train.recipe.global_batch_size)
            for cell in changed} == {("ddp", 4, 4 * PER_DEVICE)}  # fmt: skip
    assert expand(scaling(counts=(2, 4))) == expand(scaling(counts=(1, 2, 4))), "one is always in"


def test_a_strong_batch_divides_over_any_counts() -> None:
    cells = [task.cell for task in expand(scaling(counts=(3, 4), batch_size=5))]
    assert sizes(cells, "ddp") == {(1, 5), (3, 15), (4, 20), *((count, 60) for count in (1, 3, 4))}


def test_one_device_alone_has_nothing_to_exchange(machine: Any) -> None:
    machine(1, 8)
    cells = [task.cell for task in expand(scaling())]
    assert sizes(cells, "ddp") == {(1, PER_DEVICE)}
    assert len(cells) == 1
    assert {task.cell.num_processes for task in expand(exchange())} == {1, 2}


def test_exchange_trains_every_way_at_three_seeds(machine: Any) -> None:
    machine(8, 8)
    cells = [task.cell for task in expand(exchange())]
    assert len(cells) == 6 * 3
    assert {(cell.num_processes, cell.train.parallel.label) for cell in cells} == {
        (1, ""),
        *((8, name) for name in ("", "bf16-gradients", "local4", "local16", "sync-bn")),
    }


def options(**fields: Any) -> RunOptions:
    return RunOptions(**{"suite": "scaling", **fields})


def test_the_command_line_chooses_counts_models_and_a_batch_per_device() -> None:
    chosen = options(num_processes=(1, 2), models=("resnet20",), precisions=("bf16",),
                     batch_size=8, launcher=("ddp",), timed_steps=3)  # fmt: skip
    tasks = expand(build_suite(chosen))
    assert {task.cell.train.model.name for task in tasks} == {"resnet20"}
    assert {task.cell.precision for task in tasks} == {"bf16"}
    assert {task.protocol.timed_steps for task in tasks} == {3}
    assert sizes([task.cell for task in tasks], "ddp") == {(1, 8), (1, 16), (2, 16)}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_processes": (1, 0)}, "num-processes: 0: give 1 or more"),
        ({"num_processes": (2, 2)}, "num-processes: '2,2': give each number once"),
        ({"launcher": ("nope",)}, "launcher: 'nope': choose one of ddp"),
        ({"num_processes": (1,), "parallel": Parallel(local_steps=2)}, "local-steps: 2: is for se"),
        ({"suite": "quick", "parallel": Parallel(overlap=False)}, "overlap: False: is for several"),
    ],
)
def test_what_cannot_be_swept_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        build_suite(options(**fields))


def test_every_cell_is_measured_in_every_number_of_processes() -> None:
    parallel = Parallel(compression="bf16")
    suite = override(quick(), num_processes=(1, 2), parallel=parallel)
    cells = [task.cell for task in expand(suite)]
    assert len(cells) == 2 * len(expand(quick()))
    assert {(cell.num_processes, cell.train.parallel) for cell in cells} == {
        (1, Parallel()),
        (2, parallel),
    }
    with pytest.raises(UnsupportedError, match="is for ddp, not for fsdp"):
        override(quick(), launcher=("fsdp",), num_processes=(2,), parallel=parallel)


# --- Efficiency ---

PROTOCOL = Protocol(inference_batch_sizes=(), metrics=("anatomy",))


def cell_of(count: int, batch: int, launcher: str = "ddp", **parallel: Any) -> Cell:
    (cell,) = grid(["resnet20"], ["fp32"], batch_sizes=(batch,), launcher=launcher,
                   num_processes=count)  # fmt: skip
    return replace(cell, train=replace(cell.train, parallel=Parallel(**parallel)))


GPUS = ("H200",) * 4


def record_of(cell: Cell, rate: float, *, gpus: tuple[str, ...] = GPUS, **fields: Any) -> Record:
    """Two steps of a cell at so many images/s, a tenth of them communication, with a straggler.

    On four GPUs, or without them on four cores.
    """
    count, batch = cell.num_processes, cell.train.recipe.global_batch_size
    seconds = batch / rate
    found = [
        Measurement(name="train_throughput", unit="samples/s", better="higher",
                    labels={"samples_per_step": batch}, samples=((seconds, seconds),) * count),
    ]  # fmt: skip
    if count > 1:
        found += [
            Measurement(name="step_communication", unit="s", better="lower",
                        samples=((seconds / 10,) * 2,) * count),
            Measurement(name="straggler_ratio", unit="1", better="lower", samples=((1.5,),)),
        ]  # fmt: skip
    threads = 4 // count
    known = {
        "suite": "scaling",
        "cell": cell,
        "protocol": PROTOCOL,
        "status": "ok",
        "started": "2026-01-01T00:00:00+00:00",
        "duration_s": 1.0,
        "environment": environment(
            threads=threads,
            cpu_count=4,
            worker_env={"OMP_NUM_THREADS": str(threads)},
            gpu_names=gpus,
        ),
        "data": DATA,
        "measurements": tuple(found),
    }
    return Record(**known | fields)


def sweep() -> list[Record]:
    """One process at 100 images/s by 32 and 200 by 128; two and four of them less than as often."""
    return [
        record_of(cell_of(1, 32), 100.0),
        record_of(cell_of(1, 128), 200.0),
        record_of(cell_of(2, 64), 180.0),
        record_of(cell_of(2, 128), 300.0),
        record_of(cell_of(4, 128), 320.0),
        record_of(cell_of(4, 128, "fsdp"), 240.0),
        record_of(cell_of(4, 128, bucket_mib=1.0), 300.0),
    ]


def efficiencies(records: list[Record]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    keys = ("num_processes", "batch_size", "launcher", "exchange")
    values = ("weak_efficiency", "strong_efficiency", "speed_up")
    return {
        tuple(row.get(key) for key in keys if row.get(key)): tuple(row[key] for key in values)
        for row in scaling_rows(records)
        if "speed_up" in row
    }


def test_efficiency_by_hand() -> None:
    """Weak: images/s over N times one process's at its share; strong: over N times at the batch."""
    assert efficiencies(sweep()) == {
        (1, 32, "ddp"): (1.0, 1.0, 1.0),
        (1, 128, "ddp"): (1.0, 1.0, 1.0),
        (2, 64, "ddp"): (180 / (2 * 100), None, None),
        (2, 128, "ddp"): (None, 300 / (2 * 200), 1.5),
        (4, 128, "ddp"): (320 / (4 * 100), 320 / (4 * 200), 1.6),
        (4, 128, "fsdp"): (0.6, 0.3, 1.2),
        (4, 128, "ddp", "bucket1"): (0.75, 0.375, 1.5),
    }


def test_shares_of_communication_and_stragglers_are_of_the_slowest_rank() -> None:
    by_count = {row["num_processes"]: row for row in scaling_rows(sweep())}
    assert by_count[4]["communication_share"] == pytest.approx(0.1)
    assert by_count[4]["straggler_ratio"] == 1.5
    assert by_count[1]["communication_share"] is None


@pytest.mark.parametrize(
    "other",
    [
        {"environment": environment(threads=3, cpu_count=4)},
        {"environment": environment(threads=4, cpu_count=4, code_digest="other")},
        {"environment": environment(threads=4, cpu_count=4, worker_env={"MALLOC_X": "1"})},
        {"protocol": Protocol()},
        {"data": replace(DATA, fingerprint="other")},
        {"cell": cell_of(1, 32, "fsdp")},
        {"status": "failed", "reason": "crash", "measurements": ()},
    ],
)
def test_only_a_process_that_is_otherwise_equal_is_compared_with(other: dict[str, Any]) -> None:
    """Threads in total, sources, variables, protocol, images; plain DDP that has finished."""
    one, two = (record_of(cell, 100.0, gpus=()) for cell in (cell_of(1, 32), cell_of(2, 64)))
    assert efficiencies([one, two])[2, 64, "ddp"][0] == 1.0
    found = efficiencies([replace(one, **other), two])
    assert found.get((2, 64, "ddp"), (None,))[0] is None


def test_an_engine_is_compared_with_plain_ddp_of_the_same_software() -> None:
    one, two = record_of(cell_of(1, 32), 100.0), record_of(cell_of(2, 64, "zero2"), 150.0)
    assert efficiencies([one, two])[2, 64, "zero2"][0] == 0.75
    other = replace(two, environment=replace(two.environment, tools={"deepspeed": "0.1"}))
    assert (2, 64, "zero2") not in efficiencies([one, other])


def test_processes_on_a_cpu_share_its_cores() -> None:
    """Two of two threads each do 90 images/s where one of four does 100: no loss would be 100."""
    records = [
        record_of(cell_of(1, 32), 100.0, gpus=()),
        record_of(cell_of(1, 64), 120.0, gpus=()),
        record_of(cell_of(2, 64), 90.0, gpus=()),
    ]
    assert efficiencies(records)[2, 64, "ddp"] == (0.9, 0.75, 0.75)
    same = "- Efficiency: images/s against those of one process with the same 4 threads in total"
    assert same in markdown(records)


def test_processes_that_share_the_cores_unevenly_are_told() -> None:
    """Of three cores two processes have one each."""
    seen = replace(record_of(cell_of(1, 32), 1.0, gpus=()).environment, cpu_count=3, threads=3)
    one = record_of(cell_of(1, 32), 100.0, environment=seen)
    two = record_of(cell_of(2, 64), 60.0, environment=replace(seen, threads=1))
    text = markdown([one, two])
    assert (
        "- Efficiency: none of 2 processes, which have 2 threads in total where one process has 3"
    ) in text
    (line,) = [line for line in text.splitlines() if "| 2 | ddp |" in line]
    assert f"| 60.0 | {DASH} | {DASH} | {DASH} |" in line


def test_gpus_are_compared_whatever_their_threads_and_which_are_seen() -> None:
    one, two = record_of(cell_of(1, 32), 100.0), record_of(cell_of(2, 64), 190.0)
    seen = replace(two.environment, threads=3, cpu_count=2, gpu_names=GPUS[:2],
                   worker_env={"CUDA_VISIBLE_DEVICES": "0,1"})  # fmt: skip
    two = replace(two, environment=seen)
    assert efficiencies([one, two])[2, 64, "ddp"][0] == 0.95
    same = "- Efficiency: images/s against N times those of one process\n"
    assert same in markdown([one, two])
    beside = replace(two, environment=replace(seen, side_by_side=2))
    assert (2, 64, "ddp") not in efficiencies([one, beside]), "others were measured meanwhile"
    other = replace(two, environment=replace(seen, gpu_names=("H100",) * 2))
    assert (2, 64, "ddp") not in efficiencies([one, other])


def test_many_processes_of_a_cell_bound_its_efficiency() -> None:
    records = [
        record_of(cell, rate + repeat, repeat=repeat)
        for cell, rate in ((cell_of(1, 32), 100.0), (cell_of(2, 64), 180.0))
        for repeat in range(7)
    ]
    row = scaling_rows(records)[-1]
    assert row["weak_efficiency"] == pytest.approx(183 / 206)
    assert row["weak_efficiency_low"] < row["weak_efficiency"] < row["weak_efficiency_high"]
    assert row["weak_efficiency_high"] < 186 / 200
    assert "] |" in markdown(records)
    assert "95 % interval" in markdown(records)


# --- Tables and plot ---


def markdown(records: list[Record]) -> str:
    return render_markdown(in_order(scaling_rows(records)), scaling_columns)


def test_the_table_by_hand() -> None:
    text = markdown(sweep()).replace(DASH, "-")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == (
        "| Model | Batch | Procs | Launcher | Exchange | Train (images/s) | Speed-up | Weak (%) | "
        "Strong (%) | Comm. (%) | Straggler | Peak memory (MiB) |"
    )
    assert lines[2:] == [
        "| resnet20 | 32 | 1 | ddp | - | 100 | 1.00x | 100.0 | 100.0 | - | - | - |",
        "| resnet20 | 128 | 1 | ddp | - | 200 | 1.00x | 100.0 | 100.0 | - | - | - |",
        "| resnet20 | 64 | 2 | ddp | - | 180 | - | 90.0 | - | 10.0 | 1.50x | - |",
        "| resnet20 | 128 | 2 | ddp | - | 300 | 1.50x | - | 75.0 | 10.0 | 1.50x | - |",
        "| resnet20 | 128 | 4 | ddp | - | 320 | 1.60x | 80.0 | 40.0 | 10.0 | 1.50x | - |",
        "| resnet20 | 128 | 4 | fsdp | - | 240 | 1.20x | 60.0 | 30.0 | 10.0 | 1.50x | - |",
        "| resnet20 | 128 | 4 | ddp | bucket1 | 300 | 1.50x | 75.0 | 37.5 | 10.0 | 1.50x | - |",
    ]


def test_a_failed_cell_stays_in_the_table_with_its_reason() -> None:
    failed = record_of(cell_of(4, 128, "fsdp"), 1.0, status="oom", reason="out of memory on rank 2")
    text = markdown([*sweep()[:5], replace(failed, measurements=())])
    (line,) = [line for line in text.splitlines() if "| fsdp |" in line]
    assert line.endswith("| oom |")
    assert "out of memory on rank 2" in text


def test_a_sweep_of_any_suite_is_shown_as_scaling_too_and_the_suite_as_that_alone() -> None:
    records = sweep()
    swept, others = told_apart(scaling_rows(records), records)
    assert (len(swept), others) == (len(records), [])
    custom = [replace(record, suite="custom") for record in records]
    swept, others = told_apart(scaling_rows(custom), custom)
    assert len(swept) == len(others) == len(records)
    assert others == [
        {key: each for key, each in row.items() if key in plain}
        | {key: row[key] for key in row if key not in plain and key != "compared_with"}
        for row, plain in zip(scaling_rows(custom), rows(custom), strict=True)
    ]
    alone = [replace(record, suite="custom") for record in records[:2]]
    swept, others = told_apart(scaling_rows(alone), alone)
    assert (swept, len(others)) == ([], 2), "one process each is no sweep"


def test_lines_of_the_plot_begin_with_one_process() -> None:
    table = scaling_rows(sweep())
    weak, strong = (scaling_lines(table, weak=each) for each in (True, False))
    assert {line.label: line.points for line in weak} == {
        "ddp": ((1, 100.0, 1.0), (2, 180.0, 0.9), (4, 320.0, 0.8)),
        "fsdp": ((1, 100.0, 1.0), (4, 240.0, 0.6)),
    }
    assert {line.label: line.points for line in strong} == {
        "ddp": ((1, 200.0, 1.0), (2, 300.0, 0.75), (4, 320.0, 0.4)),
        "fsdp": ((1, 200.0, 1.0), (4, 240.0, 0.3)),
    }
    assert exchange_bars(table) == [("ddp", 320.0), ("bucket1", 300.0)]


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


def test_the_plot_is_a_png_with_room_for_the_exchanges() -> None:
    table = scaling_rows(sweep())
    plain = [row for row in table if not row.get("exchange")]
    (width, height), (_, less) = (size_of(scaling_plot(each)) for each in (table, plain))
    assert width > 900
    assert height > less > 700
    assert size_of(scaling_plot(scaling_rows(sweep()[:1])))[0] > 900, "nothing to draw yet"


def test_saving_and_running_write_the_plot_of_the_suite_alone(tmp_path: Any) -> None:
    records = sweep()
    path = write_plot(tmp_path, records)
    assert path == tmp_path / PLOT
    assert size_of(path.read_bytes())
    assert write_plot(tmp_path, [replace(each, suite="custom") for each in records]) is None
    with pytest.raises(OutputError, match=r"^plot: .* cannot be written \(.*\); the records are s"):
        write_plot(tmp_path / "none", records)
    run = SimpleNamespace(plan=SimpleNamespace(suite="scaling"), id="run", records=lambda: records)
    written = save(run, tmp_path / "results")
    assert {each.name for each in written} == {"scaling.jsonl", "scaling.md", PLOT}
    kept = (tmp_path / "results" / "h200-x4" / "scaling.md").read_text()
    assert table("scaling", records) in kept
    assert "Weak (%)" in kept


# --- How many GPUs ---


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, 4),
        ("", 0),
        ("0,1", 2),
        (" 3 ", 1),
        ("0,-1,1", 1),
        ("0,9,1", 1),
        ("GPU-4f1c,GPU-77", 2),
        ("MIG-1", 1),
        ("none", 0),
    ],
)
def test_gpus_that_a_process_sees(
    monkeypatch: pytest.MonkeyPatch, named: str | None, seen: int
) -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert visible_gpus({} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == seen


def test_gpus_that_were_given_to_others_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts all of the machine's, and a job that has none may open none."""

    def handle(number: int) -> None:
        if number > 0:
            raise OSError("Insufficient Permissions")

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=handle,
        NVMLError=OSError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert installed_gpus() == visible_gpus({}) == 1
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert installed_gpus() == 0


def test_without_a_driver_or_its_library_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def missing() -> None:
        raise NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=missing,
                                                               NVMLError=NVMLError))  # fmt: skip
    assert visible_gpus({}) == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert visible_gpus({}) == 0
