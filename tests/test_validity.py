"""What disturbs a timed window: counters read from made-up systems, limits, reasons, all ranks."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from training import ROOT, make_trainer, tiny_recipe

from bench import counters, environment, nvml
from bench.counters import Counters, read_counters
from bench.measure import monitor, training, utilization
from bench.measure.anatomy import measure_anatomy
from bench.measure.clock import HostClock
from bench.measure.inference import measure_inference
from bench.measure.monitor import CollectorClock, Monitor, gpu_fields
from bench.measure.subject import Metric, Subject
from bench.measure.utilization import measure_utilization
from bench.nvml import Gpu, GpuState, NvmlError, other_processes
from bench.protocol import Protocol
from bench.record import Measurement
from bench.validity import CPU_WATCHES, GPU_WATCHES, Window, judge, measure, together
from cifar.process import available_cores

TICK = 1 / os.sysconf("SC_CLK_TCK")
CPU = torch.device("cpu")

QUIET = Window(
    place=1.0, seconds=2.0, cores=2.0, available=2.0, capacity=4.0, busy=2.1, stolen=0.0, own=2.0,
    throttled=0.0, cooled=0.0, major_faults=0.0, switches=900.0, collecting=0.0, gpu_others=0.0,
    gpu_thermal=0.0, gpu_power_cap=0.0, gpu_power_brake=0.0, gpu_slowdown=0.0,
    gpu_clock_before=1.98e9, gpu_clock_after=1.98e9, gpu_temperature=61.0, gpu_retries=0.0,
)  # fmt: skip
"""Two cores for two seconds, one of them used by the job and a fortieth of both by others."""


# --- Counters ---


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


STAT = """\
cpu  9999 9999 9999 9999 9999 9999 9999 9999 0 0
cpu0 100 10 20 1000 30 4 6 7 50 0
cpu1 200 20 30 2000 40 5 5 8 0 0
cpu2 5000 0 0 0 0 0 0 0 0 0
intr 12345
"""


def test_the_time_of_usable_cores_is_added_up_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "usable_cores", lambda: frozenset({0, 1}))
    write(tmp_path, "proc/stat", STAT)
    found = read_counters(tmp_path)
    busy = (100 + 10 + 20 + 4 + 6) + (200 + 20 + 30 + 5 + 5)
    assert found.busy == pytest.approx(busy * TICK)
    assert found.stolen == pytest.approx((7 + 8) * TICK)
    assert found.capacity == pytest.approx((busy + 1000 + 30 + 7 + 2000 + 40 + 8) * TICK)


def test_what_a_system_does_not_count_is_not_a_number(tmp_path: Path) -> None:
    found = read_counters(tmp_path)
    unknown = (found.capacity, found.busy, found.stolen, found.throttled, found.cooled)
    assert all(math.isnan(value) for value in unknown)
    assert found.own > 0


def test_quotas_of_all_groups_around_this_process_count(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/job/inner\n")
    write(tmp_path, "sys/fs/cgroup/job/inner/cpu.stat", "usage_usec 9\nthrottled_usec 500000\n")
    write(tmp_path, "sys/fs/cgroup/job/cpu.stat", "nr_throttled 3\nthrottled_usec 250000\n")
    write(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 7\n")
    assert read_counters(tmp_path).throttled == 0.75


def test_quotas_of_the_older_control_groups_count(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/job\n3:cpu,cpuacct:/gone\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.stat", "nr_throttled 3\nthrottled_time 1500000000\n")
    assert read_counters(tmp_path).throttled == 1.5


TWO = {"proc/self/cgroup": "0::/job/inner\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}
ONE = {"proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/gone\n"}
CFS = "sys/fs/cgroup/cpu/cpu.cfs"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (TWO, 8),
        (TWO | {"sys/fs/cgroup/job/cpu.max": "250000 100000\n"}, 2),
        (TWO | {"sys/fs/cgroup/job/inner/cpu.max": "40000 100000\n"}, 1),
        (TWO | {"sys/fs/cgroup/job/cpu.max": "9900000 100000\n"}, 8),
        (ONE | {f"{CFS}_quota_us": "-1\n", f"{CFS}_period_us": "100000\n"}, 8),
        (ONE | {f"{CFS}_quota_us": "300000\n", f"{CFS}_period_us": "100000\n"}, 3),
    ],
)
def test_cores_are_as_many_as_quotas_pay_for(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        write(tmp_path, name, text)
    assert available_cores(tmp_path) == cores


def test_thermal_events_of_all_cores_count(tmp_path: Path) -> None:
    for core, events in ((0, 2), (1, 3)):
        folder = f"sys/devices/system/cpu/cpu{core}/thermal_throttle"
        write(tmp_path, f"{folder}/core_throttle_count", f"{events}\n")
        write(tmp_path, f"{folder}/core_throttle_total_time_ms", "99\n")
    assert read_counters(tmp_path).cooled == 5


def test_the_time_of_children_is_the_job_s() -> None:
    before = read_counters()
    busy_process(0.3).wait()
    assert read_counters().since(before).own > 0.2


def test_differences_are_taken_of_every_counter() -> None:
    earlier, later = Counters(*range(9)), Counters(*range(0, 27, 3))
    assert later.since(earlier) == Counters(*range(0, 18, 2))


# --- Limits ---

OTHERS = "other processes used 1.00 of 2 cores"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"busy": 4.0}, OTHERS),
        ({"stolen": 0.2}, "the hypervisor gave 5.0% of the CPU time to other guests"),
        ({"throttled": 0.4}, "a CPU quota held the threads back for 10.0% of the time"),
        ({"cooled": 2.0}, "heat slowed the CPU down (2 events)"),
        ({"major_faults": 11.0}, "11 pages of memory were read from a disk"),
        ({"collecting": 0.1}, "Python collected garbage for 5.0% of the time"),
        ({"gpu_others": 1.0}, "1 other process(es) used the GPU"),
        ({"gpu_retries": 3.0}, "memory ran out 3 times, and torch's allocator got over it"),
        ({"gpu_thermal": 1.0}, "heat slowed the GPU down (at 61 degrees Celsius)"),
        ({"gpu_power_brake": 1.0}, "the power supply made the GPU slow down"),
        ({"gpu_slowdown": 1.0}, "the GPU's hardware halved its clock"),
    ],
)
def test_every_disturbance_is_told(changes: dict[str, float], reason: str) -> None:
    (window,) = together([astuple(replace(QUIET, **changes))])
    assert judge((*CPU_WATCHES, *GPU_WATCHES), [window]) == [reason]


DROP = {"gpu_clock_before": 2e9, "gpu_clock_after": 1.8e9}
FELL = "the GPU's clock fell by 10% in the window"


@pytest.mark.parametrize(
    ("bits", "judged"),
    [
        ({}, False),
        ({"gpu_power_cap": 1.0}, False),
        ({"gpu_thermal": 1.0}, True),
        ({"gpu_power_brake": 1.0}, True),
        ({"gpu_slowdown": 1.0}, True),
        ({"gpu_slowdown": 1.0, "gpu_thermal": math.nan}, True),
        ({"gpu_slowdown": 1.0, "gpu_power_cap": 1.0}, False),
        (dict.fromkeys(("gpu_thermal", "gpu_power_brake", "gpu_slowdown"), math.nan), False),
    ],
)
def test_a_clock_that_falls_is_judged_with_its_cause_alone(
    bits: dict[str, float], judged: bool
) -> None:
    """A GPU at its power limit leaves its boost in every window."""
    (window,) = together([astuple(replace(QUIET, **DROP, **bits))])
    assert (FELL in judge(GPU_WATCHES, [window])) == judged
    (drop,) = (e for e in measure(GPU_WATCHES, [window]) if e.name == "window_gpu_clock_drop")
    assert drop.value == pytest.approx(0.1), "recorded in any case"
    steady = replace(window, gpu_clock_after=1.91e9)
    assert not any("clock fell" in reason for reason in judge(GPU_WATCHES, [steady]))


def test_a_quota_is_held_against_the_cores_it_pays_for() -> None:
    """Four of 96 cores are paid for: a tenth of their time is 0.4 % of that of all."""
    window = replace(QUIET, cores=96.0, available=4.0, seconds=10.0, throttled=4.0)
    assert judge(CPU_WATCHES, together([astuple(window)])) == [
        "a CPU quota held the threads back for 10.0% of the time"
    ]


def test_what_an_idle_machine_does_passes() -> None:
    few = replace(QUIET, major_faults=10.0, collecting=0.01, stolen=0.03, switches=1e6)
    assert judge((*CPU_WATCHES, *GPU_WATCHES), together([astuple(few)])) == []


def test_what_is_not_counted_is_not_a_disturbance() -> None:
    fields = dict.fromkeys(("capacity", "busy", "stolen", "throttled", "cooled"), math.nan)
    gpu = {name: math.nan for name in Window.__dataclass_fields__ if name.startswith("gpu")}
    windows = together([astuple(replace(QUIET, **fields, **gpu))])
    assert judge((*CPU_WATCHES, *GPU_WATCHES), windows) == []


def test_neighbours_of_a_gpu_s_process_matter_only_on_crowded_cores() -> None:
    beside = replace(QUIET, on_gpu=1.0, busy=3.0)  # 3 of 4 CPU seconds, one of them by others
    assert judge(CPU_WATCHES, together([astuple(beside)])) == []
    (reason,) = judge(CPU_WATCHES, together([astuple(replace(beside, busy=3.6))]))
    assert reason == "other processes used 0.80 of 2 cores"


def test_the_power_limit_is_recorded_and_not_judged() -> None:
    capped = together([astuple(replace(QUIET, gpu_power_cap=1.0))])
    assert judge(GPU_WATCHES, capped) == []
    found = {each.name: each for each in measure(GPU_WATCHES, capped)}
    assert found["window_gpu_power_cap"].samples == ((1.0,),)


def test_a_few_ticks_of_a_short_window_are_not_judged() -> None:
    short = {"seconds": 0.02, "own": 0.02}
    rounding = replace(QUIET, **short, capacity=0.04, busy=0.04, stolen=0.01)
    assert judge(CPU_WATCHES, together([astuple(rounding)])) == []


def test_numbers_are_fractions_of_what_there_was() -> None:
    window = replace(QUIET, busy=3.0, stolen=0.2, throttled=0.4, collecting=0.5)
    found = {each.name: each for each in measure(CPU_WATCHES, together([astuple(window)]))}
    assert found["window_other_cpu"].samples == ((0.25,),)
    assert found["window_steal"].samples == ((pytest.approx(0.05),),)
    assert found["window_cpu_throttled"].samples == ((pytest.approx(0.1),),)
    assert found["window_garbage_collection"].samples == ((0.25,),)
    assert found["window_involuntary_switches"].samples == ((900.0,),)
    assert {found[name].unit for name in ("window_other_cpu", "window_steal")} == {"fraction"}


def test_what_cannot_be_read_is_absent_with_its_reason() -> None:
    blind = replace(QUIET, cooled=math.nan)
    found = {each.name: each for each in measure(CPU_WATCHES, together([astuple(blind)]))}
    absent = found["window_cpu_thermal_events"]
    assert absent.status == "absent"
    assert absent.reason == "this machine does not count thermal events of its CPUs"
    pair = together([astuple(QUIET), astuple(blind)])
    assert measure(CPU_WATCHES[3:4], pair)[0].reason.endswith("its CPUs (rank 1)")
    given = measure(GPU_WATCHES[:1], together([astuple(replace(QUIET, gpu_others=math.nan))]), "no")
    assert given[0].reason == "no"


# --- Several ranks ---


def test_ranks_of_one_place_are_not_others_to_each_other() -> None:
    pair = [replace(QUIET, busy=4.0, own=1.9), replace(QUIET, busy=4.0, own=2.0)]
    windows = together([astuple(each) for each in pair])
    assert [each.job for each in windows] == [3.9, 3.9]
    assert judge(CPU_WATCHES, windows) == []
    assert [each.other_cores for each in windows] == pytest.approx([0.05, 0.05])


def test_ranks_of_other_places_do_not_explain_a_busy_machine() -> None:
    pair = [replace(QUIET, busy=4.0), replace(QUIET, place=2.0)]
    assert judge(CPU_WATCHES, together([astuple(each) for each in pair])) == [f"rank 0: {OTHERS}"]


def test_the_worst_rank_is_named_and_each_reason_told_once() -> None:
    ranks = [replace(QUIET, stolen=stolen) for stolen in (0.0, 0.2, 0.4)]
    (reason,) = judge(CPU_WATCHES[1:], together([astuple(each) for each in ranks]))
    assert reason == "rank 2: the hypervisor gave 10.0% of the CPU time to other guests"


# --- The garbage collector ---


def test_the_seconds_of_collections_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(moments))
    collector = CollectorClock()
    for phase in ("start", "stop", "start", "stop"):
        collector(phase, {"generation": 2})
    assert collector.seconds == 0.75


def test_forced_collections_are_seen_and_the_callback_does_not_stay() -> None:
    callbacks = list(gc.callbacks)
    with Monitor(CPU) as watched:
        assert len(gc.callbacks) == len(callbacks) + 1
        for _ in range(5):
            gc.collect()
    assert gc.callbacks == callbacks
    measurements, reasons = watched.report()
    assert value_of(measurements, "window_garbage_collection") > 0.5
    assert any("collected garbage" in reason for reason in reasons)


def value_of(measurements: list[Measurement], name: str) -> float:
    (found,) = [each.value for each in measurements if each.name == name]
    assert found is not None
    return found


# --- A real neighbour ---


def busy_process(seconds: float) -> subprocess.Popen[str]:
    """A process that says that it runs, then computes for so many CPU seconds."""
    code = (
        "import time; print('busy', flush=True)\n"
        f"while time.process_time() < {seconds}: sum(range(10000))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.stdout.close()
    return process


@pytest.fixture
def one_core() -> Iterator[None]:
    """This process, and what it starts, may use one core alone, however many there are."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


