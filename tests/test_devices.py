"""Devices side by side: what they are called, their cores and variables, and who may use them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
from fake_worker import environment

from bench import commands, cores, devices, nvml
from bench.cores import pinned, read_cores, shares, write_cores
from bench.device_lock import held
from bench.devices import Device, Machine, Place, find_machine
from bench.job import DEVICE, SIDE_BY_SIDE
from bench.present import present_environment
from bench.processes import BLAME_SECONDS, OomKills
from bench.protocol import Protocol
from bench.row_facts import _worker
from bench.spec import Task, grid
from cifar.errors import ConfigError, UserError

ROOT = Path(__file__).parents[1]

# --- Cores ---


def test_cores_are_written_as_the_kernel_does() -> None:
    assert read_cores("0-3,8") == (0, 1, 2, 3, 8)
    assert read_cores("8+0-1", "+") == (0, 1, 8)
    for text in ("0", "0-3,8", "1,3,5-7"):
        assert write_cores(read_cores(text)) == text
    assert write_cores(()) == ""


@pytest.mark.parametrize("text", ["", "a", "3-1", "0,", "-1", "0-99999999", "0x1"])
def test_what_are_no_cores_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        read_cores(text)


def test_a_thread_and_what_it_starts_run_on_its_cores_and_no_other_thread_does() -> None:
    usable = os.sched_getaffinity(0)
    one = min(usable)
    told: list[str] = []

    def start() -> None:
        with pinned([one]):
            code = "import os; print(*os.sched_getaffinity(0))"
            told.append(subprocess.check_output([sys.executable, "-c", code], text=True))
            threads = present_environment_threads()
            told.append(threads)
        assert os.sched_getaffinity(0) == usable

    def present_environment_threads() -> str:
        from bench.launchers import environment_for

        return environment_for(1, {})["OMP_NUM_THREADS"]

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert told == [f"{one}\n", "1"]
    assert os.sched_getaffinity(0) == usable
    with pinned(()):
        assert os.sched_getaffinity(0) == usable


def machine_of(
    tmp_path: Path, monkeypatch, count: int, siblings: str = "", quota: int = 99
) -> Path:
    """A machine of so many cores, core N's other thread being N + half of them if `siblings`."""
    for core in range(count):
        half = count // 2
        text = f"{core % half},{core % half + half}" if siblings else str(core)
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(cores, "usable_cores", lambda: frozenset(range(count)))
    monkeypatch.setattr(cores, "available_cores", lambda root: min(count, quota))
    return tmp_path


ANY: frozenset[int] = frozenset()
LOW, HIGH = frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})


