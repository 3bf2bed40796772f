"""Launching: commands and environments, what becomes of broken workers, and why they broke."""

import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from fake_worker import DATA, record_of, time_is_up

from bench import launchers
from bench.failure import classify
from bench.job import Job
from bench.launchers import argv_for, check_launcher, environment_for, launch
from bench.protocol import Protocol
from bench.spec import Task, grid
from bench.unfinished import explained, is_unfinished, unfinished
from cifar import process
from cifar.errors import ConfigError
from cifar.serialize import from_json, to_json

FAKE = Path(__file__).with_name("fake_worker.py")


def make_job(model="resnet20", timeout=60.0, num_processes=1, repeat=0):
    (cell,) = grid([model], ["fp32"], num_processes=num_processes)
    task = Task(cell=cell, protocol=Protocol(timeout=timeout), repeat=repeat)
    return Job(task=task, suite="quick", run_id="run-1")


def fake_argv(cell, folder):
    return [sys.executable, str(FAKE), str(folder)]


def launch_fake(monkeypatch, folder, what, **options):
    monkeypatch.setenv("FAKE", what)
    return launch(make_job(**options), folder, argv_for=fake_argv, grace=0.3, watch=time_is_up)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- Commands, yamls, environments ---


def test_the_command_is_accelerate_launch_of_the_worker():
    (cell,) = grid(["resnet20"], ["fp32"], num_processes=2)
    argv = argv_for(cell, Path("folder"))
    assert argv[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert argv[-3:] == ["-m", "bench.worker", "folder"]
    options = dict(zip(argv[3:-3:2], argv[4:-3:2], strict=True))
    assert Path(options.pop("--config_file")).name == "ddp.yaml"
    assert options == {
        "--num_processes": "2",
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
        "--main_process_port": "0",
    }


def test_one_process_is_started_without_process_group():
    (cell,) = grid(["resnet20"], ["fp32"])
    assert any(word.endswith("single.yaml") for word in argv_for(cell, Path("folder")))


def test_every_yaml_leaves_processes_and_precision_to_the_command_line():
    files = sorted(Path(launchers.__file__).parents[1].joinpath("launch").glob("*.yaml"))
    assert files
    for path in files:
        keys = yaml.safe_load(path.read_text()).keys()
        assert not keys & {"num_processes", "mixed_precision", "downcast_bf16", "gpu_ids"}, path


def test_an_unknown_launcher_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"launcher: 'dpp': choose one of ddp"):
        check_launcher("dpp")


def test_workers_share_the_cores_and_the_user_wins(monkeypatch):
    monkeypatch.setattr(process, "available_cores", lambda: 8)
    assert process.worker_environment(3, {})["OMP_NUM_THREADS"] == "2"
    assert process.worker_environment(99, {})["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "5", "MALLOC_TOP_PAD_": "1", "HOME": "/home/x"}
    environment = process.worker_environment(3, chosen)
    assert environment.items() >= chosen.items()
    assert environment["GOMP_SPINCOUNT"] == "100000"
    recorded = process.recorded_environment(environment)
    assert recorded["OMP_NUM_THREADS"] == "5"
    assert recorded.keys() >= process.MALLOC.keys()
    assert "HOME" not in recorded


FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_kept_and_not_faulted_in_again():
    def faults(settings):
        bare = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        argv, environ = [sys.executable, "-c", FAULTS], bare | settings
        return int(subprocess.run(argv, env=environ, capture_output=True, check=True).stdout)

    pages = 20 * (8 << 20) // resource.getpagesize()
    assert faults(process.MALLOC) < pages / 100
    assert faults({"MALLOC_TRIM_THRESHOLD_": "4294967296"}) > pages / 2


AGE = "import os, time; print(time.monotonic() - float(os.environ['BENCH_LAUNCHED']))"


def test_a_job_knows_when_it_was_launched(tmp_path):
    folder = tmp_path / "job"
    record = launch(make_job(), folder, argv_for=lambda *_: [sys.executable, "-c", AGE])
    assert 0 < float((folder / "stdout").read_text()) < record.duration_s


def test_accelerate_is_told_by_the_command_alone():
    base = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "HOME": "/home/x"}
    environment = environment_for(1, base)
    assert not [name for name in environment if name.startswith("ACCELERATE_")]
    assert environment["HOME"] == "/home/x"


