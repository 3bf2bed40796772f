"""What one process found: measurements, environment and status."""

import hashlib
import platform
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bench.protocol import Protocol
from bench.spec import Cell
from bench.stats import headline, throughput
from cifar.config import require
from cifar.serialize import STRICT

SCHEMA_VERSION = 2
LARGEST = 1e100
"""No sample's size is beyond it, nor that of a number of seconds below its inverse, so that sums
and ratios of them are numbers too."""
MOST_BYTES = 2**63
_WHICH_GPUS = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"[a-z][a-z0-9_]*")

Label = str | int | float | bool
Status = Literal["ok", "failed", "unsupported", "oom", "timeout"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One metric of one process group, as raw samples; statistics are derived on reading.

    `samples` holds one tuple per rank with one value per step or iteration; a scalar is
    `((value,),)`. They are in `unit`, a base unit: "s/sample", "bytes", "s", "1", "fraction". A
    rate ("samples/s") alone holds seconds per step instead, and its label `samples_per_step` the
    samples of one step over all ranks.

    Raises:
        ConfigError (a ValueError): a name of other characters than a-z, 0-9 and _, NaN, infinity
            or beyond `LARGEST`, no samples though ok, ranks with more of them than others, seconds
            that are none, no reason though not ok.
    """

    __pydantic_config__: ClassVar = STRICT

    name: str
    unit: str
    better: Literal["higher", "lower", "none"]
    labels: dict[str, Label] = field(default_factory=dict)
    samples: tuple[tuple[float, ...], ...] = ()
    status: Literal["ok", "absent", "failed"] = "ok"
    reason: str = ""

    def __post_init__(self) -> None:
        named = _NAME.fullmatch(self.name) is not None
        require(named, "measurement", self.name, "name it in small letters, digits and _")
        if not all(-LARGEST <= value <= LARGEST for rank in self.samples for value in rank):
            values = [value for rank in self.samples for value in rank]
            bad = [value for value in values if not -LARGEST <= value <= LARGEST]
            require(False, f"{self.name} samples", bad, f"must be finite, up to {LARGEST:g}")
        if self.status != "ok":
            self._require(bool(self.reason), "reason", f"say why it is {self.status}")
            return
        sampled = bool(self.samples) and all(self.samples)
        self._require(sampled, "samples", "needs one or more from every rank")
        even = len({len(rank) for rank in self.samples}) == 1
        self._require(even, "samples", "needs as many from every rank")
        timed = self.unit in ("s/sample", "samples/s")
        positive = not timed or min(map(min, self.samples)) >= 1 / LARGEST
        self._require(positive, "samples", "needs seconds above 0")
        if self.unit == "samples/s":
            counted = self._samples_per_step > 0
            self._require(counted, "labels", "a rate needs samples_per_step")

    def _require(self, holds: bool, part: str, remedy: str) -> None:
        if not holds:
            require(False, f"{self.name} {part}", getattr(self, part), remedy)

    @property
    def _samples_per_step(self) -> float:
        found = self.labels.get("samples_per_step", 0)
        return 0.0 if isinstance(found, str) or found > LARGEST else float(found)

    @property
    def value(self) -> float | None:
        """The headline in `unit`: a rate's throughput, else the worst rank's median; None if none.

        See `bench.stats.throughput` and `bench.stats.headline`.
        """
        if self.status != "ok":
            return None
        if self.unit == "samples/s":
            return throughput(self.samples, self._samples_per_step)
        return headline(self.samples, self.better)


def this_host() -> str:
    """8 hexadecimal digits that tell this machine from others, without giving its name away."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What a process ran on and with. What is unknown is None, or "" with its reason beside.

    Raises:
        ConfigError: more memory than there can be.
    """

    __pydantic_config__: ClassVar = STRICT

    cpu_model: str
    cpu_count: int
    """Cores this process may use."""
    memory_bytes: int
    gpu_names: tuple[str, ...] = ()
    """One name per visible GPU."""
    gpu_memory_bytes: tuple[int, ...] = ()
    """The whole memory of each of them; empty in records that do not tell."""
    gpu_ids: tuple[str, ...] = ()
    """The UUID of each of them, `GPU-...`; empty in records that do not tell."""
    gpu_power_limits: tuple[int | None, ...] = ()
    """Watts that each was set to draw at most; None: the driver does not tell of that one."""
    gpu_application_clocks: tuple[tuple[int, int] | None, ...] = ()
    """MHz of graphics and of memory that programs on each of them were given, likewise."""
    cores: str = ""
    """The numbers of the CPU cores that this process may run on, `0-3,8`; empty in records that do
    not tell."""
    side_by_side: int = 1
    """Devices of this machine that the run measured on at the same time, this one's included: the
    others had other GPUs and cores, but the same memory, caches and power supply."""
    driver: str | None = None
    """Of the GPUs."""

    os: str
    """System and kernel, e.g. `Linux 6.8.0`."""
    python: str
    torch: str
    torchvision: str | None = None
    accelerate: str
    numpy: str
    cuda: str | None = None
    cudnn: str | None = None
    tools: dict[str, str] = field(default_factory=dict)
    """Versions by name of the compilers and libraries that a backend or a network may need: those
    installed."""

    code_digest: str
    """Over the sources of `bench`, `cifar` and `launch`."""
    git_sha: str | None = None
    git_dirty: bool | None = None
    git_reason: str = ""
    """Why there is no sha."""

    worker_env: dict[str, str] = field(default_factory=dict)
    """Environment variables that the launcher chose (malloc, OpenMP, ...)."""
    threads: int
    """Of one process's CPU kernels."""
    started: str
    """UTC, ISO 8601."""
    host: str = ""
    """See `this_host`."""

    def __post_init__(self) -> None:
        for size in (self.memory_bytes, *self.gpu_memory_bytes):
            require(0 <= size < MOST_BYTES, "memory", size, f"give less than {MOST_BYTES} bytes")

    @property
    def settings(self) -> dict[str, str]:
        """The worker's environment variables without the one that says which of the GPUs it has."""
        return {name: value for name, value in self.worker_env.items() if name != _WHICH_GPUS}

    @property
    def gpu_count(self) -> int:
        """Visible GPUs."""
        return len(self.gpu_names)

    @property
    def gpu_limits(self) -> tuple[object, ...]:
        """What power and clocks the GPUs are held to; empty where nothing tells, as on a CPU."""
        told = (*self.gpu_power_limits, *self.gpu_application_clocks)
        return (self.gpu_power_limits, self.gpu_application_clocks) if any(told) else ()

    @property
    def device(self) -> str:
        """The kind of device that processes compute on here: `cuda`, or `cpu` without a GPU."""
        return "cuda" if self.gpu_names else "cpu"

    @property
    def hardware(self) -> str:
        """The folder under `results/`: `nvidia-h200-x1`, or `amd-epyc-9b45-2c` without a GPU."""
        name = self.gpu_names[0] if self.gpu_names else self.cpu_model
        text = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", name.lower())
        slug = re.sub(r"[^a-z0-9.]+", "-", text).strip("-.") or "unknown"
        return f"{slug}-x{self.gpu_count}" if self.gpu_names else f"{slug}-{self.cpu_count}c"

    @property
    def packages(self) -> tuple[str | None, ...]:
        """The interpreter and the libraries that are the same on all nodes of a cluster."""
        return (
            *(self.python, self.torch, self.torchvision),
            *(self.accelerate, self.numpy, self.cuda),
        )

    def key(self) -> dict[str, Any]:
        """What must be equal for two records to be comparable, by part.

        The code is known by the digest of its sources, not by its commit: a commit may change only
        prose, and uncommitted changes count. Memory size is left out; a reboot may change it. So
        are which of equal GPUs it was and the numbers of the cores, but not how many devices were
        measured on at the same time, nor the limits that somebody has set their power and clocks.
        """
        return {
            "code": self.code_digest,
            "software": (
                self.os,
                *self.packages,
                self.cudnn,
                self.driver,
                tuple(sorted(self.tools.items())),
            ),
            "hardware": (self.cpu_model, self.cpu_count, self.gpu_names, self.gpu_limits),
            "worker environment": (
                tuple(sorted(self.settings.items())),
                self.threads,
                self.side_by_side,
            ),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """The data set that was read."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    fingerprint: str
    """See `cifar.data.dataset.Dataset.fingerprint`."""
    train_samples: int
    test_samples: int
    classes: int
    image_shape: tuple[int, int, int] | None = None
    """`[C, H, W]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One repeat of one cell in one fresh process group, failures included.

    Raises:
        ConfigError: a status other than ok without a reason, or no duration.
    """

    __pydantic_config__: ClassVar = STRICT

    schema_version: int = SCHEMA_VERSION
    run_id: str = ""
    suite: str = ""
    cell: Cell
    protocol: Protocol
    repeat: int = 0
    status: Status
    reason: str = ""
    started: str
    """UTC, ISO 8601."""
    duration_s: float
    """From launch to end, start-up included."""
    returncode: int | None = None
    environment: Environment | None = None
    """None when the process died before it said."""
    data: DataFacts | None = None
    effective: dict[str, Label] = field(default_factory=dict)
    """What was observed: precision, layout, device, process count, wrapper."""
    invalid: tuple[str, ...] = ()
    """Why the numbers are not to be trusted: what disturbed the timed window."""
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.status == "ok" or bool(self.reason),
            "reason",
            self.reason,
            f"say why the record is {self.status}",
        )
        require(0 <= self.duration_s <= LARGEST, "duration_s", self.duration_s, "give seconds")

    @property
    def valid(self) -> bool:
        """Whether nothing disturbed the measurement."""
        return not self.invalid

    @property
    def finished(self) -> bool:
        """Whether trying again would change nothing: it is ok or unsupported, with every number."""
        broken = any(each.status == "failed" for each in self.measurements)
        return self.status in ("ok", "unsupported") and not broken

    @property
    def exit_code(self) -> int:
        """With which a worker that writes this record ends: 1 if something went wrong, else 0."""
        return 0 if self.status in ("ok", "unsupported") else 1

    @property
    def key(self) -> tuple[str, str, int]:
        """Digests of cell and protocol, and the repeat: equal to its task's key."""
        return (self.cell.digest, self.protocol.digest, self.repeat)

    def find(self, name: str, **labels: Label) -> Measurement | None:
        """The first measurement of that name that carries these labels."""
        for measurement in self.measurements:
            if measurement.name == name and labels.items() <= measurement.labels.items():
                return measurement
        return None

    def value(self, name: str, **labels: Label) -> float | None:
        """The headline of `find(name, **labels)`, None when there is none."""
        measurement = self.find(name, **labels)
        return measurement.value if measurement else None
