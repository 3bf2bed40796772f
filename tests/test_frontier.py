"""The memory frontier: the order of probes, what ends a search, resuming, tables, limits.

After an intended change write the golden files anew: `UPDATE_GOLDEN=1 pytest` on this file.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_worker import environment, record_of
from test_bench_cli import bench, environ
from test_table import DATA, ENVIRONMENT, check_golden, scalar

from bench import frontier_command, probes, runs
from bench.columns import DASH, frontier_columns
from bench.commands import main
from bench.frontier import SUITE, frontier
from bench.frontier_command import FrontierOptions, build_searches
from bench.frontier_search import FrontierSearch, next_batch, plan_search, probe, probe_protocol
from bench.job import Job
from bench.protocol import Protocol
from bench.record import Measurement, Record
from bench.runs import Run
from bench.save import save
from bench.spec import Plan, Suite, Task, grid
from bench.table import render_markdown, render_terminal
from cifar.errors import ConfigError

pytestmark = pytest.mark.usefixtures("own_locks")

MIB = 2**20

# --- The search by hand ---


def probed(search: FrontierSearch, fits: Callable[[int], bool]) -> list[int]:
    """The batches in the order in which they are probed."""
    known: dict[int, bool] = {}
    while (batch := next_batch(known, search)) is not None:
        assert batch not in known, "no batch is probed twice"
        known[batch] = fits(batch)
    return list(known)


@pytest.mark.parametrize(
    ("most", "search", "expected"),
    [
        # 448 | 480: 32 more is more than 448 / 16 = 28; 464: 464 | 480 ends it
        (470, FrontierSearch(start=64, largest=10_000), [64, 128, 256, 512, 384, 448, 480, 464]),
        # 384 | 512: 128 more is more than a quarter of 384; 448 | 512 ends it
        (
            470,
            FrontierSearch(start=64, largest=10_000, resolution=0.25),
            [64, 128, 256, 512, 384, 448],
        ),
        # the granule ends it: 8 | 16
        (8, FrontierSearch(start=64, largest=10_000), [64, 32, 16, 8]),
        (23, FrontierSearch(start=64, largest=10_000), [64, 32, 16, 24]),
        (7, FrontierSearch(start=64, largest=10_000), [64, 32, 16, 8]),
        # the data ends it
        (10**9, FrontierSearch(start=64, largest=200), [64, 128, 200]),
        (10**9, FrontierSearch(start=64, largest=64), [64]),
        # 3 processes: granule 24; 96 | 144 -> 120; 120 | 144 ends it
        (130, FrontierSearch(start=48, largest=960, granule=24), [48, 96, 192, 144, 120]),
    ],
)
def test_batches_are_doubled_then_bisected(most, search, expected) -> None:
    assert probed(search, lambda batch: batch <= most) == expected


@pytest.mark.parametrize("granule", [8, 24])
@pytest.mark.parametrize("resolution", [1 / 64, 1 / 16, 0.4])
def test_every_frontier_is_found_within_the_resolution(granule, resolution) -> None:
    search = FrontierSearch(
        start=2 * granule, largest=50 * granule, granule=granule, resolution=resolution
    )
    for true in range(0, 52 * granule, 5):
        batches = probed(search, lambda batch, true=true: batch <= true)
        assert all(batch % granule == 0 and batch <= search.largest for batch in batches)
        low = max((batch for batch in batches if batch <= true), default=0)
        high = min((batch for batch in batches if batch > true), default=None)
        if high is None:
            assert low == search.largest
        elif low == 0:
            assert high == granule
        else:
            assert high - low <= max(granule, resolution * low)


def test_a_search_goes_on_above_a_batch_that_does_not_fit_if_a_larger_one_does() -> None:
    search = FrontierSearch(start=64, largest=10_000)
    assert next_batch({64: True, 96: False, 128: True}, search) == 256
    assert next_batch({64: True, 96: False, 128: True, 256: False}, search) == 192


def test_sizes_are_rounded_to_what_divides() -> None:
    assert plan_search(1, images=10_000) == FrontierSearch(start=64, largest=10_000, granule=8)
    assert plan_search(3, images=10_000, start=50) == FrontierSearch(
        start=48, largest=9_984, granule=24
    )
    assert plan_search(1, images=99, largest=10**6) == FrontierSearch(start=64, largest=96)
    assert plan_search(1, images=99, start=1, largest=21) == FrontierSearch(start=8, largest=16)
    assert plan_search(1, images=50) == FrontierSearch(start=48, largest=48), "64 was nobody's wish"
    for options, message in (
        ({"start": 0}, "start: 0: give 1 to 96, the largest batch to probe"),
        ({"start": 97}, "start: 97: give 1 to 96"),
        ({"largest": 7}, "largest: 7: give at least 8"),
        ({"resolution": 1.0}, "resolution: 1.0: give one in"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            plan_search(1, images=99, **options)


# --- The loop ---

SEARCH = FrontierSearch(start=64, largest=1024, resolution=0.25)


def make_run(
    root: Path, models: Iterable[str] = ("resnet20",), search: FrontierSearch = SEARCH
) -> Run:
    cells = grid(list(models), ["fp32"], batch_sizes=(search.start,))
    plan = Plan(protocol=probe_protocol(), cells=cells)
    return runs.create(Suite(name=SUITE, description="", plans=(plan,)), root, frontier=search)


def batch_of(record_or_job: Record | Job) -> int:
    task = record_or_job.task if isinstance(record_or_job, Job) else record_or_job
    return task.cell.train.recipe.global_batch_size


class FakeLaunch:
    """A machine on which a batch up to `most` fits; `odd` batches have another status."""

    def __init__(self, most: int, odd: dict[int, str] | None = None) -> None:
        self.most, self.odd = most, odd or {}
        self.seen: list[tuple[str, int]] = []
        self.folders: list[str] = []

    def __call__(self, job: Job, folder: Path) -> Record:
        batch = batch_of(job)
        self.seen.append((job.task.cell.train.model.label, batch))
        self.folders.append(folder.name)
        status = self.odd.get(batch, "ok" if batch <= self.most else "oom")
        if status == "interrupt":
            raise KeyboardInterrupt
        if status == "ok":
            return record_of(job, run_id=job.run_id, suite=job.suite)
        died = {"status": status, "reason": f"why {status}"}
        return record_of(job, run_id=job.run_id, suite=job.suite, measurements=(), **died)

    @property
    def batches(self) -> list[int]:
        return [batch for _, batch in self.seen]


def present_of(**fields):
    return lambda num_processes: environment(**fields)


def test_every_model_is_searched_and_every_probe_recorded(tmp_path, capsys) -> None:
    run = make_run(tmp_path, ("resnet20", "resnet18"))
    launch = FakeLaunch(200)
    records = probes.execute(run, launch=launch, present=present_of())
    # 192 | 256 is a gap of 64, more than a quarter of 192; 192 | 224 is not
    sizes = [64, 128, 256, 192, 224]
    assert launch.seen == [(model, size) for model in ("resnet20", "resnet18") for size in sizes]
    assert run.records() == records
    assert [record.status for record in records] == ["ok", "ok", "oom", "ok", "oom"] * 2
    assert [name[:2] for name in launch.folders] == [f"{number:02d}" for number in range(1, 11)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[2] == "[1/2] resnet20 fp32 b256 ... oom 1 s: why oom"
    (first, second) = frontier(records)
    assert (first["largest_batch"], first["smallest_oom"], first["probes"]) == (192, 224, 5)
    assert (first["status"], second["model"]) == ("ok", "resnet18")


def test_a_search_of_which_no_batch_fits_says_so(tmp_path) -> None:
    records = probes.execute(make_run(tmp_path), launch=FakeLaunch(7), present=present_of())
    (row,) = frontier(records)
    assert (row["largest_batch"], row["smallest_oom"], row["status"]) == (None, 8, "oom")
    assert row["reason"] == "batch 8: why oom"


@pytest.mark.parametrize("status", ["failed", "timeout", "unsupported"])
def test_what_is_not_out_of_memory_ends_its_search_and_no_other(tmp_path, status) -> None:
    run = make_run(tmp_path, ("resnet20", "resnet18"))
    launch = FakeLaunch(100, {128: status})
    rows = frontier(probes.execute(run, launch=launch, present=present_of()))
    assert launch.batches == [64, 128, 64, 128]
    for row in rows:
        assert (row["status"], row["reason"]) == (status, f"batch 128: why {status}")
        assert (row["largest_batch"], row["smallest_oom"]) == (64, None)


def test_finished_probes_are_used_again(tmp_path, capsys) -> None:
    run = make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        probes.execute(run, launch=FakeLaunch(100, {96: "interrupt"}), present=present_of())
    assert [batch_of(record) for record in run.records()] == [64, 128]
    again = FakeLaunch(100)
    records = probes.execute(run, launch=again, present=present_of())
    assert again.batches == [96, 112]
    assert [batch_of(record) for record in records] == [64, 128, 96, 112]
    lines = capsys.readouterr().err.splitlines()
    assert [" ... kept " in line for line in lines[-4:]] == [True, True, False, False]
    last = FakeLaunch(100)
    assert probes.execute(run, launch=last, present=present_of()) == records
    assert last.batches == []


def test_a_failed_probe_is_tried_again_and_other_code_probes_anew(tmp_path) -> None:
    run = make_run(tmp_path)
    probes.execute(run, launch=FakeLaunch(100, {128: "timeout"}), present=present_of())
    again = FakeLaunch(100)
    probes.execute(run, launch=again, present=present_of())
    assert again.batches == [128, 96, 112]
    (row,) = frontier(run.records())
    assert (row["status"], row["largest_batch"], row["smallest_oom"]) == ("ok", 96, 112)
    other = FakeLaunch(100)
    probes.execute(run, launch=other, present=present_of(code_digest="other"))
    assert other.batches == [64, 128, 96, 112]


def test_what_is_missing_is_where_every_search_goes_on(tmp_path) -> None:
    run = make_run(tmp_path, ("resnet20", "resnet18"))

    def missing(**options) -> list[tuple[str, int]]:
        left = probes.missing(run, present=present_of(), **options)
        return [(task.cell.train.model.label, batch_of(task)) for task in left]

    assert missing() == [("resnet20", 64), ("resnet18", 64)]
    launch = FakeLaunch(100)

    def interrupted(job: Job, folder: Path) -> Record:
        if len(launch.seen) == 6:
            raise KeyboardInterrupt
        return launch(job, folder)

    with pytest.raises(KeyboardInterrupt):
        probes.execute(run, launch=interrupted, present=present_of())
    assert missing() == [("resnet18", 96)], "the other search has ended"
    probes.execute(run, launch=FakeLaunch(100, {96: "timeout"}), present=present_of())
    assert missing() == [("resnet18", 96)], "a timeout is no answer"
    probes.execute(run, launch=FakeLaunch(100, {96: "unsupported"}), present=present_of())
    assert missing() == [], "an unsupported probe ends its search"


def test_probes_of_other_images_are_made_again(tmp_path) -> None:
    run, launch = make_run(tmp_path), FakeLaunch(7)

    def of_old_images(job: Job, folder: Path) -> Record:
        return replace(launch(job, folder), data=replace(DATA, fingerprint="old"))

    probes.execute(run, launch=of_old_images, present=present_of())
    data = run.plan.tasks[0].cell.train.data
    for name, left in (("old", []), ("new", run.plan.tasks)):
        assert probes.missing(run, present=present_of(), fingerprints={data: name}) == [*left]


def test_runs_and_frontiers_are_told_apart(tmp_path, monkeypatch, capsys) -> None:
    cells = grid(["resnet20"], ["fp32"])
    plans = (Plan(protocol=Protocol(), cells=cells),)
    plain = runs.create(Suite(name="quick", description="", plans=plans), tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert main(["frontier", "--resume", plain.id]) == 2
    assert "is a run of cells; give it to bench run" in capsys.readouterr().err
    mine = make_run(tmp_path / "runs")
    assert runs.find(mine.id, tmp_path / "runs").plan.frontier == SEARCH
    assert main(["run", "--resume", mine.id]) == 2
    assert "is a memory frontier; give it to bench frontier" in capsys.readouterr().err


def test_a_probe_has_no_warm_up_that_could_not_settle() -> None:
    assert probe_protocol().warmup_steps == 0


def test_a_probe_measures_training_alone_and_no_longer_than_asked() -> None:
    protocol = probe_protocol()
    assert protocol.training_alone and protocol.min_timed_seconds == 0
    assert replace(protocol, training_alone=False).digest != protocol.digest


# --- Rows and tables ---


def made(model: str, batch: int, status: str = "ok", *, limit: int | None = None, **cell) -> Record:
    """A probe's record: 1000 images/s and 1 MiB per image."""
    (first,) = grid([model], [cell.pop("precision", "fp32")], **cell)
    task = probe(Task(cell=first, protocol=replace(probe_protocol(), memory_limit=limit)), batch)
    rate = Measurement(
        name="train_throughput", unit="samples/s", better="higher",
        samples=((batch / 1000,) * 2,), labels={"samples_per_step": batch},
    )  # fmt: skip
    found = (rate, scalar("peak_memory_bytes", "bytes", batch * MIB))
    return Record(
        run_id="run", suite=SUITE, cell=task.cell, protocol=task.protocol, status=status,
        reason="" if status == "ok" else f"why {status}", started="", duration_s=1.0,
        environment=ENVIRONMENT, data=DATA if status == "ok" else None,
        measurements=found if status == "ok" else (),
    )  # fmt: skip


