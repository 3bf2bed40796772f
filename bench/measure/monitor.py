"""Reads what may disturb a timed window, immediately before and after it."""

import gc
import math
import os
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

import torch

from bench.counters import clock_hz, place, read_counters, usable_cores
from bench.nvml import (
    POWER_BRAKE,
    POWER_CAP,
    SLOWDOWN,
    THERMAL,
    Gpu,
    GpuState,
    NvmlError,
    other_processes,
)
from bench.record import Measurement
from bench.validity import (
    CPU_WATCHES,
    GPU_WATCHES,
    Window,
    judge,
    measure,
    together,
)
from cifar.distributed import gather
from cifar.process import available_cores


class CollectorClock:
    """Adds up the seconds that Python's garbage collector takes; free while it does not run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __call__(self, phase: str, _info: dict[str, int]) -> None:
        """What `gc.callbacks` calls at the start and the end of a collection."""
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._began


class Monitor:
    """Wraps a timed window; what is read is read on entering and on leaving, never inside.

    `root` is where `/proc` and `/sys` are looked for.
    """

    def __init__(self, device: torch.device, root: Path = Path("/")) -> None:
        self._device = device
        self._root = root
        self._collector = CollectorClock()
        self._states: list[GpuState] = []
        self._gpu: Gpu | None = None
        self._no_gpu = ""
        if device.type == "cuda":
            try:
                self._gpu = Gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            except NvmlError as error:
                self._no_gpu = str(error)

    def __enter__(self) -> "Monitor":
        self._read_gpu()
        self._retries = -_allocation_retries(self._device)
        self._clocks = [clock_hz(self._root)]
        self._before = read_counters(self._root)
        gc.callbacks.append(self._collector)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.callbacks.remove(self._collector)
        self._clocks.append(clock_hz(self._root))
        self._read_gpu()
        self._retries += _allocation_retries(self._device)
        self._after = read_counters(self._root)

    def look(self) -> None:
        """Read the GPU while it works off what the program has queued, so at the window's end.

        It is idle on entering and on leaving, and its clock and its limits another one then.
        """
        self._read_gpu()

    def report(self) -> tuple[list[Measurement], list[str]]:
        """The numbers of all ranks and what of them is a disturbance; a collective call."""
        windows = together(gather(astuple(self._window()), self._device))
        measurements, reasons = measure(CPU_WATCHES, windows), judge(CPU_WATCHES, windows)
        if self._device.type == "cuda":
            measurements += measure(GPU_WATCHES, windows, self._no_gpu)
            reasons += judge(GPU_WATCHES, windows)
        return measurements, reasons

    def _read_gpu(self) -> None:
        if self._gpu is not None:
            self._states.append(self._gpu.state())

    def _window(self) -> Window:
        counted = self._after.since(self._before)
        return Window(
            place=place(),
            seconds=counted.clock,
            cores=len(usable_cores()),
            available=available_cores(),
            capacity=counted.capacity,
            busy=counted.busy,
            stolen=counted.stolen,
            own=counted.own,
            throttled=counted.throttled,
            cooled=counted.cooled,
            major_faults=counted.major_faults,
            switches=counted.switches,
            collecting=self._collector.seconds,
            clock=math.fsum(self._clocks) / len(self._clocks),
            on_gpu=float(self._device.type == "cuda"),
            gpu_retries=self._retries,
            **gpu_fields(self._states, counted.clock),
        )


def _allocation_retries(device: torch.device) -> float:
    """How often torch's allocator has been refused memory and got over it; NaN off a GPU."""
    if device.type != "cuda":
        return math.nan
    return float(torch.cuda.memory_stats(device).get("num_alloc_retries", math.nan))


def gpu_fields(states: Sequence[GpuState], seconds: float) -> dict[str, float]:
    """The fields of a `Window` of so many seconds that a GPU's states give; none without any.

    The first state is from before the window, the last from after it, those between from its end.
    """
    if not states:
        return {}
    before, after = states[0], states[-1]

    def slowed(bits: int) -> float:
        found = [each.slowed_by for each in states]
        return math.nan if None in found else float(any((each or 0) & bits for each in found))

    own = os.getpid()
    return {
        "gpu_others": max(other_processes(each, own) for each in states),
        "gpu_thermal_share": (after.thermal_seconds - before.thermal_seconds) / seconds,
        "gpu_power_share": (after.power_seconds - before.power_seconds) / seconds,
        "gpu_thermal": slowed(THERMAL),
        "gpu_power_cap": slowed(POWER_CAP),
        "gpu_power_brake": slowed(POWER_BRAKE),
        "gpu_slowdown": slowed(SLOWDOWN),
        "gpu_clock_before": before.clock_hz,
        "gpu_clock_after": states[min(1, len(states) - 1)].clock_hz,
        "gpu_temperature": after.temperature,
    }
