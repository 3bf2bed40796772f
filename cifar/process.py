"""The environment variables that a training process runs with, chosen for speed and steadiness.

They are read when the C library, OpenMP and torch start, so they must be set before the process
starts. Nothing here imports torch.
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cifar.errors import ConfigError
from cifar.ranks import local_world_size

MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Makes glibc keep freed memory: no block of its own mapping, and hardly any trimming, in bytes.

A large MALLOC_MMAP_THRESHOLD_ would do the same, but older glibc (2.33) ignores one above 32 MiB.
Otherwise every step returns its activations to the kernel and faults them in again. How much that
costs differs between machines: from nothing that could be told to a third of a training step.
"""

SPIN = {"GOMP_SPINCOUNT": "100000"}
"""How often idle threads of GNU OpenMP, which torch ships, look for work before they sleep.

Milliseconds per ResNet-20 training step of 64 images on two cores, alone (mean of two processes) /
beside one / beside two busy processes (one process each), and per image at batch 1, alone: library
default 181 / 659 / 752, 4.8; OMP_WAIT_POLICY=PASSIVE 240 / 358 / 582, 11.8; this 169 / 509 / 410,
3.0. So PASSIVE was better beside one busy process alone. A user's own OMP_WAIT_POLICY stands.
"""

RECORDED_PREFIXES = (
    *("MALLOC_", "GLIBC_"),
    *("OMP_", "GOMP_", "KMP_"),
    *("MKL_", "ONEDNN_", "DNNL_", "ATEN_"),
    *("CUBLAS_", "CUDNN_", "NCCL_"),
    *("PYTORCH_", "TORCHINDUCTOR_", "TRITON_"),
)
"""Of variables that change how fast or how a process computes; records hold those that are set:
allocators, threads, libraries of kernels, torch and its compilers."""
RECORDED_VARIABLES = (
    "LD_PRELOAD",
    "CXX",
    "CC",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
)
"""Such variables whose prefix is shared with many that change nothing."""
_LOCATIONS = ("_DIR", "_FILE", "_HOME", "_PATH", "_URL")
"""Endings of variables that say where something lies, not what is computed."""
_SET_BY_PROGRAMS = (
    *("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_COMM_ID"),
    *("KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK"),
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # by DeepSpeed, in its own processes alone
)
"""What launchers and libraries set by themselves, so that not every process of a machine has it:
the launcher, the kind of GPU and the software are recorded anyway."""

_THREADS = "OMP_NUM_THREADS"
_RESTARTED = "CIFAR_RESTARTED"

IN_C = "in-c"
"""Name of a thread for a call in C that may outlast the program."""


ROOT = Path("/")
"""Where `proc` and `sys` are."""


def available_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: of those that it may run on, as many as quotas pay for.

    A quota of 2.5 cores is 2: a third thread would be held back, and the others wait for it.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.floor(min(usable or 1, _quota(root))))


def has_nvidia_gpus(root: Path = ROOT) -> bool:
    """Whether the driver of NVIDIA's GPUs knows one of this machine."""
    with contextlib.suppress(OSError):
        return any((root / "proc/driver/nvidia/gpus").iterdir())
    return False


def _quota(root: Path) -> float:
    """Cores' worth of time that this process's control group and those around it leave to it.

    https://docs.kernel.org/scheduler/sched-bwc.html
    """
    least = math.inf
    for group in cpu_groups(root):
        with contextlib.suppress(OSError, ValueError):
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = ((group / name).read_text() for name in names)
            if float(quota) > 0:  # version 2 says "max" for none, version 1 says -1
                least = min(least, float(quota) / float(period))
    return least


def cpu_groups(root: Path = ROOT) -> Iterator[Path]:
    """Folders of the control groups, of version 2 or 1, that count this process's CPU time."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = mount / path.lstrip("/")
        yield from (up for up in (folder, *folder.parents) if up.is_relative_to(mount))


def worker_environment(num_processes: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base` and what it lacks of the settings for one of `num_processes` on this machine.

    Threads are shared out evenly, one per process at least. What `base` sets wins.

    Raises:
        ConfigError: `base` sets another number of threads than 1, 2, ...
    """
    given = base.get(_THREADS, "1")
    if not (given.isdecimal() and int(given)):
        raise ConfigError(f"{_THREADS}: {given!r}: give 1 or more, or unset it")
    threads = max(1, available_cores() // num_processes)
    spin = {} if "OMP_WAIT_POLICY" in base else SPIN
    return {**MALLOC, **spin, _THREADS: str(threads), **base}


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set of `RECORDED_PREFIXES` and `RECORDED_VARIABLES`, by name."""
    return {name: environ[name] for name in sorted(environ) if _is_recorded(name)}


def _is_recorded(name: str) -> bool:
    if name.endswith(_LOCATIONS) or name in _SET_BY_PROGRAMS:
        return False
    return name.startswith(RECORDED_PREFIXES) or name in RECORDED_VARIABLES


def differences(environ: Mapping[str, str]) -> list[str]:
    """Where a process was given other settings than it gets where nobody sets any.

    Each as `NAME=value (bench: value)`: by the user, or by a launcher that gives a process one
    thread.
    """
    chosen = worker_environment(local_world_size(environ), {})
    found = {name: environ.get(name) for name in chosen}
    return [
        (f"{name} unset" if value is None else f"{name}={value}") + f" (bench: {chosen[name]})"
        for name, value in found.items()
        if value != chosen[name]
    ]


def ensure_environment() -> None:
    """Start this program anew with `worker_environment`, unless it runs with the malloc settings.

    The new program takes this one's place (exec), so its process id, pipes and a launcher's rank
    variables stay. Call it first thing in a program, before torch is imported. Systems other than
    Linux, whose C libraries have no such settings, are left as they are. Ctrl-C waits until the new
    program is here again, where it is taken care of.

    Raises:
        ConfigError: a launcher's `LOCAL_WORLD_SIZE`, or the number of threads, is no number.
    """
    environment = worker_environment(local_world_size(os.environ), os.environ)
    settled = MALLOC.keys() <= os.environ.keys() or _RESTARTED in os.environ
    if settled or sys.platform != "linux":
        if _RESTARTED in os.environ:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return
    assert "torch" not in sys.modules, "OpenMP has read its settings already"
    sys.stdout.flush()
    sys.stderr.flush()
    argv = [sys.executable, *sys.orig_argv[1:]]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # stays with the new program
    os.execve(sys.executable, argv, {**environment, _RESTARTED: "1"})  # noqa: S606


def run_to_end(work: Callable[[], int]) -> int:
    """A program's exit code, or its end with that code where the interpreter's end would abort it.

    A group that was not left by all together is left by none: to take NCCL down alone may wait for
    the others, which wait for this process (https://github.com/NVIDIA/nccl/issues/863), and at the
    interpreter's end the threads of a group abort it, as of those that DeepSpeed's hooks hold in
    autograd (https://github.com/pytorch/pytorch/issues/190489), or one that comes back from C.
    """
    try:
        code = work()
    except Exception:
        if not _would_abort():
            raise
        sys.excepthook(*sys.exc_info())  # torch's names the rank in every line
        code = 1
    if _would_abort():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _would_abort() -> bool:
    """Whether this process has not left its group, has used ZeRO, whose groups nobody leaves, or
    has a thread in C.
    """
    group = sys.modules.get("torch.distributed")
    formed = group is not None and group.is_available() and group.is_initialized()
    in_c = any(thread.name == IN_C for thread in threading.enumerate())
    return bool(formed) or "cifar.zero" in sys.modules or in_c
