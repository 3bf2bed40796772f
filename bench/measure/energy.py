"""Energy of training: counters of the device, less what it draws at rest.

A GPU counts its own joules (NVML), a CPU those of its packages (RAPL). Where neither can be read
the energy is absent and says why.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch

from bench.job import SIDE_BY_SIDE
from bench.measure.clock import synchronize
from bench.nvml import Gpu, NvmlError
from bench.record import Measurement
from cifar.distributed import barrier, gather, least

SETTLING_SPAN = 1.0
"""Seconds over which power is averaged while a device comes to rest."""
SETTLING_TOLERANCE = 0.1
"""How far the power of two neighbouring spans may differ, as a fraction, where it has."""
MOST_SETTLING_SPANS = 6
MIN_UPDATES = 10
"""Of the counter in a window, which then starts and ends within a tenth of it."""
POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """A running count of energy."""

    source: str
    update_seconds: float
    """The longest time that a reading may be old."""
    settles: bool
    """Whether the device draws more for a while after it has worked."""
    idle_seconds: float
    """Over which power at rest is averaged."""

    def read(self) -> tuple[int, ...]:
        """What it shows, in its own unit."""

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Between two readings."""


class NvmlCounter:
    """The board of one GPU since the driver was loaded, in millijoules; Volta or newer.

    Source: nvmlDeviceGetTotalEnergyConsumption,
    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html. How often it changes is
    not documented: every 20 to 100 ms.
    """

    source = "nvml"
    update_seconds = 0.1
    settles = True  # it holds its boost clock for a while
    idle_seconds = 2.0

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def read(self) -> tuple[int, ...]:
        """Millijoules."""
        return (self._gpu.millijoules(),)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Between two readings."""
        return (after[0] - before[0]) / 1000


class RaplCounter:
    """The CPU packages of the whole machine in microjoules, without their memory.

    Each starts again at 0 after `max_energy_range_uj`, which takes minutes at the least; readings
    must not lie further apart. Source: https://docs.kernel.org/power/powercap/powercap.html.
    """

    source = "rapl"
    update_seconds = 0.001
    settles = False
    idle_seconds = 1.0

    def __init__(self, zones: Sequence[Path]) -> None:
        self._energies = [zone / "energy_uj" for zone in zones]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]

    def read(self) -> tuple[int, ...]:
        """Microjoules of each package."""
        return tuple(int(path.read_text()) for path in self._energies)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Between two readings, summed over the packages."""
        triples = zip(before, after, self._ranges, strict=True)
        return sum((end - start) % size for start, end, size in triples) / 1e6


def find_counter(
    device: torch.device, *, counts_machine: bool, root: Path = POWERCAP
) -> Counter | str:
    """The counter for this process's device, or why there is none.

    RAPL counts a machine, not a process: only the process that `counts_machine` reads it, the
    others of that machine count nothing, and where the run measures on several groups of cores at
    the same time, nobody can tell whose energy it is.
    """
    if device.type == "cuda":
        return _nvml_counter(device)
    if device.type == "cpu":
        if int(os.environ.get(SIDE_BY_SIDE, "1")) > 1:
            return "no energy counter: RAPL counts the cells that run beside this one too"
        return _rapl_counter(root, counts_machine)
    return f"no energy counter: none is known for a device of type {device.type}"


