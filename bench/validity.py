"""What counts as a disturbance of a timed window; decided from numbers alone.

The limits are our choice: what an idle machine does of itself stays below them, and what moves a
throughput by more than a few per cent does not. The numbers are measurements of the record, so
that a reader can judge by other limits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.record import Measurement

OTHER_CPU = 0.05
"""Fraction of the cores' time that other processes may use. Daemons, the kernel's own threads and
the launcher stay under a tenth of one of two cores; a busy neighbour takes half of two."""
STEAL = 0.01
"""Fraction of the cores' time that the hypervisor may give to others. It is lost outright, so it
slows the job by as much; a host that is not overcommitted shows a tenth of this."""
TICKS = 0.1
"""CPU seconds of others or stolen below which their fraction is not judged: the kernel counts both
in ticks of 0.01 s on each core, so less than this is rounding in a short window."""
THROTTLED = 0.01
"""Fraction of the paid cores' time for which a CPU quota may hold the job's threads back. Without
a quota, or with one that is large enough, it is 0."""
COOLED = 0
"""Thermal events of the CPU: each is a drop of the clock, and a cooled machine has none."""
MAJOR_FAULTS = 10
"""Pages read from a disk. A few are code that runs for the first time; more is memory swapped out
or a data set that does not stay in memory, at 0.1 ms to 10 ms each."""
COLLECTING = 0.01
"""Fraction of the window in Python's garbage collector: less than repeats differ by."""
GPU_OTHERS = 0
"""Other processes that compute on this GPU: kernels of two take turns."""
GPU_RETRIES = 0
"""Times that the allocator ran out of memory and got over it: each waits for the GPU."""
GPU_SLOWED = 0
"""Whether heat or a fault slowed the GPU down at a moment that was looked at. Its power limit is
only recorded: many GPUs run at it under any load, steadily."""
GPU_HOT = 0.01
"""Fraction of the window for which heat may slow the GPU down: less than repeats differ by."""
CLOCK_DROP = 0.05
"""Fraction of the GPU's clock, from before the window to after it: more than it wavers by. It is
judged only where heat or a fault slowed the GPU down and its power limit did not: before the window
the GPU has waited and may boost, and under load its power limit takes that boost away."""
CROWDED = 0.8
"""Fraction of the cores in use above which a GPU's process, which needs one, may have to wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What one rank's counters did in the window, all as numbers; NaN: not counted here."""

    place: float
    """Equal for ranks on the same cores of the same machine."""
    seconds: float
    cores: float
    """How many this rank may use."""
    available: float
    """As many of them as quotas pay for; see `cifar.process.available_cores`."""
    capacity: float
    """CPU seconds of them, idle ones included; the next two are parts of it."""
    busy: float
    stolen: float
    own: float
    """CPU seconds of this rank and its children."""
    throttled: float
    """CPU seconds for which a quota held the cores back, summed over them."""
    cooled: float
    major_faults: float
    switches: float
    collecting: float
    """Seconds."""
    clock: float = math.nan
    """Of the cores in Hz, the mean over them and over the window's beginning and end."""
    on_gpu: float = 0.0
    """1 if this rank computes on a GPU."""
    gpu_others: float = math.nan
    gpu_thermal: float = math.nan
    """This and the next three: 1 if it slowed the GPU at a moment that was looked at, else 0."""
    gpu_power_cap: float = math.nan
    gpu_power_brake: float = math.nan
    gpu_slowdown: float = math.nan
    gpu_thermal_share: float = math.nan
    """Fraction of the window for which heat slowed the GPU down."""
    gpu_power_share: float = math.nan
    """And for which its power limit did."""
    gpu_clock_before: float = math.nan
    """In Hz, like the next, which is of the window's end."""
    gpu_clock_after: float = math.nan
    gpu_temperature: float = math.nan
    """In degrees Celsius, at the end."""
    gpu_retries: float = math.nan
    """How often torch's allocator was refused memory, gave back what it kept and asked again."""
    job: float = 0.0
    """CPU seconds of all ranks in this one's place; see `together`."""

    @property
    def other_cores(self) -> float:
        """How many of the cores other processes used on average."""
        return self.cores * self.fraction(max(0.0, self.busy - self.job))

    @property
    def gpu_slowed_by_trouble(self) -> bool:
        """Whether heat, the power supply or the hardware slowed the GPU down; False if unknown."""
        return any(bit > 0 for bit in (self.gpu_thermal, self.gpu_power_brake, self.gpu_slowdown))

    @property
    def gpu_clock_drop(self) -> float:
        """Fraction of its clock that the GPU lost; NaN if unknown, as of a virtual one at 0 Hz."""
        before = self.gpu_clock_before
        return 1 - self.gpu_clock_after / before if before > 0 else math.nan

    def fraction(self, cpu_seconds: float) -> float:
        """Of the cores' time; NaN if the machine does not count it."""
        return cpu_seconds / self.capacity if self.capacity > 0 else math.nan