def test_what_a_process_lacks_of_the_chosen_settings_is_told(monkeypatch):
    """As under accelerate launch with one process, which gives it one thread."""
    monkeypatch.setattr(process, "available_cores", lambda: 8)
    assert process.differences(process.worker_environment(1, {"HOME": "/home/x"})) == []
    shared = process.worker_environment(2, {"LOCAL_WORLD_SIZE": "2"})
    assert process.differences(shared) == []
    given = {**process.worker_environment(1, {}), "OMP_NUM_THREADS": "1", "MALLOC_TOP_PAD_": "1"}
    del given["GOMP_SPINCOUNT"]
    assert process.differences(given) == [
        "MALLOC_TOP_PAD_=1 (bench: 67108864)",
        "GOMP_SPINCOUNT unset (bench: 100000)",
        "OMP_NUM_THREADS=1 (bench: 8)",
    ]


def test_settings_of_the_compilers_are_recorded_and_places_are_not():
    environ = {
        "TRITON_CACHE_DIR": "/a", "TRITON_HOME": "/b", "TORCHINDUCTOR_CACHE_DIR": "/c",
        "TRITON_PTXAS_PATH": "/d", "TRITON_F32_DEFAULT": "tf32", "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
        "OMP_NUM_THREADS": "2", "MY_TRITON_": "",
    }  # fmt: skip
    assert list(process.recorded_environment(environ).items()) == [
        ("OMP_NUM_THREADS", "2"),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
        ("TRITON_F32_DEFAULT", "tf32"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA",
        "OMP_DYNAMIC", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_CBWR", "NCCL_BUFFSIZE",
        "PYTORCH_ALLOC_CONF", "LD_PRELOAD", "CXX", "CUDA_VISIBLE_DEVICES",
    ],
)  # fmt: skip
def test_what_changes_how_a_process_computes_is_recorded(name):
    assert process.recorded_environment({name: "1", "HOME": "/home/x"}) == {name: "1"}


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_COMM_ID", "NCCL_DEBUG_FILE", "NCCL_HOME",
        "BENCH_JOB", "KMP_INIT_AT_FORK", "CUDA_VERSION", "XOMP_NUM_THREADS", "CXXFLAGS",
    ],
)  # fmt: skip
def test_what_differs_between_launches_or_changes_nothing_is_not_recorded(name):
    assert process.recorded_environment({name: "1"}) == {}


def test_the_recorded_variables_are_in_order_of_their_names():
    environ = {"TRITON_F32_DEFAULT": "tf32", "CC": "gcc", "OMP_NUM_THREADS": "2"}
    assert list(process.recorded_environment(environ)) == sorted(environ)


RESTART = """
import os, sys
from cifar.process import MALLOC, ensure_environment
print("start", os.getpid(), sys.argv[1:], flush=True)
ensure_environment()
print("settled", {name: os.environ.get(name) for name in MALLOC}, os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the malloc settings are glibc's")
def test_a_program_started_by_hand_restarts_itself_once(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(RESTART)
    bare = {k: v for k, v in os.environ.items() if k not in process.MALLOC}
    bare |= {"PYTHONPATH": f"{tmp_path}:{FAKE.parents[1]}", "OMP_NUM_THREADS": "3"}
    argv = [sys.executable, "-m", "program", "a b", "--c"]
    done = subprocess.run(argv, env=bare, capture_output=True, text=True, check=True)
    first, second, settled = done.stdout.splitlines()
    assert first == second, "same process id and arguments before and after"
    assert first.endswith("['a b', '--c']")
    assert settled == f"settled {process.MALLOC} 3"
    done = subprocess.run(
        argv, env=bare | process.MALLOC, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("start") == 1


INTERRUPTED = """
import os, signal, sys
from cifar import process
execve = os.execve
def interrupted(*words):
    os.kill(os.getpid(), signal.SIGINT)
    execve(*words)
os.execve = interrupted
try:
    process.ensure_environment()
except KeyboardInterrupt:
    print("restarted" if process._RESTARTED in os.environ else "at once")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the malloc settings are glibc's")