@pytest.fixture
def neighbour() -> Iterator[None]:
    """A busy process that is no child of this one, as its parent has ended; it ends by itself."""
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    end = time.monotonic() + 20\n"
        "    print(os.getpid(), flush=True); os.close(1)\n"
        "    while time.monotonic() < end: sum(range(10000))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    try:
        yield
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_a_busy_neighbour_is_seen(one_core: None, neighbour: None) -> None:
    with Monitor(CPU) as watched:
        time.sleep(1.0)
    measurements, reasons = watched.report()
    share = value_of(measurements, "window_other_cpu")
    assert share > 0.3, "of the core, on a machine that may be full"
    assert any(reason.startswith("other processes used ") for reason in reasons)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_this_process_and_its_child_are_no_neighbours() -> None:
    with Monitor(CPU) as watched:
        child = busy_process(0.5)
        child.wait()
    window = watched._window()
    assert window.own > 0.4
    (mine,), (forgotten,) = together([astuple(window)]), together([astuple(replace(window, own=0))])
    seconds = (forgotten.other_cores - mine.other_cores) * window.seconds
    assert seconds > 0.2 or mine.other_cores == 0


# --- NVML ---

UUID = "GPU-0000"


class FakeNvml(types.ModuleType):
    """pynvml of a machine with one GPU; `changes` replaces its answers, an exception is raised."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    NVML_CLOCK_GRAPHICS, NVML_CLOCK_MEM = 0, 2
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    class NVMLError(Exception):
        pass

    class NVMLLibraryMismatchError(Exception):
        pass

    def __init__(self, **changes: object) -> None:
        super().__init__("pynvml")
        self.answers = {
            "clock": 1980, "heat": 61, "events": 0, "pids": (41,), "slowed": (3e9, 5e8),
            "limit": 699_900, "clocks": (1980, None, 2619), **changes
        }  # fmt: skip

    def _answer(self, name: str) -> object:
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def nvmlInit(self) -> None:
        self._answer("clock")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> object:
        assert (handle, kind) == ("handle", 1)
        return self._answer("clock")

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> object:
        assert (handle, sensor) == ("handle", 0)
        return self._answer("heat")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> object:
        return self._answer("events")

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> object:
        return types.SimpleNamespace(violationTime=self._answer("slowed")[policy])

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> object:
        return self._answer("limit")

    def nvmlDeviceGetApplicationsClock(self, handle: str, kind: int) -> object:
        return self._answer("clocks")[kind]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> object:
        return [types.SimpleNamespace(pid=pid) for pid in self._answer("pids")]


def install(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**changes))


def test_a_gpu_s_state_is_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, events=0x24)
    state = Gpu(UUID).state()
    assert state == GpuState(
        clock_hz=1.98e9,
        temperature=61.0,
        slowed_by=0x24,
        processes=(41,),
        thermal_seconds=0.5,
        power_seconds=3.0,
    )


def test_seconds_that_are_not_counted_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, slowed=FakeNvml.NVMLError("Not Supported"))
    state = Gpu(UUID).state()
    assert math.isnan(state.thermal_seconds) and math.isnan(state.power_seconds)


def test_a_driver_older_than_the_binding_leaves_out_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, pids=FakeNvml.NVMLLibraryMismatchError("use a versioned function"))
    state = Gpu(UUID).state()
    assert (state.processes, state.clock_hz) == (None, 1.98e9)
    assert math.isnan(other_processes(state, own=7))
    monkeypatch.delattr(FakeNvml, "NVMLLibraryMismatchError")
    install(monkeypatch, pids=FakeNvml.NVMLError("Not Supported"))
    assert Gpu(UUID).state().processes is None, "as of a binding without that error"


def test_the_limits_of_a_gpu_are_in_watts_and_megahertz(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert (Gpu(UUID).power_limit(), Gpu(UUID).application_clocks()) == (700, (1980, 2619))
    assert environment._limits(UUID) == (700, (1980, 2619))
    deprecated = FakeNvml.NVMLError("Not Supported")
    install(monkeypatch, limit=deprecated, clocks=deprecated)
    assert environment._limits(UUID) == (None, None)
    assert environment._limits("GPU-1111") == (None, None)


def test_an_older_binding_has_another_name_for_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksEventReasons")
    monkeypatch.setattr(
        FakeNvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda *_: 8, raising=False
    )
    assert Gpu(UUID).state().slowed_by == nvml.SLOWDOWN


def test_what_a_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unsupported = FakeNvml.NVMLError("Not Supported")
    install(monkeypatch, heat=unsupported, events=unsupported)
    state = Gpu(UUID).state()
    assert math.isnan(state.temperature)
    assert state.slowed_by is None
    assert math.isnan(gpu_fields([state, state], 2.0)["gpu_thermal"])


def test_nvml_that_cannot_be_asked_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(NvmlError, match="NVML: Not Found"):
        Gpu("GPU-1111")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlError, match="nvidia-ml-py is not installed"):
        Gpu(UUID)


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ((), None),  # not even this one, which has opened the GPU
        (None, None),
        ((7,), 0),
        ((7, 8), 1),
        ((90001,), 0),  # the host's number for this process
        ((90001, 90002, 90003), 2),
    ],
)
def test_other_processes_on_the_gpu(pids: tuple[int, ...] | None, others: int | None) -> None:
    state = GpuState(clock_hz=1.0, temperature=1.0, slowed_by=0, processes=pids)
    found = other_processes(state, own=7)
    assert math.isnan(found) if others is None else found == others


@pytest.mark.parametrize(
    ("events", "field"),
    [
        (0x20, "gpu_thermal"),
        (0x40, "gpu_thermal"),
        (0x04, "gpu_power_cap"),
        (0x80, "gpu_power_brake"),
        (0x08, "gpu_slowdown"),
        (0x01, None),  # idle
        (0x02, None),  # clocks set by the user
    ],
)
@pytest.mark.parametrize("end", [0, 1])
def test_what_slowed_the_gpu_before_or_after_counts(
    events: int, field: str | None, end: int
) -> None:
    calm = GpuState(clock_hz=2e9, temperature=50.0, slowed_by=0, processes=())
    states = [calm, calm]
    states[end] = replace(calm, slowed_by=events, clock_hz=1e9)
    found = gpu_fields(states, 2.0)
    causes = ("gpu_thermal", "gpu_power_cap", "gpu_power_brake", "gpu_slowdown")
    assert [name for name in causes if found[name]] == ([field] if field else [])
    assert (found["gpu_clock_before"], found["gpu_clock_after"])[end] == 1e9


def test_a_gpu_is_looked_at_while_it_works() -> None:
    idle = GpuState(clock_hz=3e8, temperature=50.0, slowed_by=1, processes=(7,))
    busy = replace(idle, clock_hz=1.7e9, slowed_by=nvml.THERMAL, processes=(7, 8))
    found = gpu_fields([idle, busy, idle], 2.0)
    assert found["gpu_clock_after"] == 1.7e9
    assert found["gpu_thermal"] == 1.0
    assert found["gpu_others"] == 1.0


def test_a_clock_of_nothing_has_not_fallen() -> None:
    """Some virtual GPUs tell 0 MHz."""
    state = GpuState(clock_hz=0.0, temperature=50.0, slowed_by=nvml.THERMAL, processes=())
    found = gpu_fields([state, state], 2.0)
    (window,) = together([astuple(replace(QUIET, **found))])
    told = {each.name: each for each in measure(GPU_WATCHES, [window])}
    assert told["window_gpu_clock_drop"].status == "absent"
    assert not [reason for reason in judge(GPU_WATCHES, [window]) if "clock" in reason]


def test_seconds_of_heat_are_a_share_of_the_window() -> None:
    before = GpuState(
        clock_hz=2e9, temperature=50.0, slowed_by=0, processes=(), thermal_seconds=7.0
    )
    found = gpu_fields([before, replace(before, thermal_seconds=7.5)], 2.0)
    assert found["gpu_thermal_share"] == 0.25
    assert math.isnan(found["gpu_power_share"])
    (window,) = together([astuple(replace(QUIET, **found))])
    assert judge(GPU_WATCHES, [window]) == ["heat slowed the GPU down for 25.0% of the time"]


@pytest.mark.gpu
def test_a_real_gpu_is_watched() -> None:
    device = torch.device("cuda", 0)
    with Monitor(device) as watched:
        for _ in range(200):
            torch.ones(4096, 4096, device=device).square_()
        watched.look()
        torch.cuda.synchronize(device)
    found = {each.name: each for each in watched.report()[0]}
    assert found["window_gpu_clock_after"].value > 1e8
    assert found["window_gpu_other_processes"].status == "ok"
    assert found["window_gpu_thermal_share"].value >= 0
    assert found["window_gpu_allocation_retries"].value == 0


# --- Into the record ---


def test_a_warm_up_that_does_not_settle_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_settled", lambda *_: False)
    monkeypatch.setattr(monitor.Monitor, "report", lambda _: ([], ["a goat"]))
    protocol = Protocol(
        warmup_steps=1, max_warmup_steps=3, timed_steps=2, min_timed_seconds=0.0,
        inference_batch_sizes=(),
    )  # fmt: skip
    subject = Subject(make_trainer(tiny_recipe(epochs=10)), protocol)
    list(training.measure_training(subject))
    expected = "warm-up: step time had not settled after 3 steps"
    assert subject.invalid == [expected, "a goat"]


def test_only_the_window_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    enter, leave = Monitor.__enter__, Monitor.__exit__
    subject = Subject(make_trainer(), Protocol(warmup_steps=0, timed_steps=2, train_samples=160))

    def entered(self: Monitor) -> Monitor:
        steps.append(subject.trainer.step)
        return enter(self)

    def left(self: Monitor, *error: object) -> None:
        leave(self, *error)
        steps.append(subject.trainer.step)

    monkeypatch.setattr(Monitor, "__enter__", entered)
    monkeypatch.setattr(Monitor, "__exit__", left)
    names = [each.name for each in training.measure_training(subject)]
    assert steps == [2, 4], "after the first step and the observed one"
    assert {watch.name for watch in CPU_WATCHES} <= set(names)


WINDOWS: dict[str, Metric] = {
    "training": training.measure_training,
    "inference": measure_inference,
    "anatomy": measure_anatomy,
    "utilization": measure_utilization,
}


@pytest.mark.parametrize("name", WINDOWS)
def test_every_window_is_looked_at_before_its_device_is_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU works off what was launched until then; on leaving it is idle."""
    events: list[str] = []
    waits = HostClock.seconds
    monkeypatch.setattr(Monitor, "look", lambda _: events.append("looks"))
    monkeypatch.setattr(HostClock, "seconds", lambda self: events.append("waits") or waits(self))
    monkeypatch.setattr(utilization, "CASE_SECONDS", 0.0)
    protocol = Protocol(
        warmup_steps=0, timed_steps=2, min_timed_seconds=0.0, inference_batch_sizes=(2,),
        inference_warmup=0, inference_iterations=2,
    )  # fmt: skip
    subject = Subject(make_trainer(), protocol)
    monkeypatch.setattr(subject, "value", lambda _: 1.0)  # of what was measured before
    list(WINDOWS[name](subject))
    assert events[:2] == ["looks", "waits"]


RANKS = """
import json, os, sys
import torch
import torch.distributed as dist
from bench.measure import monitor
from bench.measure.monitor import Monitor

dist.init_process_group("gloo")
rank = dist.get_rank()
with Monitor(torch.device("cpu")) as watched:
    dist.barrier()
if rank == 1:
    watched._after = watched._after._replace(major_faults=watched._before.major_faults + 500)
measurements, reasons = watched.report()
if rank == 0:
    found = next(each for each in measurements if each.name == "window_major_faults")
    print(json.dumps([reasons, found.samples]))
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_the_reason_of_the_second_process_reaches_the_first(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *words, str(tmp_path / "ranks.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reasons, samples = json.loads(done.stdout)
    assert "rank 1: 500 pages of memory were read from a disk" in reasons
    assert samples[1] == [500.0]