def together(ranks: Sequence[Sequence[float]]) -> list[Window]:
    """The windows of all ranks from their fields (`astuple`); `job` is filled in."""
    names = list(Window.__dataclass_fields__)
    alone = [Window(**dict(zip(names, fields, strict=True))) for fields in ranks]
    return [
        replace(each, job=sum(other.own for other in alone if other.place == each.place))
        for each in alone
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """One number of a window, and what value of it is a disturbance."""

    name: str
    unit: str
    value: Callable[[Window], float]
    limit: float = math.inf
    """The largest value that is none; infinity: recorded, not judged."""
    least: float = 0.0
    """CPU seconds that it must come to besides."""
    says: str = ""
    """The reason, formatted with `value` and `window`."""
    only_if: Callable[[Window], bool] = lambda _: True
    """Whether it matters in this window at all."""
    better: Literal["lower", "none"] = "lower"
    unknown: str = ""
    """Why a machine may not tell it."""

    def disturbs(self, window: Window) -> bool:
        """Whether the value is above the limit, and matters."""
        value = self.value(window)
        enough = not value * window.capacity < self.least
        return value > self.limit and enough and self.only_if(window)


_NO_STAT = "this system has no /proc/stat, or the window was shorter than its ticks"

CPU_WATCHES = (
    Watch(
        name="window_other_cpu",
        unit="fraction",
        value=lambda window: window.other_cores / window.cores,
        limit=OTHER_CPU,
        least=TICKS,
        says="other processes used {window.other_cores:.2f} of {window.cores:.0f} cores",
        only_if=lambda window: not window.on_gpu or window.fraction(window.busy) > CROWDED,
        unknown=_NO_STAT,
    ),
    Watch(
        name="window_steal",
        unit="fraction",
        value=lambda window: window.fraction(window.stolen),
        limit=STEAL,
        least=TICKS,
        says="the hypervisor gave {value:.1%} of the CPU time to other guests",
        unknown=_NO_STAT,
    ),
    Watch(
        name="window_cpu_throttled",
        unit="fraction",
        value=lambda window: window.throttled / (window.seconds * window.available),
        limit=THROTTLED,
        says="a CPU quota held the threads back for {value:.1%} of the time",
        unknown="no control group of this process has a CPU quota",
    ),
    Watch(
        name="window_cpu_thermal_events",
        unit="1",
        value=lambda window: window.cooled,
        limit=COOLED,
        says="heat slowed the CPU down ({value:.0f} events)",
        unknown="this machine does not count thermal events of its CPUs",
    ),
    Watch(
        name="window_major_faults",
        unit="1",
        value=lambda window: window.major_faults,
        limit=MAJOR_FAULTS,
        says="{value:.0f} pages of memory were read from a disk",
    ),
    Watch(
        name="window_cpu_clock",
        unit="Hz",
        value=lambda window: window.clock,
        better="none",
        unknown="this machine does not tell the clock of its cores",
    ),
    Watch(
        name="window_involuntary_switches",
        unit="1",
        value=lambda window: window.switches,
    ),
    Watch(
        name="window_garbage_collection",
        unit="fraction",
        value=lambda window: window.collecting / window.seconds,
        limit=COLLECTING,
        says="Python collected garbage for {value:.1%} of the time",
    ),
)
_NOT_TOLD = "this GPU or its driver does not tell"
GPU_WATCHES = (
    Watch(
        name="window_gpu_other_processes",
        unit="1",
        value=lambda window: window.gpu_others,
        limit=GPU_OTHERS,
        says="{value:.0f} other process(es) used the GPU",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_thermal_slowdown",
        unit="1",
        value=lambda window: window.gpu_thermal,
        limit=GPU_SLOWED,
        says="heat slowed the GPU down (at {window.gpu_temperature:.0f} degrees Celsius)",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_thermal_share",
        unit="fraction",
        value=lambda window: window.gpu_thermal_share,
        limit=GPU_HOT,
        says="heat slowed the GPU down for {value:.1%} of the time",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_power_share",
        unit="fraction",
        value=lambda window: window.gpu_power_share,
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_power_cap",
        unit="1",
        value=lambda window: window.gpu_power_cap,
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_clock_drop",
        unit="fraction",
        value=lambda window: window.gpu_clock_drop,
        limit=CLOCK_DROP,
        says="the GPU's clock fell by {value:.0%} in the window",
        only_if=lambda window: window.gpu_slowed_by_trouble and not window.gpu_power_cap > 0,
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_power_brake",
        unit="1",
        value=lambda window: window.gpu_power_brake,
        limit=GPU_SLOWED,
        says="the power supply made the GPU slow down",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_hardware_slowdown",
        unit="1",
        value=lambda window: window.gpu_slowdown,
        limit=GPU_SLOWED,
        says="the GPU's hardware halved its clock",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_clock_before",
        unit="Hz",
        value=lambda window: window.gpu_clock_before,
        better="none",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_clock_after",
        unit="Hz",
        value=lambda window: window.gpu_clock_after,
        better="none",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_temperature",
        unit="degC",
        value=lambda window: window.gpu_temperature,
        better="none",
        unknown=_NOT_TOLD,
    ),
    Watch(
        name="window_gpu_allocation_retries",
        unit="1",
        value=lambda window: window.gpu_retries,
        limit=GPU_RETRIES,
        says="memory ran out {value:.0f} times, and torch's allocator got over it",
        unknown="torch has not begun to count",
    ),
)


def measure(
    watches: Sequence[Watch], windows: Sequence[Window], unknown: str = ""
) -> list[Measurement]:
    """A measurement of each, one value by rank; absent if a rank has none, `unknown` says why."""
    return [_measurement(watch, windows, unknown or watch.unknown) for watch in watches]


def _measurement(watch: Watch, windows: Sequence[Window], unknown: str) -> Measurement:
    values = [watch.value(window) for window in windows]
    blank = [str(rank) for rank, value in enumerate(values) if not math.isfinite(value)]
    name, unit, better = watch.name, watch.unit, watch.better
    if not blank:
        samples = tuple((value,) for value in values)
        return Measurement(name=name, unit=unit, better=better, samples=samples)
    reason = unknown + (f" (rank {', '.join(blank)})" if len(blank) < len(values) else "")
    return Measurement(name=name, unit=unit, better=better, status="absent", reason=reason)


def judge(watches: Sequence[Watch], windows: Sequence[Window]) -> list[str]:
    """What disturbed the windows: a reason per watch, the worst rank's, named if there are more."""
    reasons = []
    for watch in watches:
        disturbed = [rank for rank, window in enumerate(windows) if watch.disturbs(window)]
        if disturbed:
            worst = max(disturbed, key=lambda rank: watch.value(windows[rank]))
            text = watch.says.format(value=watch.value(windows[worst]), window=windows[worst])
            reasons.append(f"rank {worst}: {text}" if len(windows) > 1 else text)
    return reasons
