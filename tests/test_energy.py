"""Energy by hand: fake RAPL trees, a fake NVML, and windows of several processes."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.measure import energy
from bench.measure.energy import (
    EnergyMeter,
    NvmlCounter,
    RaplCounter,
    Window,
    find_counter,
    train_energy,
)
from bench.record import Measurement

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UUID = "8a1b2c3d-0000-1111-2222-333344445555"
RANGE = 262_143_328_850


def add_zone(root: Path, zone: str, name: str, energy_uj: int = 0, size: int = RANGE) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")
    return folder


@pytest.fixture
def sockets(tmp_path: Path) -> Path:
    """Two sockets, with the zones that must not be counted: parts of them, and the platform."""
    add_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    add_zone(tmp_path, "intel-rapl:0:0", "core", 5_000_000)
    add_zone(tmp_path, "intel-rapl:0:1", "dram", 6_000_000)
    add_zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000)
    add_zone(tmp_path, "intel-rapl:2", "psys", 7_000_000)
    add_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 8_000_000)
    return tmp_path


class NVMLError(Exception):
    """What the library raises."""


class FakeNvml:
    """Two GPUs, each with its millijoules; `old` ones have no counter."""

    NVMLError = NVMLError

    def __init__(self, *, driver: bool = True, old: bool = False) -> None:
        self.driver, self.old = driver, old
        self.millijoules = {"GPU-other": 1, f"GPU-{UUID}": 5_000}

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.old:
            raise NVMLError("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Make a module the installed NVML (None: none is), on a GPU of a known UUID."""
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return lambda nvml: monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_packages_alone_are_counted(sockets: Path) -> None:
    counter = find_counter(CPU, counts_machine=True, root=sockets)
    assert isinstance(counter, RaplCounter)
    assert counter.read() == (1_000_000, 2_000_000)
    assert counter.joules((1_000_000, 2_000_000), (1_500_000, 4_000_000)) == 2.5


def test_a_package_that_began_again_at_zero(tmp_path: Path) -> None:
    counter = RaplCounter([add_zone(tmp_path, "intel-rapl:0", "package-0", size=100_000_000)])
    assert counter.joules((99_000_000,), (2_000_000,)) == 3.0


def test_one_process_counts_for_the_machine(sockets: Path) -> None:
    counter = find_counter(CPU, counts_machine=False, root=sockets)
    assert isinstance(counter, RaplCounter)
    assert counter.read() == ()
    assert counter.joules((), ()) == 0.0


def test_a_machine_s_counter_is_no_cell_s_where_others_run_beside_it(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_SIDE_BY_SIDE", "2")
    reason = find_counter(CPU, counts_machine=True, root=sockets)
    assert reason == "no energy counter: RAPL counts the cells that run beside this one too"
    monkeypatch.setenv("BENCH_SIDE_BY_SIDE", "1")
    assert isinstance(find_counter(CPU, counts_machine=True, root=sockets), RaplCounter)


def test_a_cpu_without_a_counter_says_so(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "psys")
    for root in (tmp_path, tmp_path / "nothing"):
        reason = find_counter(CPU, counts_machine=True, root=root)
        assert isinstance(reason, str)
        assert reason.startswith("no energy counter: the kernel shows no RAPL package")


@pytest.mark.parametrize("counts_machine", [True, False])
def test_a_counter_that_may_not_be_read_says_so_in_every_process(
    sockets: Path, monkeypatch: pytest.MonkeyPatch, counts_machine: bool
) -> None:
    def refuse(_: RaplCounter) -> tuple[int, ...]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RaplCounter, "read", refuse)
    reason = find_counter(CPU, counts_machine=counts_machine, root=sockets)
    assert isinstance(reason, str)
    assert reason.startswith("no energy counter: Permission denied to read energy_uj")


def test_a_gpu_is_found_by_its_uuid(install: Callable[[object], None]) -> None:
    nvml = FakeNvml()
    install(nvml)
    counter = find_counter(GPU, counts_machine=False)
    assert isinstance(counter, NvmlCounter)
    before = counter.read()
    nvml.millijoules[f"GPU-{UUID}"] += 12_500
    nvml.millijoules["GPU-other"] += 99_000
    assert counter.joules(before, counter.read()) == 12.5


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (None, "no energy counter: the package nvidia-ml-py is not installed"),
        (FakeNvml(driver=False), "no energy counter: NVML: Driver Not Loaded"),
        (FakeNvml(old=True), "no energy counter: NVML: Not Supported"),
    ],
)
def test_a_gpu_without_a_counter_says_why(
    install: Callable[[object], None], nvml: object, reason: str
) -> None:
    install(nvml)
    assert find_counter(GPU, counts_machine=True) == reason


def test_a_part_of_a_gpu_has_no_counter(install: Callable[[object], None]) -> None:
    nvml = FakeNvml()
    del nvml.millijoules[f"GPU-{UUID}"]
    install(nvml)
    assert find_counter(GPU, counts_machine=True) == "no energy counter: NVML: Not Found"


def test_other_devices_have_no_counter() -> None:
    reason = find_counter(torch.device("meta"), counts_machine=True)
    assert reason == "no energy counter: none is known for a device of type meta"


COUNTER = NvmlCounter(SimpleNamespace())


