"""The devices that a run measures on at the same time: `bench run --devices`. No torch."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from bench.cores import pinned, read_cores, shares, write_cores
from bench.counters import usable_cores
from bench.job import DEVICE, SIDE_BY_SIDE
from bench.nvml import near_cores, visible_gpus
from bench.present import present_environment
from bench.record import Environment
from bench.spec import Task
from cifar.config import require
from cifar.errors import ConfigError

NO_VARIABLES: Mapping[str, str] = MappingProxyType({})
CPU = "cpu:"
"""Before the numbers of the cores that are a device."""
_SHOWN = "CUDA_VISIBLE_DEVICES"
_PLACING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")
"""Variables that would put the threads of all cells on the same cores."""


class Present(Protocol):
    """What a worker of so many processes, with these variables besides, runs on now."""

    def __call__(
        self, num_processes: int, /, *, variables: Mapping[str, str] = NO_VARIABLES
    ) -> Environment:
        """As of a process that runs on the cores that this thread may use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What one process of a cell computes on, and the cores that it may use for that."""

    name: str = ""
    """As the user writes it: `0`, `GPU-...`, `cpu:0-3`; empty: whatever the machine has."""
    gpu: str = ""
    """What `CUDA_VISIBLE_DEVICES` calls it; empty: no GPU."""
    cores: tuple[int, ...] = ()
    """Empty: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The devices of one cell while it is measured; `beside` are in use in all."""

    devices: tuple[Device, ...]
    beside: int = 1

    @property
    def label(self) -> str:
        """For people: `0,1`, `cpu:0-3`; empty of the whole machine."""
        return ",".join(device.name for device in self.devices)

    @property
    def cores(self) -> tuple[int, ...]:
        """That the cell may use; empty: all."""
        return tuple(core for device in self.devices for core in device.cores)

    @property
    def variables(self) -> dict[str, str]:
        """That show its processes these devices alone; none of the whole machine."""
        if not self.label:
            return {}
        gpus = ",".join(device.gpu for device in self.devices if device.gpu)
        kind = "cuda" if gpus else "cpu"
        return {_SHOWN: gpus, SIDE_BY_SIDE: str(self.beside), DEVICE: kind}

    def environment(self, present: Present, num_processes: int) -> Environment:
        """What a worker runs on here."""
        with pinned(self.cores):
            return present(num_processes, variables=self.variables)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The devices of this machine that a run uses, all of one kind.

    Without `devices` it is used as a whole, by one cell at a time. `locks` name what no other
    run may measure on meanwhile: see `bench.device_lock`.
    """

    devices: tuple[Device, ...] = ()
    locks: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[Device, ...]:
        """The devices that cells are given; the whole machine is one."""
        return self.devices or (Device(),)

    def needs(self, num_processes: int) -> int:
        """How many of the slots a cell of so many processes takes."""
        return num_processes if self.devices else 1

    def share(self, num_processes: int) -> float:
        """The same as a part of all."""
        return self.needs(num_processes) / len(self.slots)

    def place(self, devices: Sequence[Device]) -> Place:
        """Where a cell that was given these devices runs."""
        return Place(devices=tuple(devices), beside=len(self.slots))

    def first_place(self, num_processes: int) -> Place:
        """One of those where a cell of so many processes may run; they are all alike."""
        return self.place(self.slots[: self.needs(num_processes)])

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise a ConfigError if a cell has more processes than there are devices."""
        most = max((task.cell.num_processes for task in tasks), default=1)
        remedy = f"--devices names {len(self.slots)}; name as many, or give fewer processes"
        require(self.needs(most) <= len(self.slots), "num-processes", most, remedy)


def find_machine(
    words: Sequence[str],
    num_processes: int = 1,
    *,
    spread: bool = False,
    present: Present = present_environment,
    environ: Mapping[str, str] = os.environ,
) -> Machine:
    """The devices that a user names; for none, the whole machine, used by `num_processes`.

    To `spread` cells of so many processes where none are named, its GPUs that are alike, if they
    are enough for several cells. GPUs have the numbers that a program sees, so under
    `CUDA_VISIBLE_DEVICES` those of its entries.

    Raises:
        ConfigError: a word that names no device, one twice, devices of several kinds, more of them
            than there are cores.
    """
    if spread and not words:
        words = _alike(num_processes, present, environ)
    if not words:
        return _whole(num_processes, present, environ)
    twice = [word for word, count in Counter(words).items() if count > 1]
    require(not twice, "devices", (twice or [""])[0], "is given twice; give each once")
    if all(word.startswith(CPU) for word in words):
        machine = _of_cores(words)
    else:
        machine = _of_gpus(words, present(1), environ)
    placing = [name for name in _PLACING if name in environ] if len(words) > 1 else []
    if placing:
        raise ConfigError(
            f"{placing[0]}: {environ[placing[0]]!r}: puts all cells on the same cores; unset it, "
            "--devices gives each its own"
        )
    return machine


def _alike(num_processes: int, present: Present, environ: Mapping[str, str]) -> Sequence[str]:
    """The GPUs of the first one's model, as many as make whole cells, if they make several."""
    names = present(1).gpu_names if visible_gpus(environ) else ()
    found = [str(number) for number, name in enumerate(names) if name == names[0]]
    whole = len(found) // num_processes * num_processes
    return found[:whole] if whole > num_processes else ()