def test_ctrl_c_waits_until_a_program_has_restarted_itself(tmp_path):
    (tmp_path / "program.py").write_text(INTERRUPTED)
    bare = {k: v for k, v in os.environ.items() if k not in process.MALLOC}
    bare |= {"PYTHONPATH": f"{tmp_path}:{FAKE.parents[1]}"}
    done = subprocess.run(
        [sys.executable, "-m", "program"], env=bare, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("restarted\n", "")


# --- What becomes of workers ---


def test_a_good_record_is_completed_by_the_launcher(tmp_path, monkeypatch):
    record = launch_fake(monkeypatch, tmp_path, "ok", repeat=2)
    assert (record.status, record.reason, record.returncode) == ("ok", "", 0)
    assert (record.suite, record.run_id, record.repeat) == ("quick", "run-1", 2)
    assert record.key == make_job(repeat=2).task.key
    assert record.duration_s > 0
    assert record.started != "2026-01-01T00:00:00+00:00"
    assert record.value("train_throughput") == 256.0
    assert {"cell.json", "record.json", "stdout", "stderr"} <= {p.name for p in tmp_path.iterdir()}


CACHING = """
import os, sys
from pathlib import Path
cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
triton = os.environ["TRITON_CACHE_DIR"]
Path(sys.argv[1], "seen").write_text(f"{cache.exists()} {cache} {triton}")
cache.mkdir()
(cache / "kernel").touch()
"""


def test_every_attempt_compiles_into_an_empty_cache_which_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "warm"))
    (tmp_path / "compile-cache").mkdir()
    (tmp_path / "compile-cache" / "left by an attempt that was killed").touch()
    launch(make_job(), tmp_path, argv_for=lambda _, folder: [sys.executable, "-c", CACHING, folder])
    cache = tmp_path / "compile-cache"
    assert (tmp_path / "seen").read_text() == f"False {cache} {cache / 'triton'}"
    assert not (tmp_path / "compile-cache").exists()


@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [
        ("crash", "failed", "ValueError: the worker broke"),
        ("oom", "oom", "MemoryError: no room"),
        ("exit4", "failed", "exit code 4 without a message"),
        ("nothing", "failed", "ended with exit code 0 but wrote no record"),
        ("garbage", "failed", "unreadable record.json: "),
        ("unknown-key", "failed", "unreadable record.json: record.json: color: "),
        ("other-cell", "failed", "record.json is of another cell: resnet20 fp32 b64"),
        ("unsupported", "unsupported", "no such unit"),
        ("ok-exit3", "ok", "exit code 3, after the record was written"),
        ("unsupported-exit1", "unsupported", "no such unit; exit code 1, after the record was"),
        ("told-exit4", "failed", "wrong dtype; exit code 4, after the record was written"),
        ("told-exit0", "failed", "wrong dtype; exit code 0, after the record was written"),
    ],
)
def test_every_ending_is_a_record_with_a_reason(tmp_path, monkeypatch, what, status, reason):
    record = launch_fake(monkeypatch, tmp_path, what)
    assert record.status == status
    assert record.reason.startswith(reason)
    assert "\n" not in record.reason
    assert record.key == make_job().task.key


def test_a_failure_that_a_worker_tells_in_its_record_needs_no_more_words(tmp_path, monkeypatch):
    record = launch_fake(monkeypatch, tmp_path, "told-exit1")
    assert (record.status, record.reason, record.returncode) == ("failed", "wrong dtype", 1)


def test_a_hanging_worker_and_its_children_are_ended(tmp_path, monkeypatch):
    record = launch_fake(monkeypatch, tmp_path, "hang", timeout=60.0)
    assert (record.status, record.reason) == ("timeout", "stopped after 60 s")
    assert gone(int((tmp_path / "child").read_text()))


def test_a_record_written_before_hanging_counts(tmp_path, monkeypatch):
    record = launch_fake(monkeypatch, tmp_path, "ok-hang", timeout=60.0)
    assert record.status == "ok"
    assert record.reason == "stopped after 60 s, after the record was written"


def test_a_child_that_outlives_its_worker_is_ended(tmp_path, monkeypatch):
    record = launch_fake(monkeypatch, tmp_path, "orphan")
    assert record.reason == "ended with exit code 0 but wrote no record"
    assert gone(int((tmp_path / "child").read_text()))


