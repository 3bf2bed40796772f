"""Cells side by side: which runs where and when, what is kept of them, and how they are ended."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fake_worker import environment, record_of
from test_bench_cli import bench, environ, statuses

from bench import execution, runs
from bench.devices import Device, Machine
from bench.execution import execute
from bench.job import SIDE_BY_SIDE, Job
from bench.launchers import launch as launch_processes
from bench.pool import Slots
from bench.protocol import Protocol
from bench.record import Record
from bench.runs import Run
from bench.spec import Plan, Suite, grid

FAKE = Path(__file__).with_name("fake_bench.py")
MODELS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
CORE = min(os.sched_getaffinity(0))


def machine_of(count: int) -> Machine:
    """GPUs; cores are left alone."""
    return Machine(
        devices=tuple(Device(name=str(each), gpu=f"GPU-{each}") for each in range(count))
    )


def make_run(
    folder: Path,
    *processes: int,
    repeats: int = 1,
    target: float | None = None,
    timeout: float = 60.0,
) -> Run:
    """A run of one cell for each number of processes, each of another model."""
    protocol = Protocol(repeats=repeats, target_interval=target, timeout=timeout)
    cells = [
        cell
        for model, count in zip(MODELS, processes, strict=False)
        for cell in grid([model], ["fp32"], num_processes=count)
    ]
    suite = Suite(name="s", description="", plans=(Plan(protocol=protocol, cells=tuple(cells)),))
    return runs.create(suite, folder)


def present(num_processes: int, *, variables):
    return environment(
        gpu_names=("H200",) * num_processes, side_by_side=int(variables.get(SIDE_BY_SIDE, "1"))
    )


class Watched:
    """Measures nothing, and sees that no device has two jobs; `rules` say when a model's may end.

    A rule is called with the models that have started, in order.
    """

    def __init__(self, **rules) -> None:
        self._rules, self._lock = rules, threading.Lock()
        self.busy: set[str] = set()
        self.started: list[str] = []
        self.ended: list[str] = []
        self.places: dict[str, list[str]] = {}
        self.most = 0

    def __call__(self, job: Job, folder: Path, *, variables, watch) -> Record:
        model = job.task.cell.train.model.label
        gpus = variables["CUDA_VISIBLE_DEVICES"].split(",")
        with self._lock:
            assert len(gpus) == job.task.cell.num_processes
            assert self.busy.isdisjoint(gpus), "two on one device"
            self.busy |= set(gpus)
            self.most = max(self.most, len(self.busy))
            self.started.append(model)
            self.places.setdefault(model, []).append(",".join(gpus))
        try:
            deadline = time.monotonic() + 30
            while not self._rules.get(model, lambda _: True)(self):
                assert time.monotonic() < deadline, "nothing has ended it"
                watch(folder)
                time.sleep(0.002)
        except CancelledError:
            self.ended.append(model)
            raise
        finally:
            with self._lock:
                self.busy -= set(gpus)
        here = present(len(gpus), variables=variables)
        return replace(record_of(job, run_id=job.run_id, suite=job.suite), environment=here)


def all_of(*models: str):
    """A rule: these have started."""
    return lambda launch: {*models} <= {*launch.started}


# --- Who runs when ---


def test_as_many_run_as_there_are_devices_and_never_two_on_one(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path, 1, 1, 1, 1, 1, repeats=4)
    together = all_of(*MODELS[:3])
    launch = Watched(resnet20=together, resnet32=together, resnet44=together)
    records = execute(run, launch=launch, present=present, machine=machine_of(3))
    assert launch.most == 3
    assert [record.key for record in records] == [task.key for task in run.plan.tasks]
    assert run.records() == records, "one writer, whole lines"
    used = Counter(gpu for places in launch.places.values() for gpu in places)
    assert set(used) == {"GPU-0", "GPU-1", "GPU-2"} and sum(used.values()) == 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 40, "one for the start of each and one for its end"
    assert lines[0].startswith("[1/20] ") and lines[0].endswith(" fp32 b64 on 0 ...")
    begun = [line for line in lines if line.endswith("...")]
    ends = [line for line in lines if " ... ok 256 images/s" in line]
    assert len(begun) == len(ends) == 20
    assert {line.partition(" ... ")[0] + " ..." for line in ends} == set(begun)


def test_a_cell_of_several_processes_waits_for_as_many_devices_and_gets_them(tmp_path) -> None:
    run = make_run(tmp_path, 1, 2, 1, 1)
    launch = Watched()
    execute(run, launch=launch, present=present, machine=machine_of(2))
    assert launch.started[:2] == ["resnet20", "resnet32"], "no later one takes its devices"
    assert launch.places["resnet32"] == ["GPU-0,GPU-1"]
    assert launch.most == 2


def test_a_long_cell_holds_back_nobody_who_has_a_device(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 1, 1, 1, 1)
    launch = Watched(resnet20=all_of(*MODELS))
    execute(run, launch=launch, present=present, machine=machine_of(2))
    assert set(launch.places["resnet20"]) == {"GPU-0"}
    assert all(launch.places[model] == ["GPU-1"] for model in MODELS[1:])


def test_records_are_on_disk_before_a_device_is_given_away(tmp_path: Path) -> None:
    run, seen = make_run(tmp_path, 1, 1, 1, 1, 1), []
    launch = Watched()

    def spy(job: Job, folder: Path, **place) -> Record:
        seen.append((len(run.records()), len(launch.started)))
        return launch(job, folder, **place)

    execute(run, launch=spy, present=present, machine=machine_of(2))
    assert all(records >= started - 1 for records, started in seen)


def test_enough_is_enough_on_several_devices_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, repeats=20, target=0.01)
    launch = Watched()
    records = execute(run, launch=launch, present=present, machine=machine_of(2))
    assert 6 <= len(records) <= 7, "at most those that ran when it was known"
    assert execution.missing(run, present=present, machine=machine_of(2)) == []


# --- What is kept ---


def test_a_record_is_as_good_on_another_of_as_many_devices_and_on_no_others(tmp_path) -> None:
    run = make_run(tmp_path, 1, 1)
    execute(run, launch=Watched(), present=present, machine=machine_of(2))
    other = Machine(devices=(Device(name="7", gpu="GPU-7"), Device(name="8", gpu="GPU-8")))
    assert execution.missing(run, present=present, machine=other) == []
    assert execution.missing(run, present=present, machine=machine_of(3)) == [*run.plan.tasks]
    assert execution.missing(run, present=present) == [*run.plan.tasks]


def test_what_stops_one_ends_all_and_keeps_what_had_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 1, 1)
    finished = threading.Event()

    def launch(job: Job, folder: Path, *, variables, watch) -> Record:
        model = job.task.cell.train.model.label
        if model == "resnet20":
            raise KeyboardInterrupt
        if model == "resnet32":
            record = record_of(job)
            finished.set()
            return record
        return slow(job, folder, variables=variables, watch=watch)

    slow = Watched(resnet44=lambda _: False)
    slots = Slots(machine_of(3), launch)
    started = slots.start

    def start(job: Job, folder: Path) -> str | None:
        """The first one's end is met only after the second one has ended."""
        place = started(job, folder)
        if job.task.cell.train.model.label == "resnet44":
            assert finished.wait(30)
            time.sleep(0.05)
        return place

    slots.start = start
    with pytest.raises(KeyboardInterrupt):
        execution.execute_in(slots, run, is_current=lambda record: True)
    assert slow.ended == ["resnet44"]
    assert [record.cell.train.model.label for record in run.records()] == ["resnet32"]