def known_records() -> list[Record]:
    limit = 4096 * MIB
    sizes = [(64, "ok"), (128, "oom"), (96, "ok")]
    return [
        *(made("resnet20", batch, status, limit=limit) for batch, status in sizes),
        *(made("resnet20", batch, limit=limit, precision="bf16") for batch in (64, 128)),
        made("resnet18", 64, "oom", limit=limit),
        *(made("resnet34", batch, limit=limit, channels_last=(True,)) for batch in (64, 256)),
        made("resnet34", 128, "oom", limit=limit, channels_last=(True,)),
        made("resnet50", 64, limit=limit),
        made("resnet50", 128, "timeout", limit=limit),
    ]


def test_the_frontier_is_told_from_the_records_alone() -> None:
    rows = frontier(known_records())
    keys = ("model", "precision", "largest_batch", "smallest_oom", "peak_memory_bytes", "status")
    assert [tuple(row.get(key) for key in keys) for row in rows] == [
        ("resnet20", "fp32", 96, 128, 96 * MIB, "ok"),
        ("resnet20", "bf16", 128, None, 128 * MIB, "ok"),
        ("resnet18", "fp32", None, 64, None, "oom"),
        ("resnet34", "fp32", 256, None, 256 * MIB, "not monotone"),
        ("resnet50", "fp32", 64, None, 64 * MIB, "timeout"),
    ]
    assert rows[0]["train_throughput"] == pytest.approx(1000.0)
    assert rows[3]["reason"] == "batch 256 fits and batch 128 does not"