@pytest.mark.parametrize(
    ("machine", "near", "expected"),
    [
        ((8, "", 99), [ANY, ANY], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((8, "yes", 99), [ANY, ANY], [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ((8, "yes", 99), [ANY] * 3, [(0, 4), (1, 5), (2, 6)]),
        ((8, "yes", 99), [ANY] * 8, [(0,), (4,), (1,), (5,), (2,), (6,), (3,), (7,)]),
        ((8, "", 4), [ANY, ANY], [(0, 1), (2, 3)]),
        ((8, "", 99), [HIGH, LOW], [(4, 5, 6, 7), (0, 1, 2, 3)]),
        ((8, "", 99), [HIGH, LOW, HIGH], [(4, 5), (0, 1), (6, 7)]),
        ((8, "", 99), [LOW, frozenset({3, 4})], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((4, "", 99), [LOW, HIGH], [(0, 1), (2, 3)]),
        ((2, "", 99), [ANY] * 3, None),
        ((8, "", 1), [ANY, ANY], None),
    ],
)
def test_cores_are_shared_out_evenly_near_the_devices_and_none_twice(
    tmp_path: Path, monkeypatch, machine, near, expected
) -> None:
    root = machine_of(tmp_path, monkeypatch, *machine)
    assert shares(near, root) == expected


# --- Names ---

H200 = environment(
    gpu_names=("H200",) * 4, gpu_ids=("GPU-a1", "GPU-a2", "GPU-b1", "GPU-c1"), cpu_count=8
)
MIXED = replace(H200, gpu_names=("H200", "H200", "L4", "H200"))
NO_GPU = environment()


@pytest.fixture
def eight(tmp_path: Path, monkeypatch) -> None:
    """A machine with eight cores; what it says of GPUs comes from `present`."""
    machine_of(tmp_path, monkeypatch, 8)
    monkeypatch.setattr(devices, "usable_cores", lambda: frozenset(range(8)))
    monkeypatch.setattr(devices, "near_cores", lambda uuid: frozenset())


def find(words: str, here=H200, **environ: str) -> Machine:
    return find_machine(
        words.split(",") if words else (), present=lambda *_, **__: here, environ=environ
    )


BAD = {
    "devices: '0': is given twice; give each once": ("0,0", H200),
    "devices: '9': there are GPUs 0 to 3 here; give some of those": ("9", H200),
    "devices: '999999': there are GPUs 0 to 3": ("999999", H200),
    "devices: 'x': give numbers of GPUs, such as 0,1, their UUIDs, or groups of cores": ("x", H200),
    "devices: '-1': give numbers": ("-1", H200),
    "devices: '0': there is no GPU here; give cores, such as cpu:0,cpu:1": ("0", NO_GPU),
    "devices: 'GPU-z': is the UUID of no GPU here; see nvidia-smi -L": ("GPU-z", H200),
    "devices: 'GPU-a': is the UUID of no GPU here": ("GPU-a", H200),
    "devices: '0,GPU-a1': are the same GPU": ("0,GPU-a1", H200),
    "devices: '1,2': 1 is H200, 2 is L4: repeats on different models do not": ("1,2", MIXED),
    "devices: 'cpu:0': GPUs and cores do not mix; join cores as cpu:0+2-3": ("cpu:0,1", H200),
    "devices: 'cpu:': give numbers of cores": ("cpu:", NO_GPU),
    "devices: 'cpu:7-8': this process may use the cores 0-7": ("cpu:7-8", NO_GPU),
    "devices: 'cpu:1': has cores of another one": ("cpu:0-1,cpu:1", NO_GPU),
    "devices: 'cpu:0,cpu:1-2': have different numbers of cores": ("cpu:0,cpu:1-2", NO_GPU),
}


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("message", "case"), BAD.items())
def test_what_names_no_devices_is_one_line(message: str, case) -> None:
    with pytest.raises(ConfigError) as info:
        find(*case)
    assert str(info.value).startswith(message)


@pytest.mark.usefixtures("eight")
def test_gpus_have_their_uuid_a_lock_and_a_share_of_the_cores() -> None:
    machine = find("0,GPU-b")
    assert machine == Machine(
        devices=(
            Device(name="0", gpu="GPU-a1", cores=(0, 1, 2, 3)),
            Device(name="GPU-b", gpu="GPU-b1", cores=(4, 5, 6, 7)),
        ),
        locks=("GPU-a1", "GPU-b1"),
    )
    place = machine.first_place(2)
    assert (place.label, place.cores) == ("0,GPU-b", tuple(range(8)))
    assert place.variables == {
        "CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b1",
        SIDE_BY_SIDE: "2",
        DEVICE: "cuda",
    }
    assert [machine.share(count) for count in (1, 2)] == [0.5, 1.0]
    assert find("1,3", MIXED).locks == ("GPU-a2", "GPU-c1"), "of one model"


@pytest.mark.usefixtures("eight")
def test_numbers_count_the_gpus_that_are_visible() -> None:
    shown = find("1,0", CUDA_VISIBLE_DEVICES="5, GPU-x,MIG-7,2")
    assert [device.gpu for device in shown.devices] == ["GPU-x", "5"]
    assert shown.locks == ("GPU-a2", "GPU-a1"), "by what is behind them"


@pytest.mark.usefixtures("eight")
def test_groups_of_cores_hide_the_gpus() -> None:
    machine = find("cpu:0-1+4,cpu:2-3+5")
    assert [device.cores for device in machine.devices] == [(0, 1, 4), (2, 3, 5)]
    assert machine.locks == tuple(f"core-{core}" for core in range(6))
    assert machine.first_place(1).variables == {
        "CUDA_VISIBLE_DEVICES": "",
        SIDE_BY_SIDE: "2",
        DEVICE: "cpu",
    }


@pytest.mark.usefixtures("eight")
def test_threads_that_a_variable_would_pile_up_are_refused() -> None:
    with pytest.raises(ConfigError, match="GOMP_CPU_AFFINITY: '0-7': puts all cells on the same"):
        find("0,1", GOMP_CPU_AFFINITY="0-7")
    assert find("0", GOMP_CPU_AFFINITY="0-7").locks == ("GPU-a1",)


@pytest.mark.usefixtures("eight")
def test_more_devices_than_cores_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda root: 2)
    with pytest.raises(ConfigError, match=r"devices: '0,1,2': this process may use 8 cores, and"):
        find("0,1,2")


def test_the_machine_as_a_whole_is_one_slot_that_no_other_run_may_use(monkeypatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: 0)
    monkeypatch.setattr(devices, "usable_cores", lambda: frozenset({3, 1}))

    def asked(*_: object, **__: object):
        raise AssertionError("a machine without a GPU is not asked for any")

    whole = find_machine((), present=asked)
    assert whole == Machine(locks=("core-1", "core-3")) and whole.slots == (Device(),)
    assert [whole.needs(count) for count in (1, 8)] == [1, 1]
    place = whole.first_place(8)
    assert (place.label, place.cores, place.variables) == ("", (), {})
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: 4)
    found = find_machine((), 2, present=lambda *_, **__: H200)
    assert found == Machine(locks=("GPU-a1", "GPU-a2"))
    blind = find_machine((), 2, present=lambda *_, **__: environment(gpu_names=()))
    assert blind == whole, "a torch that sees none of them measures on the cores"


@pytest.mark.usefixtures("eight")
def test_cells_are_spread_over_gpus_that_are_alike_as_far_as_they_make_whole_ones(
    monkeypatch,
) -> None:
    def spread(processes: int, here=H200, words: tuple[str, ...] = ()) -> list[str]:
        machine = find_machine(
            words, processes, spread=True, present=lambda *_, **__: here, environ={}
        )
        return [device.name for device in machine.devices]

    monkeypatch.setattr(devices, "visible_gpus", lambda environ: 4)
    assert spread(1) == spread(2) == ["0", "1", "2", "3"]
    assert spread(3) == spread(4) == [], "one cell is no reason to choose among GPUs"
    assert spread(1, MIXED) == ["0", "1", "3"], "the other one is of another model"
    assert spread(1, words=("2",)) == ["2"]
    monkeypatch.setattr(devices, "visible_gpus", lambda environ: 0)
    assert spread(1) == []


def test_a_cell_of_more_processes_than_devices_is_refused() -> None:
    machine = Machine(devices=(Device(name="0"), Device(name="1")))
    tasks = [
        Task(cell=cell, protocol=Protocol())
        for count in (1, 4)
        for cell in grid(["resnet20"], ["fp32"], num_processes=count)
    ]
    machine.check(tasks[:1])
    with pytest.raises(ConfigError, match="num-processes: 4: --devices names 2; name as many"):
        machine.check(tasks)
    Machine().check(tasks)


def test_a_place_s_environment_is_asked_for_on_its_cores() -> None:
    one = min(os.sched_getaffinity(0))
    place = Place(devices=(Device(name=f"cpu:{one}", cores=(one,)),), beside=3)
    seen = []

    def present(count: int, *, variables):
        seen.append((count, dict(variables), os.sched_getaffinity(0)))
        return NO_GPU

    assert place.environment(present, 1) is NO_GPU
    assert seen == [(1, {"CUDA_VISIBLE_DEVICES": "", SIDE_BY_SIDE: "3", DEVICE: "cpu"}, {one})]


@pytest.mark.multiprocess
def test_a_worker_tells_its_cores_its_threads_and_its_neighbours() -> None:
    one = max(os.sched_getaffinity(0))
    place = Place(devices=(Device(name=f"cpu:{one}", cores=(one,)),), beside=3)
    found = place.environment(present_environment, 1)
    told = (found.cores, found.threads, found.cpu_count, found.side_by_side, found.gpu_names)
    assert told == (str(one), 1, 1, 3, ())


# --- What of it makes records comparable ---


def test_which_of_equal_devices_it_was_does_not_matter_but_how_many_were_in_use() -> None:
    def on(gpu: str, cores: str, count: int = 2):
        return environment(
            gpu_names=("H200",),
            gpu_ids=(gpu,),
            cores=cores,
            side_by_side=count,
            worker_env={"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "4"},
        )

    first = on("GPU-a", "0-3")
    assert first.key() == on("GPU-b", "4-7").key()
    assert first.key() != on("GPU-a", "0-3", 4).key()
    assert first.key() != replace(first, gpu_names=("L4",)).key()
    assert _worker(first) == "1 thread OMP_NUM_THREADS=4, 2 devices side by side"
    assert _worker(replace(first, side_by_side=1)) == "1 thread OMP_NUM_THREADS=4"


# --- One measurement on a device ---

HOLD = """
import sys, time
from bench.device_lock import held
with held(sys.argv[1:]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_device_is_held_until_its_holder_ends_in_whatever_way() -> None:
    name = f"test-{os.getpid()}"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{name}-0", f"{name}-1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        told = rf"devices: '{name}-1': another bench \(process {process.pid}\) measures on it"
        for _ in range(3):
            with pytest.raises(UserError, match=told), held([f"{name}-1", f"{name}-2"]):
                pass
        with held([f"{name}-2"]):
            pass  # not taken by those who could not have the other one
        process.send_signal(signal.SIGKILL)
    with held([f"{name}-0", f"{name}-1", f"{name}-1"]):
        pass


LEAVE = """
import subprocess, sys, time
from bench.device_lock import descriptors, held
with held(sys.argv[2:]):
    subprocess.Popen(["sleep", sys.argv[1]], pass_fds=descriptors())
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_what_a_killed_holder_has_left_is_given_time_to_end() -> None:
    name = f"test-{os.getpid()}"
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE, "1.0", name],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGKILL)
        with held([name]):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