def test_energy_of_one_process_by_hand() -> None:
    """300 J in 2 s, of which 2 x 50 J at rest, for 400 samples."""
    found = train_energy([Window(300.0, 2.0, 50.0)], 400, COUNTER)
    assert (found.value, found.unit, found.better) == (0.5, "J/sample", "lower")
    assert found.labels == {
        "source": "nvml", "gross_joules": 300.0, "idle_watts": 50.0, "seconds": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_energies_of_several_devices_add_up(ranks: int) -> None:
    """The last one straggles: it draws least and waits longest, and does not set the headline."""
    windows = [Window(300.0, 2.0, 50.0)] * (ranks - 1) + [Window(260.0, 2.5, 40.0)]
    found = train_energy(windows, 400, COUNTER)
    assert found.value == pytest.approx((200.0 * (ranks - 1) + 160.0) / 400)
    assert found.labels["gross_joules"] == 300.0 * (ranks - 1) + 260.0
    assert found.labels["idle_watts"] == 50.0 * (ranks - 1) + 40.0
    assert found.labels["seconds"] == 2.5


def test_processes_that_share_a_machine_s_counter_count_it_once() -> None:
    windows = [Window(300.0, 2.0, 50.0), Window(0.0, 2.0, 0.0)]
    assert train_energy(windows, 400, RaplCounter(())).value == 0.5


def test_a_window_too_short_for_the_counter_is_absent() -> None:
    windows = [Window(300.0, 1.2, 50.0), Window(300.0, 0.9, 50.0)]
    found = train_energy(windows, 400, COUNTER)
    assert found.status == "absent"
    assert "the window of 0.9 s is too short" in found.reason
    assert "time 1 s or more (timed-seconds)" in found.reason
    assert train_energy(windows, 400, RaplCounter(())).status == "ok"


def test_no_energy_beyond_idle_is_a_failure() -> None:
    found = train_energy([Window(100.0, 2.0, 50.0)], 400, COUNTER)
    assert found.status == "failed"
    assert found.reason == "100 J in the window are not more than 100 J at idle power"


class Scripted:
    """A counter and a clock that move on by what the test says."""

    source, update_seconds, settles, idle_seconds = "scripted", 0.1, False, 1.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.total = 0.0, 0
        self.at_rest = itertools.repeat(20)
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.seconds)
        monkeypatch.setattr(
            energy.time, "sleep", lambda seconds: self.spend(seconds, next(self.at_rest))
        )

    def spend(self, seconds: float, watts: int) -> None:
        self.seconds += seconds
        self.total += round(seconds * watts)

    def read(self) -> tuple[int, ...]:
        return (self.total,)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        return after[0] - before[0]


def metered(counter: Scripted) -> EnergyMeter:
    """1 s at rest at 20 W, a warm-up that does not count, and 4 s of work at 120 W."""
    meter = EnergyMeter(CPU, counter)
    meter.watch_idle()
    counter.spend(9.0, 500)
    with meter:
        counter.spend(4.0, 120)
    counter.spend(7.0, 300)
    return meter


def test_a_meter_counts_its_block_less_idle_power(monkeypatch: pytest.MonkeyPatch) -> None:
    found = metered(Scripted(monkeypatch)).measurement(200)
    assert found.value == pytest.approx((480 - 80) / 200)
    assert (found.labels["gross_joules"], found.labels["idle_watts"]) == (480.0, 20.0)


@pytest.mark.parametrize(
    ("watts", "idle_watts", "seconds"),
    [
        ([200, 150, 80, 74, 70], 70.0, 6.0),
        ([50, 50, 40], 40.0, 4.0),
        ([200, 150, 100, 70, 50, 30, 20], 20.0, 8.0),
    ],
)
def test_a_gpu_comes_to_rest_before_its_idle_power_is_watched(
    monkeypatch: pytest.MonkeyPatch, watts: list[int], idle_watts: float, seconds: float
) -> None:
    """Power over each second until two agree to a tenth, or six have passed; then over two."""
    counter = Scripted(monkeypatch)
    counter.settles, counter.idle_seconds = NvmlCounter.settles, NvmlCounter.idle_seconds
    counter.at_rest = iter(watts)
    meter = EnergyMeter(CPU, counter)
    meter.watch_idle()
    assert meter._idle_watts == idle_watts
    assert meter.idle_seconds == seconds, "left out of the time to the first timed step"
    assert next(counter.at_rest, None) is None


def test_a_cpu_is_watched_at_rest_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Scripted(monkeypatch)
    counter.settles, counter.idle_seconds = RaplCounter.settles, RaplCounter.idle_seconds
    meter = EnergyMeter(CPU, counter)
    meter.watch_idle()
    assert (meter._idle_watts, meter.idle_seconds) == (20.0, 1.0)


def test_a_meter_gathers_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one: 600 J in 4 s, 30 W at rest."""
    monkeypatch.setattr(energy, "gather", lambda mine, _: (tuple(mine), (600.0, 4.0, 30.0)))
    found = metered(Scripted(monkeypatch)).measurement(200)
    assert found.value == pytest.approx((400 + 480) / 200)


def test_a_meter_without_a_counter_neither_waits_nor_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(energy.time, "sleep", lambda _: pytest.fail("waited"))
    meter = EnergyMeter(CPU, "no energy counter: none")
    meter.watch_idle()
    with meter:
        pass
    found = meter.measurement(200)
    assert (found.status, found.reason) == ("absent", "no energy counter: none")


def test_a_counter_missing_elsewhere_is_absent_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "least", lambda *_: 0)
    found: Measurement = metered(Scripted(monkeypatch)).measurement(200)
    assert (found.status, found.reason) == ("absent", "no energy counter in another process")


@pytest.mark.gpu
def test_a_gpu_s_counter_moves_with_its_work() -> None:
    counter = find_counter(GPU, counts_machine=False)
    assert not isinstance(counter, str), counter
    matrix = torch.randn(4096, 4096, device=GPU)
    meter = EnergyMeter(GPU, counter)
    meter.watch_idle()
    with meter:
        for _ in range(400):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize()
    found = meter.measurement(400)
    assert found.status == "ok" or "too short" in found.reason
    assert meter._window.idle_watts > 0
    assert meter._window.joules > 0