def test_ctrl_c_ends_the_worker_and_goes_on_up(tmp_path, monkeypatch):
    def interrupt():
        while not (tmp_path / "child").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    monkeypatch.setenv("FAKE", "hang")
    with pytest.raises(KeyboardInterrupt):
        launch(make_job(), tmp_path, argv_for=fake_argv, grace=0.3)
    thread.join()
    assert gone(int((tmp_path / "child").read_text()))


def test_leftovers_of_an_earlier_attempt_do_not_count(tmp_path, monkeypatch):
    launch_fake(monkeypatch, tmp_path, "ok")
    (tmp_path / ".record.json.1.tmp").write_text("{")
    assert launch_fake(monkeypatch, tmp_path, "crash").status == "failed"
    assert not (tmp_path / ".record.json.1.tmp").exists()


def test_waiting_leaves_the_cores_to_the_worker(tmp_path, monkeypatch):
    """Until their time is up; to find their children then takes as long as there are processes."""
    spent, end = [], launchers.end

    def ending(*args):
        spent.append((time.process_time() - cpu, time.monotonic() - wall))
        return end(*args)

    monkeypatch.setattr(launchers, "end", ending)
    monkeypatch.setenv("FAKE", "hang")
    wall, cpu = time.monotonic(), time.process_time()
    launch(make_job(timeout=4.0), tmp_path, argv_for=fake_argv, grace=0.3)
    assert spent[0][0] < 0.1 * spent[0][1]


def test_a_job_is_read_as_it_was_written():
    job = make_job("resnet18-w16", num_processes=2, repeat=1)
    assert from_json(Job, to_json(job)) == job


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("later-crash", "ValueError: the worker broke"),
        ("later-oom", "MemoryError: no room"),
        ("later-sleep", "stopped after 60 s"),
    ],
)
def test_what_breaks_after_the_training_costs_itself_alone(tmp_path, monkeypatch, what, why):
    record = launch_fake(monkeypatch, tmp_path, what, timeout=60.0)
    assert (record.status, record.reason) == ("ok", f"not measured: inference, anatomy; {why}")
    assert record.value("train_throughput") == 256.0
    for name in ("inference", "anatomy"):
        assert (record.find(name).status, record.find(name).reason) == ("failed", why)
    assert not is_unfinished(record)


def test_a_note_keeps_what_the_record_said_itself():
    job = make_job()
    record = record_of(job, status="failed", reason="autocast: off where bfloat16 was asked")
    known = unfinished(record, ["inference"])
    told = explained(known, "oom", "killed")
    assert (told.status, told.reason) == (
        *("failed", f"{record.reason}; not measured: inference; killed"),
    )
    assert explained(record, "oom", "killed").measurements == record.measurements


@pytest.mark.parametrize(
    ("what", "status", "why"),
    [
        ("early-crash", "failed", "ValueError: the worker broke"),
        ("early-exit0", "failed", "ended with exit code 0 but wrote no record"),
        ("early-oom", "oom", "MemoryError: no room"),
        ("early-sleep", "timeout", "stopped after 60 s"),
    ],
)
def test_what_breaks_before_the_training_tells_where_and_of_what(
    tmp_path, monkeypatch, what, status, why
):
    record = launch_fake(monkeypatch, tmp_path, what, timeout=60.0)
    assert (record.status, record.reason, record.measurements) == (status, why, ())
    assert record.environment.cpu_count == 2
    assert record.data == DATA


# --- Under Accelerate ---