def test_a_folder_that_cannot_be_written_ends_all(tmp_path: Path) -> None:
    def launch(job: Job, folder: Path, *, variables, watch) -> Record:
        if job.task.cell.train.model.label == "resnet20":
            raise OSError(28, "No space left on device")
        return slow(job, folder, variables=variables, watch=watch)

    slow = Watched(resnet32=lambda _: False)
    with pytest.raises(execution.OutputError, match="cannot be written any more"):
        execute(make_run(tmp_path, 1, 1), launch=launch, present=present, machine=machine_of(2))
    assert slow.ended == ["resnet32"]


def test_a_process_that_cannot_be_started_is_no_full_disk(tmp_path: Path) -> None:
    def launch(job: Job, folder: Path, *, variables, watch) -> Record:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with pytest.raises(execution.OutputError, match=r"has no room for another process \(Resource"):
        execute(make_run(tmp_path, 1), launch=launch, present=present, machine=machine_of(1))


# --- Processes ---

TELL = """
import os, sys
from pathlib import Path
told = [sorted(os.sched_getaffinity(0)), os.environ["OMP_NUM_THREADS"],
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["BENCH_SIDE_BY_SIDE"]]
Path(sys.argv[1], "told").write_text(repr(told))
"""


def test_a_cell_s_processes_have_their_place_s_cores_and_devices(tmp_path: Path) -> None:
    def launch(job: Job, folder: Path, **place) -> Record:
        argv = [sys.executable, "-c", TELL, str(folder)]
        return launch_processes(job, folder, argv_for=lambda *_: argv, **place)

    device = Device(name=f"cpu:{CORE}", cores=(CORE,))
    run = make_run(tmp_path, 1)
    (record,) = execute(run, launch=launch, present=present, machine=Machine(devices=(device,)))
    assert record.reason == "ended with exit code 0 but wrote no record"
    told = (run.cell_folder(1, run.plan.tasks[0]) / "told").read_text()
    assert told == repr([[CORE], "1", "", "1"])