def test_a_frontier_that_ends_with_the_images_says_so() -> None:
    (row,) = frontier([made("resnet20", 9_992), made("resnet20", 10_000)])
    assert (row["largest_batch"], row["status"]) == (10_000, "ok")
    assert row["reason"] == "all 10,000 training images fit: memory was not the limit"
    (row,) = frontier([made("resnet20", 9_992)])
    assert row["reason"] == ""


def test_limits_and_circumstances_are_not_mixed() -> None:
    records = [made("resnet20", 64), made("resnet20", 64, "oom", limit=MIB)]
    other = replace(ENVIRONMENT, code_digest="other")
    elsewhere = replace(records[0], run_id="other", environment=other)
    rows = frontier([*records, elsewhere])
    assert [(row["memory_limit"], row["largest_batch"]) for row in rows] == [
        (None, 64), (MIB, None), (None, 64),
    ]  # fmt: skip


def test_golden_frontier() -> None:
    rows = frontier(known_records())
    check_golden("frontier.md", render_markdown(rows, frontier_columns))
    check_golden("frontier.txt", render_terminal(rows, frontier_columns, width=120))


def test_a_frontier_is_saved_with_its_table(tmp_path) -> None:
    run = make_run(tmp_path / "runs")
    probes.execute(run, launch=FakeLaunch(100), present=present_of())
    jsonl, markdown = save(run, tmp_path / "results")
    assert (jsonl.name, markdown.name) == ("frontier.jsonl", "frontier.md")
    assert f"| resnet20 | {DASH} | 96 | 112 |" in markdown.read_text()
    assert len(jsonl.read_text().splitlines()) == 4