TOY = """
import os, sys, time
from pathlib import Path
rank = os.environ.get("RANK", "alone")
from cifar.process import recorded_environment
Path(sys.argv[1], "recorded").write_text(repr(recorded_environment(os.environ)))
settings = [os.environ.get(name, "") for name in ("WORLD_SIZE", "OMP_NUM_THREADS")]
Path(sys.argv[1], rank).write_text(" ".join([*settings, os.environ["MALLOC_TOP_PAD_"]]))
if rank == "1":
    first = Path(sys.argv[1], "0")
    while not (first.exists() and first.read_text()):  # or the launcher ends rank 0 before that
        time.sleep(0.05)
    raise ValueError("rank 1 broke")
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [1, 2])
def test_accelerate_starts_the_processes_that_were_asked_for(tmp_path, monkeypatch, num_processes):
    (tmp_path / "toy_worker.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{FAKE.parents[1]}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launchers, "WORKER", "toy_worker")
    monkeypatch.setattr(process, "available_cores", lambda: 6)
    record = launch(make_job(num_processes=num_processes), tmp_path)
    asked = process.worker_environment(num_processes, os.environ)
    recorded = repr(process.recorded_environment(asked))
    assert (tmp_path / "recorded").read_text() == recorded, "or no record would be used again"
    pad = process.MALLOC["MALLOC_TOP_PAD_"]
    if num_processes == 1:
        assert (tmp_path / "alone").read_text() == f" 6 {pad}"
        assert record.reason == "ended with exit code 0 but wrote no record"
    else:
        assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == f"2 3 {pad}"
        assert (record.status, record.reason) == ("failed", "ValueError: rank 1 broke")


ONE_SIDED = """
import sys
from pathlib import Path
from bench import worker
from cifar.process import run_to_end

def one_sided(subject):
    if subject.trainer.place.index == 1:
        raise RuntimeError("only here")
    yield subject.measurement("collective", "s", "lower", [1.0])

worker.BASIC = {"flops": worker.BASIC["flops"], "one_sided": one_sided}
sys.exit(run_to_end(lambda: worker.main(Path(sys.argv[1]))))
"""


@pytest.mark.multiprocess
def test_a_rank_that_breaks_alone_leaves_the_record_of_the_training(tmp_path, monkeypatch):
    """The other one waits for it in a collective call meanwhile."""
    (tmp_path / "one_sided.py").write_text(ONE_SIDED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{FAKE.parents[1]}")
    monkeypatch.setattr(launchers, "WORKER", "one_sided")
    protocol = Protocol(warmup_steps=0, timed_steps=2, timeout=120.0)
    (cell,) = grid(["resnet20-w4"], ["fp32"], batch_sizes=(16,), num_processes=2)
    record = launch(Job(task=Task(cell=cell, protocol=protocol)), tmp_path)
    why = "RuntimeError: only here"
    assert (record.status, record.reason) == ("ok", f"not measured: one_sided; {why}")
    assert len(record.find("train_throughput").samples) == 2
    assert record.find("train_flops").status == "ok"
    assert record.find("one_sided").reason == why
    assert record.effective["num_processes"] == 2


FULL = """
import os
import sys
from pathlib import Path
import torch
from bench import worker
from cifar.process import run_to_end
from cifar.trainer import Trainer

original = Trainer.train_step
def train_step(self):
    original(self)
    if self.step == 2 and self.place.index == 1:
        FAULT
Trainer.train_step = train_step
sys.exit(run_to_end(lambda: worker.main(Path(sys.argv[1]))))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        (
            "torch.empty(2**60, dtype=torch.uint8)",
            "oom",
            "process 1: RuntimeError: .*DefaultCPUAllocator",
        ),
        ("os.kill(os.getpid(), 9)", "failed", "process 1 was killed by signal 9"),
    ],
)
def test_a_rank_that_dies_is_told_in_the_record(tmp_path, monkeypatch, fault, status, reason):
    """And no other waits for it: the cell may take two minutes."""
    (tmp_path / "full.py").write_text(FULL.replace("FAULT", fault))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{FAKE.parents[1]}")
    monkeypatch.setattr(launchers, "WORKER", "full")
    protocol = Protocol(warmup_steps=0, timed_steps=2, timeout=120.0)
    (cell,) = grid(["resnet20-w4"], ["fp32"], batch_sizes=(16,), num_processes=2)
    record = launch(Job(task=Task(cell=cell, protocol=protocol)), tmp_path)
    assert record.status == status
    assert re.match(reason, record.reason)
    assert record.environment is not None and record.data is not None


