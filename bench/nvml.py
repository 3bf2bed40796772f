"""What NVML tells of a GPU: energy, clock, heat, why and how long it is slowed, who uses it.

Needs nvidia-ml-py.
"""

import contextlib
import importlib
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifar.errors import CifarError

THERMAL = 0x20 | 0x40
"""Slowed by software or by hardware because it is hot."""
POWER_CAP = 0x04
"""Slowed to keep within the power limit."""
POWER_BRAKE = 0x80
"""Slowed by hardware because the power supply asked for it."""
SLOWDOWN = 0x08
"""Slowed by hardware to half the clock or less, for whatever cause.

All four are bits of `nvmlClocksEventReasons`:
https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
"""


_WORD_BITS = 64
"""Of the masks in which NVML tells CPU cores: an unsigned long on 64-bit Linux."""


class NvmlError(CifarError):
    """NVML cannot be asked; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """A GPU at one moment. NaN or None: this GPU or driver does not tell."""

    clock_hz: float
    """Of the streaming multiprocessors."""
    temperature: float
    """In degrees Celsius."""
    slowed_by: int | None
    """Bits of THERMAL, POWER_CAP, POWER_BRAKE, SLOWDOWN and others."""
    processes: tuple[int, ...] | None
    """The ids of all processes that compute on it, as the host counts them."""
    thermal_seconds: float = math.nan
    """For which heat has slowed it down since the driver was loaded."""
    power_seconds: float = math.nan
    """For which its power limit has."""


def _started() -> Any:
    """The module `pynvml`, ready to be asked.

    Raises:
        NvmlError: nvidia-ml-py is not installed, or there is no driver.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        raise NvmlError("the package nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NvmlError(f"NVML: {error}") from None
    return nvml


def near_cores(uuid: str) -> frozenset[int]:
    """See `Gpu.near_cores`; empty too if NVML cannot be asked."""
    with contextlib.suppress(NvmlError):
        return Gpu(uuid).near_cores()
    return frozenset()


def installed_gpus() -> int:
    """How many GPUs of this machine may be used here; 0 where NVML is missing.

    NVML counts those too that a container or a job was not given: they cannot be opened.
    """
    count = 0
    with contextlib.suppress(NvmlError):
        nvml = _started()
        with contextlib.suppress(nvml.NVMLError):
            for number in range(int(nvml.nvmlDeviceGetCount())):
                with contextlib.suppress(nvml.NVMLError):
                    nvml.nvmlDeviceGetHandleByIndex(number)
                    count += 1
    return count


def visible_gpus(environ: Mapping[str, str]) -> int:
    """How many GPUs a process with these variables sees; 0 where NVML is missing.

    CUDA_VISIBLE_DEVICES names them by number or UUID, and what stands behind the first that does
    not exist is not seen (https://docs.nvidia.com/cuda/cuda-programming-guide/,
    CUDA Environment Variables).
    """
    there, named = installed_gpus(), environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not there:
        return there

    def exists(word: str) -> bool:
        return int(word) < there if word.isdecimal() else word.startswith(("GPU-", "MIG-"))

    return sum(1 for _ in itertools.takewhile(exists, map(str.strip, named.split(","))))


class Gpu:
    """One GPU, known by its UUID (`GPU-...`), whatever number it has in this process.

    Raises:
        NvmlError: nvidia-ml-py is not installed, there is no driver, or it knows no such GPU.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml = _started()
        # raised where the driver is older than the binding; no NVMLError, and not in every version
        mismatch = getattr(self._nvml, "NVMLLibraryMismatchError", self._nvml.NVMLError)
        self._refusals = (self._nvml.NVMLError, mismatch)
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._refusals as error:
            raise NvmlError(f"NVML: {error}") from None

    def state(self) -> GpuState:
        """As it is now."""
        megahertz = self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        degrees = self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU)
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name before driver 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        running = self._ask("nvmlDeviceGetComputeRunningProcesses")
        return GpuState(
            clock_hz=math.nan if megahertz is None else megahertz * 1e6,
            temperature=math.nan if degrees is None else float(degrees),
            slowed_by=reasons,
            processes=None if running is None else tuple(each.pid for each in running),
            thermal_seconds=self._slowed_seconds("NVML_PERF_POLICY_THERMAL"),
            power_seconds=self._slowed_seconds("NVML_PERF_POLICY_POWER"),
        )

    def _slowed_seconds(self, policy: str) -> float:
        """The running count of a policy, which is in nanoseconds; NaN if it is not counted.

        Source: nvmlDeviceGetViolationStatus,
        https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html.
        """
        number = getattr(self._nvml, policy, None)
        status = None if number is None else self._ask("nvmlDeviceGetViolationStatus", number)
        return math.nan if status is None else status.violationTime / 1e9

    def millijoules(self) -> int:
        """Energy that the board has drawn since the driver was loaded; Volta or newer.

        Raises:
            NvmlError: this GPU does not count it.
        """
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._refusals as error:
            raise NvmlError(f"NVML: {error}") from None

    def power_limit(self) -> int | None:
        """Watts that it was set to draw at most; None if it does not tell."""
        milliwatts = self._ask("nvmlDeviceGetPowerManagementLimit")
        return None if milliwatts is None else round(milliwatts / 1000)

    def application_clocks(self) -> tuple[int, int] | None:
        """MHz of graphics and of memory that programs were given; None if it does not tell.

        A range of clocks to which `nvidia-smi -lgc` has locked it NVML tells nobody.
        """
        kinds = (self._nvml.NVML_CLOCK_GRAPHICS, self._nvml.NVML_CLOCK_MEM)
        graphics, memory = (self._ask("nvmlDeviceGetApplicationsClock", kind) for kind in kinds)
        return None if graphics is None or memory is None else (graphics, memory)

    def near_cores(self) -> frozenset[int]:
        """The numbers of the CPU cores on this GPU's socket; empty if that is not told."""
        words = -(-(os.cpu_count() or 1) // _WORD_BITS)
        masks = self._ask("nvmlDeviceGetCpuAffinity", words) or ()
        return frozenset(
            word * _WORD_BITS + bit
            for word, mask in enumerate(masks)
            for bit in range(_WORD_BITS)
            if mask >> bit & 1
        )

    def _ask(self, query: str, *words: Any) -> Any:
        """The answer, or None if this GPU, its driver or the binding has none."""
        try:
            return getattr(self._nvml, query)(self._handle, *words)
        except (AttributeError, *self._refusals):
            return None


def other_processes(state: GpuState, own: int) -> float:
    """How many processes but `own` compute on the GPU; NaN if it does not tell.

    A list of none does not: `own` has opened the GPU.
    In a container the driver may give the host's process ids, which no process inside knows: if
    `own` is not among them, one of them is taken to be it.
    """
    if not state.processes:
        return math.nan
    return float(len(set(state.processes) | {own}) - 1 - (own not in state.processes))