# --- The command line ---

LIMITED = ["frontier", "--models", "resnet20", "--memory-limit", "4096"]

BAD = {
    "models: '': give some": ["frontier"],
    "model: 'resnet19': choose one of": ["frontier", "--models", "resnet19", "--memory-limit", "9"],
    "precision: 'int3': choose one of": [*LIMITED, "--precisions", "int3"],
    "launcher: 'nope': choose one of ddp": [*LIMITED, "--launcher", "nope"],
    "recipe: 'nope': choose one of": [*LIMITED, "--recipe", "nope"],
    "/missing.npz: no such file": [*LIMITED, "--data", "npz:missing.npz"],
    "num-processes: 0: give 1 or more": [*LIMITED, "--num-processes", "0"],
    "memory-limit: 0: give 1 to ": [*LIMITED[:-1], "0"],
    "--memory-limit": [*LIMITED[:-1], "much"],
    "start: 0: give 1 to ": [*LIMITED, "--start", "0"],
    "largest: 7: give at least 8": [*LIMITED, "--largest", "7"],
    "resolution: 0.0: give one in (0, 1)": [*LIMITED, "--resolution", "0"],
    "timeout: 0.0: give a positive number": [*LIMITED, "--timeout", "0"],
    "run: 'nope': no such run": ["frontier", "--resume", "nope"],
    "memory-limit: 4096: not with --resume": [*LIMITED[:1], *LIMITED[3:], "--resume", "nope"],
    "models: resnet20: not with --resume": [*LIMITED[:3], "--resume", "nope"],
}