START = """
import subprocess, sys
subprocess.run([sys.executable, "-m", "bench.worker", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_ends_with_its_launcher(tmp_path):
    """It reads its cell from a pipe here, and so waits for this test."""
    os.mkfifo(tmp_path / "cell.json")
    environment = {**os.environ, "PYTHONPATH": str(FAKE.parents[1])}
    words = [sys.executable, "-c", START, tmp_path]
    with (
        subprocess.Popen(words, env=environment) as launcher,
        (tmp_path / "cell.json").open("w"),
    ):
        (worker,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        assert psutil.wait_procs([worker], timeout=20) == ([worker], [])


# --- Causes ---

LAUNCHER_TAIL = """\
E1121 07:58:12.263000 5545 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code}) local_rank: 1 (pid: 5550) of binary: python
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "accelerate/commands/launch.py", line 1029, in multi_gpu_launcher
    distrib_run.run(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
============================================================
bench.worker FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_07:58:12
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 5550) {signal}
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""  # noqa: E501, W291 - as torchrun prints it

SIMPLE_TAIL = """\
Traceback (most recent call last):
  File "accelerate/commands/launch.py", line 999, in simple_launcher
    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)
subprocess.CalledProcessError: Command '['python', '-m', 'bench.worker']' {how}.
"""


def torchrun(text="", code=1, rank=1, signal_name=""):
    return text + LAUNCHER_TAIL.format(code=code, rank=rank, signal=signal_name)


def killed_beside(text, code):
    """The launcher saw rank 0 fail first, and then that a signal had ended rank 1."""
    end = f"[1]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : {code} (pid: 7)"
    return torchrun(text, rank=0).replace("  <NO_OTHER_FAILURES>", end)


def simple(text="", how="returned non-zero exit status 1"):
    return text + SIMPLE_TAIL.format(how=how)


def traceback(message, rank=None):
    lines = [
        "Traceback (most recent call last):",
        '  File "worker.py", line 7, in <module>',
        "    raise MemoryError if full else error",
        "          ^^^^^^^^^^^",
        message,
    ]
    prefix = "" if rank is None else f"[rank{rank}]: "
    return "".join(f"{prefix}{line}\n" for line in lines)


CHAINED = (
    traceback("KeyError: 'a'")
    + "\nDuring handling of the above exception, another exception occurred:\n\n"
    + traceback("RuntimeError: what the program said")
)
PEER = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
CUDA = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
    "capacity of 79.10 GiB of which 1.2 GiB is free."
)
COMPILER = (
    "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:\n"
    "InvalidCxxCompiler: No working C++ compiler found"
)