@pytest.mark.parametrize(
    "words",
    [
        ["run", "--models", "resnet20"],
        ["frontier", "--models", "resnet20"],
        ["search", "sgd", "--model", "resnet20"],
        ["selfcheck"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_measures_keeps_its_devices_for_itself(
    words, tmp_path, monkeypatch, capsys
) -> None:
    name = f"test-{os.getpid()}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "find_machine", lambda *_, **__: Machine(locks=(name,)))
    with held([name]):
        assert commands.main(words) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"bench: devices: {name!r}: another bench") and not told.out
    assert not list(tmp_path.iterdir()), "nothing has begun"


# --- NVML ---


def fake_nvml(**answers: object) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetCpuAffinity = lambda handle, words: [0b1010, 1][:words] + [0] * (words - 2)
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module


def test_nvml_tells_which_cores_are_near(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert nvml.near_cores("GPU-a") == {1, 3, 64}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.near_cores("GPU-a") == frozenset()
    broken = fake_nvml()

    def refuse(*_: object) -> None:
        raise broken.NVMLError("Not Supported")

    broken.nvmlDeviceGetCpuAffinity = refuse
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert nvml.near_cores("GPU-a") == frozenset()


# --- Kills for lack of memory ---


def test_a_kill_is_blamed_on_one_cell_that_ran_then(monkeypatch) -> None:
    now, total = [1000.0], [7]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kills = OomKills(lambda: total[0])

    def later(seconds: float) -> None:
        now[0] += seconds

    first, second = kills.mark(), kills.mark()
    later(5)
    assert kills.claim(first) == 0, "those before it started"
    total[0] += 1
    later(5)
    assert (kills.claim(second), kills.claim(first)) == (1, 0), "whoever ends first"
    total[0] += 2
    later(5)
    third = kills.mark()
    assert kills.claim(third) == 0, "they were killed before it"
    later(BLAME_SECONDS - 1)
    assert kills.claim(first) == 1
    later(2)
    assert kills.claim(first) == 0, "too long ago"