def words_of(tmp_path: Path, **variables: str):
    """`bench run` of two cells side by side on this machine's first two cores."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("needs two cores")
    return ["run", "--models", "resnet20,resnet18", "--devices", f"cpu:{usable[0]},cpu:{usable[1]}"]


def started(tmp_path: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(FAKE), *words],
        cwd=tmp_path,
        env=environ(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(tmp_path: Path, process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """The processes that so many hanging cells have started."""
    deadline = time.monotonic() + 60
    while len(found := list(tmp_path.glob("runs/*/cells/*/child"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return [psutil.Process(int(path.read_text())) for path in found]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def lone(tmp_path: Path, monkeypatch):
    """Other tests that run beside this one use the same cores."""
    name = f"cifar-{os.getpid()}-"
    monkeypatch.setenv("FAKE_LOCKS", name)
    return name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_ends_the_run_ends_all_its_cells_and_it_goes_on(tmp_path, lone, number, code) -> None:
    process = started(tmp_path, *words_of(tmp_path), FAKE="hang")
    children = children_of(tmp_path, process, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert all(map(gone, children))
    run = runs.newest(tmp_path / "runs")
    assert run.records() == []
    assert errors.splitlines()[-1].endswith(f"to go on: bench run --resume runs/{run.id}")
    done = bench(tmp_path, "run", "--resume", run.id)
    assert done.returncode == 0, done.stderr
    assert " on cpu:" in done.stderr, "on the devices that it was started for"
    assert statuses(tmp_path) == ["ok", "ok"]


def test_a_second_ctrl_c_gives_no_more_time(tmp_path: Path, lone) -> None:
    process = started(tmp_path, *words_of(tmp_path), FAKE="hang", FAKE_GRACE="60")
    children = children_of(tmp_path, process, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(3.0)
    assert process.poll() is None and not any(map(gone, children)), "it asks them first"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert all(map(gone, children))


def test_no_other_run_measures_on_its_devices_until_it_ends(tmp_path: Path, lone) -> None:
    words = words_of(tmp_path)
    process = started(tmp_path, *words, FAKE="sleep")
    while len(list(tmp_path.glob("runs/*/cells/*/stderr"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    core = words[-1].partition(",")[0].removeprefix("cpu:")
    done = bench(tmp_path, *words[:-1], f"cpu:{core}", "--runs-dir", "other")
    assert done.returncode == 2
    told = f"bench: devices: 'core-{core}': another bench (process {process.pid}) measures"
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
    process.kill()
    process.communicate()
    done = bench(tmp_path, *words[:-1], f"cpu:{core}", "--runs-dir", "other")
    told = f"what a bench that was killed (process {process.pid}) has started still measures on it"
    assert done.returncode == 2 and told in done.stderr
    done = bench(tmp_path, "run", "--resume", runs.newest(tmp_path / "runs").id)
    assert done.returncode == 0, done.stderr
    done = bench(tmp_path, *words[:-1], f"cpu:{core}", "--runs-dir", "other")
    assert done.returncode == 0, done.stderr


def test_a_timeout_or_a_crash_is_its_cell_s_alone(tmp_path: Path, lone) -> None:
    done = bench(
        tmp_path, *words_of(tmp_path), fake="resnet20=sleep,resnet18=crash", FAKE_TIME_UP="1"
    )
    assert done.returncode == 1, done.stderr
    assert statuses(tmp_path) == ["timeout", "failed"]


def test_a_dry_run_shows_the_devices_variables_and_half_the_time(tmp_path: Path) -> None:
    words = words_of(tmp_path)
    done = bench(tmp_path, *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    core = words[-1].partition(",")[0].removeprefix("cpu:")
    assert done.stdout.count(f"OMP_NUM_THREADS=1 taskset --cpu-list {core} ") == 2
    whole = bench(tmp_path, *words[:-2], "--dry-run")
    assert "taskset" not in whole.stdout
    assert whole.stdout.splitlines()[-1] != done.stdout.splitlines()[-1]


# --- Real cells ---


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_real_cells_run_side_by_side_undisturbed_by_each_other(tmp_path: Path) -> None:
    words = [*words_of(tmp_path), "-b", "16", "--timed-steps", "5", "--warmup-steps", "2"]
    words[2] = "resnet20-w4,resnet20-w8"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words, "--inference-batch-sizes", "1"],
        cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = runs.newest(tmp_path / "runs").records()
    cores = [record.environment.cores for record in records]
    assert sorted(f"cpu:{each}" for each in cores) == sorted(words[4].split(","))
    for record in records:
        assert record.environment.side_by_side == 2
        assert record.environment.threads == record.environment.cpu_count == 1
        assert not [why for why in record.invalid if "other processes" in why], record.invalid
        assert record.find("train_energy").reason.startswith("no energy counter: RAPL counts")


@pytest.mark.gpu
def test_a_gpu_is_found_named_and_kept_for_one_run(tmp_path: Path) -> None:
    words = ["run", "--models", "resnet20", "-b", "64", "--timed-steps", "5", "--devices", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = runs.newest(tmp_path / "runs").records()
    (gpu,) = record.environment.gpu_ids
    assert gpu.startswith("GPU-")
    assert record.environment.worker_env["CUDA_VISIBLE_DEVICES"] == gpu
    assert record.effective["device"] == "cuda"