@pytest.mark.parametrize(
    ("stderr", "status", "reason"),
    [
        (traceback("ValueError: bad"), "failed", "ValueError: bad"),
        (CHAINED, "failed", "RuntimeError: what the program said"),
        (simple(traceback("ValueError: bad")), "failed", "ValueError: bad"),
        (torchrun(traceback("ValueError: bad", rank=1)), "failed", "ValueError: bad"),
        (
            torchrun(traceback("ValueError: bad", rank=1) + traceback(PEER, rank=0)),
            "failed",
            "ValueError: bad",
        ),
        (
            torchrun(traceback(PEER, rank=0) + traceback("ValueError: bad", rank=1)),
            "failed",
            "ValueError: bad",
        ),
        (  # seen together, so the launcher names the first of them
            torchrun(traceback(PEER, rank=0) + traceback("ValueError: bad", rank=1), rank=0),
            "failed",
            "ValueError: bad",
        ),
        (torchrun(traceback(PEER, rank=0), rank=0), "failed", PEER),
        (
            simple(traceback(COMPILER)),
            "failed",
            "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised: "
            "InvalidCxxCompiler: No working C++ compiler found",
        ),
        (
            simple("warning: something\nbench.worker: data: no such folder\n"),
            "failed",
            "bench.worker: data: no such folder",
        ),
        (
            torchrun(traceback(CUDA, rank=1) + traceback(PEER, rank=0)),
            "oom",
            f"process 1: {CUDA}",
        ),
        (
            torchrun(traceback(PEER, rank=0) + traceback(CUDA, rank=1), rank=0),
            "oom",
            f"process 1: {CUDA}",
        ),
        (
            torchrun(
                "terminate called after throwing an instance of 'std::bad_alloc'\n",
                code=-6,
                signal_name=" (SIGABRT)",
            ),
            "oom",
            "process 1: terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        (
            torchrun(
                "cifar: timeout: rank 1 (node7, pid 9) has not come since step 12 (600 s ago) and "
                "does not answer; continue from the last checkpoint with --resume\n"
                + traceback(PEER, rank=2),
                code=3,
                rank=0,
            ),
            "failed",
            "rank 1 (node7, pid 9) has not come since step 12 (600 s ago) and does not answer",
        ),
        (
            simple(traceback("RuntimeError: CUDA error: out of memory")),
            "oom",
            "RuntimeError: CUDA error: out of memory",
        ),
        (
            simple(
                traceback(
                    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: "
                    "can't allocate memory: you tried to allocate 4000000000000 bytes."
                )
            ),
            "oom",
            "RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 4000000000000 bytes.",
        ),
        (
            simple(
                traceback(
                    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7 TiB for an "
                    "array"
                )
            ),
            "oom",
            "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7 TiB for an array",
        ),
        (traceback("MemoryError"), "oom", "MemoryError"),
        (
            simple(
                "terminate called after throwing an instance of 'std::bad_alloc'\n"
                "  what():  std::bad_alloc\n",
                "died with <Signals.SIGABRT: 6>",
            ),
            "oom",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        (
            torchrun(code=-9, signal_name=" (SIGKILL)"),
            "failed",
            "process 1 was killed by signal 9 (out of memory?)",
        ),
        (
            simple(how="died with <Signals.SIGKILL: 9>"),
            "failed",
            "killed by signal 9 (out of memory?)",
        ),
        (
            simple("Fatal Python error: Segmentation fault\n", "died with <Signals.SIGSEGV: 11>"),
            "failed",
            "killed by signal 11 (SIGSEGV): Fatal Python error: Segmentation fault",
        ),
        (
            torchrun(
                "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n"
                "  what():  [enforce fail at pair.cc:464] op.preamble.length <= op.nbytes.\n"
                + traceback(PEER, rank=0),
                code=-6,
                signal_name=" (SIGABRT)",
            ),
            "failed",
            "process 1 was killed by signal 6 (SIGABRT): what(): [enforce fail at pair.cc:464] "
            "op.preamble.length <= op.nbytes.",
        ),
        (
            torchrun("bench.worker: no folder\n").replace(
                "<NO_OTHER_FAILURES>", "[1]:\n  rank : 0\n  exitcode  : -15 (pid: 7)  (SIGTERM)"
            ),
            "failed",
            "bench.worker: no folder",
        ),
        (
            torchrun(traceback(PEER, rank=0), code=-9, signal_name=" (SIGKILL)"),
            "failed",
            "process 1 was killed by signal 9 (out of memory?)",
        ),
        (
            killed_beside(traceback(PEER, rank=0), -9),
            "failed",
            "process 1 was killed by signal 9 (out of memory?)",
        ),
        (killed_beside(traceback(PEER, rank=0), -15), "failed", PEER),
        (killed_beside(traceback("ValueError: bad", rank=0), -6), "failed", "ValueError: bad"),
        (traceback("ValueError: " + "x" * 1000), "failed", "ValueError: " + "x" * 285 + "..."),
    ],
)
def test_the_cause_is_found_in_stderr(stderr, status, reason):
    assert classify(1, stderr) == (status, reason)


def test_a_kill_is_out_of_memory_only_with_the_kernels_word_for_it():
    assert classify(-9, "") == ("failed", "killed by signal 9 (out of memory?)")
    status, reason = classify(-9, "", oom_kills=1)
    assert status == "oom"
    assert "killed by the kernel" in reason
    which = "process 1 was killed by the kernel"
    assert classify(1, torchrun(code=-9), oom_kills=1)[1].startswith(which)
    for text in (
        torchrun(traceback(PEER, rank=0), code=-9),
        killed_beside(traceback(PEER, rank=0), -9),
    ):
        found = classify(1, text, oom_kills=1)
        assert found[0] == "oom" and found[1].startswith(which)
    assert classify(1, traceback("ValueError: bad"), oom_kills=1)[0] == "failed"
    assert classify(-11, "", oom_kills=1) == ("failed", "killed by signal 11 (SIGSEGV)")


def test_a_worker_that_kills_itself_is_reported_with_its_signal(tmp_path, monkeypatch):
    record = launch_fake(monkeypatch, tmp_path, "sigkill")
    assert record.returncode == -signal.SIGKILL
    assert record.reason.startswith("killed by")