def _nvml_counter(device: torch.device) -> Counter | str:
    """NVML numbers GPUs otherwise than CUDA, which may be shown only some: the UUID is the same."""
    try:
        counter = NvmlCounter(Gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
        counter.read()
    except NvmlError as error:
        return f"no energy counter: {error}"
    return counter


def _rapl_counter(root: Path, counts_machine: bool) -> Counter | str:
    """Packages alone: their cores are parts of them, and a whole platform's zone (psys) is more."""
    names = sorted(root.glob("intel-rapl:*/name"))
    zones = [name.parent for name in names if name.read_text().startswith("package")]
    if not zones:
        return "no energy counter: the kernel shows no RAPL package (intel-rapl, AMD's included)"
    try:
        RaplCounter(zones).read()
    except OSError as error:
        return (
            f"no energy counter: {error.strerror} to read energy_uj of RAPL's packages: "
            "the administrator must grant it"
        )
    return RaplCounter(zones if counts_machine else ())


class Window(NamedTuple):
    """What one process's counter saw of the timed window, and what it sees at rest."""

    joules: float
    seconds: float
    idle_watts: float


class EnergyMeter:
    """Counts the energy of what runs inside `with meter:`, see `find_counter`.

    The work must have ended on the device when the block does.
    """

    def __init__(self, device: torch.device, counter: Counter | str) -> None:
        self._device, self._counter = device, counter
        self.idle_seconds = 0.0
        """For which it was left at rest and watched."""
        self._idle_watts = 0.0
        self._start = self._read()
        self._window = Window(0.0, 0.0, 0.0)

    def watch_idle(self) -> None:
        """Count for the counter's `idle_seconds` while no process computes; a collective call.

        The device keeps what is loaded on it and the clocks it holds for a program that has opened
        it and waits, which after work are lower only once it has come to rest.
        """
        synchronize(self._device)
        barrier()
        if not isinstance(self._counter, str):
            start = time.perf_counter()
            if self._counter.settles:
                self._settle()
            self._idle_watts = self._watts(self._counter.idle_seconds)
            self.idle_seconds = time.perf_counter() - start
        barrier()

    def _settle(self) -> None:
        """Wait until the power of two neighbouring spans agrees, or for `MOST_SETTLING_SPANS`."""
        before = self._watts(SETTLING_SPAN)
        for _ in range(MOST_SETTLING_SPANS - 1):
            now = self._watts(SETTLING_SPAN)
            if abs(now - before) <= SETTLING_TOLERANCE * before:
                return
            before = now

    def _watts(self, seconds: float) -> float:
        """Average power over so many seconds of waiting."""
        start = self._read()
        time.sleep(seconds)
        joules, took = self._since(start)
        return joules / took

    def __enter__(self) -> None:
        self._start = self._read()

    def __exit__(self, *_: object) -> None:
        self._window = Window(*self._since(self._start), self._idle_watts)

    def measurement(self, samples: int) -> Measurement:
        """Joules of each of the window's `samples`, over all processes; a collective call."""
        counter = self._counter
        if not least(not isinstance(counter, str), self._device):
            here = counter if isinstance(counter, str) else "no energy counter in another process"
            return _without("absent", here)
        assert not isinstance(counter, str)
        windows = [Window(*each) for each in gather(self._window, self._device)]
        return train_energy(windows, samples, counter)

    def _read(self) -> tuple[float, tuple[int, ...]]:
        counts = () if isinstance(self._counter, str) else self._counter.read()
        return time.perf_counter(), counts

    def _since(self, start: tuple[float, tuple[int, ...]]) -> tuple[float, float]:
        """Joules and seconds since a reading."""
        if isinstance(self._counter, str):
            return 0.0, 0.0
        moment, counts = self._read()
        return self._counter.joules(start[1], counts), moment - start[0]


def train_energy(windows: Sequence[Window], samples: int, counter: Counter) -> Measurement:
    """Joules per sample: every process's joules beyond idle power, summed, over all samples.

    Devices' energies add up, so the headline is the group's, not the worst rank's: there is one
    value. `gross_joules` and `idle_watts` are sums over the processes too, `seconds` the longest
    window. Absent if the window is too short for the counter, failed if nothing is left of it.
    """
    seconds = min(window.seconds for window in windows)
    enough = MIN_UPDATES * counter.update_seconds
    if seconds < enough:
        return _without(
            "absent",
            f"the window of {seconds:.3g} s is too short for a counter that is updated every "
            f"{counter.update_seconds:g} s: time {enough:g} s or more (timed-seconds)",
        )
    gross = sum(window.joules for window in windows)
    rest = sum(window.idle_watts * window.seconds for window in windows)
    if gross <= rest:
        return _without(
            "failed", f"{gross:.4g} J in the window are not more than {rest:.4g} J at idle power"
        )
    return Measurement(
        name="train_energy",
        unit="J/sample",
        better="lower",
        labels={
            "source": counter.source,
            "gross_joules": gross,
            "idle_watts": sum(window.idle_watts for window in windows),
            "seconds": max(window.seconds for window in windows),
        },
        samples=(((gross - rest) / samples,),),
    )


def _without(status: Literal["absent", "failed"], reason: str) -> Measurement:
    return Measurement(
        name="train_energy", unit="J/sample", better="lower", status=status, reason=reason
    )