@pytest.mark.parametrize(("message", "words"), BAD.items())
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, message, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert message in output.err
    assert output.out == "" and not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_first_probes_and_starts_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*LIMITED, "--precisions", "fp32,bf16", "--start", "100", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/2] resnet20 fp32 b96  about ")
    assert lines[-1].startswith("2 cells, about ")
    assert list(tmp_path.iterdir()) == []


def limit_of(present, **options) -> int | None:
    suite, _ = build_searches(FrontierOptions(models=("resnet20",), **options), present)
    return suite.plans[0].protocol.memory_limit


def test_a_cpu_has_a_limit_by_default_and_a_gpu_its_whole_memory(monkeypatch) -> None:
    monkeypatch.setattr(frontier_command, "available_memory", lambda: 10 * 2**30)
    assert limit_of(present_of()) == 7.5 * 2**30
    assert limit_of(present_of(), num_processes=2) == 3.75 * 2**30
    assert limit_of(present_of(gpu_names=("H200",), gpu_memory_bytes=(2**37,))) is None


def test_a_limit_is_held_against_the_memory_it_is_of() -> None:
    host = present_of(memory_bytes=2000 * MIB)
    gpus = present_of(
        memory_bytes=2000 * MIB, gpu_names=("L4",) * 3,
        gpu_memory_bytes=(9000 * MIB, 8000 * MIB, 7000 * MIB),
    )  # fmt: skip
    assert limit_of(host, memory_limit=2000) == 2000 * MIB
    assert limit_of(gpus, memory_limit=9000) == 9000 * MIB, "the first GPU is the process's"
    assert limit_of(gpus, memory_limit=8000, num_processes=2) == 8000 * MIB
    for present, most, processes in ((host, 2000, 1), (gpus, 9000, 1), (gpus, 8000, 2)):
        with pytest.raises(ConfigError, match=rf"give 1 to {most} MiB"):
            limit_of(present, memory_limit=most + 1, num_processes=processes)