def _whole(num_processes: int, present: Present, environ: Mapping[str, str]) -> Machine:
    """Of its GPUs those that the cells use are kept from others, where there is none its cores."""
    gpus = present(1).gpu_ids[:num_processes] if visible_gpus(environ) else ()
    return Machine(locks=gpus or _core_locks(usable_cores()))  # torch may see no GPU that is there


def _core_locks(cores: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"core-{core}" for core in sorted(cores))


def _of_cores(words: Sequence[str]) -> Machine:
    """Groups of cores."""
    usable, seen = usable_cores(), set[int]()
    devices = []
    for word in words:
        try:
            cores = read_cores(word.removeprefix(CPU), "+")
        except ValueError:
            raise ConfigError(
                f"devices: {word!r}: give numbers of cores, such as cpu:0-3 or cpu:0-3+8-11"
            ) from None
        has = f"this process may use the cores {write_cores(usable)}; give some of those"
        require(usable >= set(cores), "devices", word, has)
        require(seen.isdisjoint(cores), "devices", word, "has cores of another one; give each once")
        seen |= set(cores)
        devices.append(Device(name=word, cores=cores))
    sizes = {len(device.cores) for device in devices}
    remedy = "have different numbers of cores, so repeats would differ; give each as many"
    require(len(sizes) == 1, "devices", ",".join(words), remedy)
    return Machine(devices=tuple(devices), locks=_core_locks(seen))


def _of_gpus(words: Sequence[str], here: Environment, environ: Mapping[str, str]) -> Machine:
    """GPUs, each with its share of the cores, of those that are near it if possible."""
    numbers = [_number(word, here) for word in words]
    twice = [word for word, number in zip(words, numbers, strict=True) if numbers.count(number) > 1]
    require(not twice, "devices", ",".join(twice), "are the same GPU; give each once")
    kinds = {number: here.gpu_names[number] for number in numbers}
    told = ", ".join(f"{number} is {name}" for number, name in kinds.items())
    remedy = f"{told}: repeats on different models do not compare; give GPUs of one model"
    require(len(set(kinds.values())) == 1, "devices", ",".join(words), remedy)
    cores = shares([near_cores(here.gpu_ids[number]) for number in numbers])
    if cores is None:
        raise ConfigError(
            f"devices: {','.join(words)!r}: this process may use {here.cpu_count} cores, and each "
            f"cell needs one; give at most {here.cpu_count} devices"
        )
    shown = [entry.strip() for entry in environ.get(_SHOWN, "").split(",") if entry.strip()]
    devices = tuple(
        Device(name=word, gpu=shown[number] if shown else here.gpu_ids[number], cores=share)
        for word, number, share in zip(words, numbers, cores, strict=True)
    )
    return Machine(devices=devices, locks=tuple(here.gpu_ids[number] for number in numbers))


def _number(word: str, here: Environment) -> int:
    """Of the GPU that a word names, among those that are visible here."""
    count = here.gpu_count
    if word.startswith(CPU):
        raise ConfigError(f"devices: {word!r}: GPUs and cores do not mix; join cores as cpu:0+2-3")
    if not (word.isdecimal() or word.startswith("GPU-")):
        raise ConfigError(
            f"devices: {word!r}: give numbers of GPUs, such as 0,1, their UUIDs, or groups of "
            "cores, such as cpu:0-3,cpu:4-7"
        )
    require(count > 0, "devices", word, "there is no GPU here; give cores, such as cpu:0,cpu:1")
    known = f"there are GPUs 0 to {count - 1} here; give some of those"
    if word.isdecimal():
        require(len(word) < 6 and int(word) < count, "devices", word, known)
        return int(word)
    found = [number for number, uuid in enumerate(here.gpu_ids) if uuid.startswith(word)]
    require(len(found) == 1, "devices", word, "is the UUID of no GPU here; see nvidia-smi -L")
    return found[0]
