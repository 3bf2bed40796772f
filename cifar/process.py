"""The environment variables that a training process runs with, chosen for speed and steadiness.

They are read when the C library, OpenMP and torch start, so they must be set before the process
starts. Nothing here imports torch.
"""

import os
import sys
from collections.abc import Mapping

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Makes glibc keep freed memory, in bytes.

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

RECORDED_VARIABLES = (
    *MALLOC,
    *SPIN,
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
    "LD_PRELOAD",
    "CXX",
    "CC",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_SOCKET_IFNAME",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
)
"""Variables that change how fast or how a process computes; records hold those that are set.

What a launcher sets by itself is left out, as the launcher and the kind of GPU are recorded anyway:
TORCH_NCCL_ASYNC_ERROR_HANDLING, NCCL_P2P_DISABLE, NCCL_IB_DISABLE.
"""
RECORDED_PREFIXES = ("TORCHINDUCTOR_", "TRITON_")
"""Of variables that are recorded too: the compilers' settings."""
_LOCATIONS = ("_DIR", "_HOME", "_PATH", "_URL")
"""Endings of such variables that say where something lies, not what is computed."""

_RESTARTED = "CIFAR_RESTARTED"


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_environment(num_processes: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base` and what it lacks of the settings for one of `num_processes` on this machine.

    Threads are shared out evenly, one per process at least. What `base` sets wins.
    """
    threads = max(1, available_cores() // num_processes)
    spin = {} if "OMP_WAIT_POLICY" in base else SPIN
    return {**MALLOC, **spin, "OMP_NUM_THREADS": str(threads), **base}


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The recorded variables that are set: `RECORDED_VARIABLES` in order, then the compilers'."""
    compilers = sorted(
        name
        for name in environ
        if name.startswith(RECORDED_PREFIXES) and not name.endswith(_LOCATIONS)
    )
    return {name: environ[name] for name in (*RECORDED_VARIABLES, *compilers) if name in environ}


def differences(environ: Mapping[str, str]) -> list[str]:
    """Where a process was given other settings than it gets where nobody sets any.

    Each as `NAME=value (bench: value)`: by the user, or by a launcher that gives a process one
    thread.
    """
    chosen = worker_environment(_local_processes(environ), {})
    found = {name: environ.get(name) for name in chosen}
    return [
        (f"{name} unset" if value is None else f"{name}={value}") + f" (bench: {chosen[name]})"
        for name, value in found.items()
        if value != chosen[name]
    ]


def _local_processes(environ: Mapping[str, str]) -> int:
    return int(environ.get("LOCAL_WORLD_SIZE", "1"))


def ensure_environment() -> None:
    """Start this program anew with `worker_environment`, unless it runs with the malloc settings.

    The new program takes this one's place (exec), so its process id, pipes and a launcher's rank
    variables stay. Call it first thing in a program, before torch is imported. Systems other than
    Linux, whose C libraries have no such settings, are left as they are.
    """
    settled = MALLOC.keys() <= os.environ.keys() or _RESTARTED in os.environ
    if settled or sys.platform != "linux":
        return
    assert "torch" not in sys.modules, "OpenMP has read its settings already"
    sys.stdout.flush()
    sys.stderr.flush()
    environment = worker_environment(_local_processes(os.environ), os.environ)
    argv = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, argv, {**environment, _RESTARTED: "1"})  # noqa: S606