def test_memory_is_what_the_container_has_left(tmp_path, monkeypatch) -> None:
    first, second = tmp_path / "v2", tmp_path / "v1"
    groups = ((first, "max", "now", "inactive_file"), (second, "most", "used", "total_file"))
    monkeypatch.setattr(frontier_command, "_CONTAINERS", groups)
    available = frontier_command.available_memory()
    assert available > 10_000, "no container, the machine's"
    for folder, limit, usage in ((first, "max", "now"), (second, "most", "used")):
        folder.mkdir()
        (folder / limit).write_text("10000\n")
        (folder / usage).write_text("4000\n")
    (first / "memory.stat").write_text("anon 1000\ninactive_file 1500\n")
    (second / "memory.stat").write_text("total_file 500\n")
    assert frontier_command.available_memory() == 6500, "10,000 - 4,000 + 500"
    (second / "most").write_text(f"{2**63 - 4096}\n")
    assert frontier_command.available_memory() == 7500, "10,000 - 4,000 + 1,500"
    (first / "max").write_text("max\n")
    assert frontier_command.available_memory() > 10_000


def test_a_frontier_ends_in_a_table_and_its_run_can_be_shown_and_saved(tmp_path) -> None:
    words = [*LIMITED, "--largest", "100"]
    done = bench(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"resnet20 +4,096 +96 +{DASH} ", done.stdout)
    assert "2 probes in" in done.stdout
    assert "memory limit: 4,096 MiB per process" in done.stderr
    assert "[1/1] resnet20 fp32 b96 ... ok" in done.stderr
    name = runs.newest(tmp_path / "runs").id
    shown = bench(tmp_path, "table").stdout
    assert "Largest batch" in " ".join(shown.split())
    assert bench(tmp_path, "save", name).stdout.split()[1].endswith("frontier.md")
    done = bench(tmp_path, "frontier", "--resume", name, "--dry-run")
    assert (done.returncode, done.stdout) == (0, "0 cells, about 0 s\n")
    done = bench(tmp_path, "frontier", "--resume", name, fake="crash")
    assert (done.returncode, done.stderr.count("kept ok")) == (0, 2)


def test_a_failure_is_told_by_the_exit_code(tmp_path) -> None:
    done = bench(tmp_path, *LIMITED, fake="crash")
    assert done.returncode == 1
    assert "batch 64: ValueError: the worker broke" in " ".join(done.stdout.split())
    assert "to try them again: bench frontier --resume runs/" in done.stdout
    name = runs.newest(tmp_path / "runs").id
    done = bench(tmp_path, "frontier", "--resume", name, "--timeout", "77", fake="crash")
    assert done.returncode == 1
    limits = [record.protocol.timeout for record in runs.newest(tmp_path / "runs").records()]
    assert limits == [probe_protocol().timeout, 77.0]
    assert bench(tmp_path, *LIMITED, fake="oom").returncode == 0


# --- For real ---


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the limit would be the device's")
def test_a_real_frontier_on_this_cpu(tmp_path) -> None:
    words = ["frontier", "--models", "resnet20-w4", "--start", "512", "--largest", "2048"]
    words += ["--memory-limit", "1300", "--resolution", "0.5", "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        env=environ(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = frontier(runs.newest(tmp_path).records())
    assert row["status"] == "ok"
    assert row["largest_batch"] < row["smallest_oom"] <= 2048
    assert 0 < row["peak_memory_bytes"] < 1300 * MIB
