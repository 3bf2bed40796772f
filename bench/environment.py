"""What ran: hardware, software, code and process environment, as observed in this process.

`python -m bench.environment` prints it as JSON.
"""

import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from bench.cores import write_cores
from bench.counters import usable_cores
from bench.job import SIDE_BY_SIDE
from bench.nvml import Gpu, NvmlError
from bench.record import Environment, this_host
from cifar.agreement import ROOT, installed, sources_digest
from cifar.compilers import compiler_versions
from cifar.process import available_cores, recorded_environment
from cifar.serialize import to_json

_PACKAGES = ("bench", "cifar", "launch")
_TOOLS = ("triton", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "timm", "deepspeed")


def collect() -> Environment:
    """Describe this process and its machine."""
    sha, dirty, reason = _git()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    ids = tuple(f"GPU-{gpu.uuid}" for gpu in gpus)
    limits = [_limits(uuid) for uuid in ids]
    return Environment(
        cpu_model=cpu_model(),
        cpu_count=available_cores(),
        memory_bytes=psutil.virtual_memory().total,
        gpu_names=tuple(gpu.name for gpu in gpus),
        gpu_memory_bytes=tuple(gpu.total_memory for gpu in gpus),
        gpu_ids=ids,
        gpu_power_limits=tuple(power for power, _ in limits),
        gpu_application_clocks=tuple(clocks for _, clocks in limits),
        cores=write_cores(usable_cores()),
        side_by_side=int(os.environ.get(SIDE_BY_SIDE, "1")),
        driver=_driver(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=installed("torchvision"),
        accelerate=installed("accelerate") or "unknown",
        numpy=installed("numpy") or "unknown",
        cuda=torch.version.cuda,
        cudnn=_cudnn(),
        tools=_tools(),
        code_digest=code_digest(),
        git_sha=sha,
        git_dirty=dirty,
        git_reason=reason,
        worker_env=recorded_environment(os.environ),
        threads=torch.get_num_threads(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        host=this_host(),
    )


def _limits(uuid: str) -> tuple[int | None, tuple[int, int] | None]:
    """Power limit and application clocks of a GPU, as far as NVML tells."""
    try:
        gpu = Gpu(uuid)
    except NvmlError:
        return None, None
    return gpu.power_limit(), gpu.application_clocks()


def _tools() -> dict[str, str]:
    """What networks, engines, and compiled and exported backends are built with."""
    versions = {package: installed(package) for package in _TOOLS}
    return compiler_versions() | {name: found for name, found in versions.items() if found}


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """The model name that the kernel gives, else the architecture.

    A virtual machine may hide the number that tells one generation from the next, as in "AMD EPYC";
    family and model of its registers then do.
    """
    facts: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= facts.keys():
        return name
    return f"{name} (family {facts['cpu family']} model {facts['model']})"


def _driver() -> str | None:
    path = Path("/sys/module/nvidia/version")
    if path.exists():
        return path.read_text().strip()
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.splitlines()
    return lines[0] if lines else None


def _cudnn() -> str | None:
    if not torch.cuda.is_available():
        return None
    number = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if number is None else str(number)


def code_digest() -> str:
    """16 hexadecimal digits over the sources of this project's packages."""
    return sources_digest(_PACKAGES, (".py", ".yaml"))


def _git() -> tuple[str | None, bool | None, str]:
    """Commit, whether files differ from it, and why there is none if so."""
    if not shutil.which("git"):
        return None, None, "git is not installed"

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        )

    if git("ls-files", "--error-unmatch", "bench/environment.py").returncode:
        return None, None, "the program does not lie in a git checkout"
    head = git("rev-parse", "HEAD")
    if head.returncode:
        return None, None, "the checkout has no commit"
    return head.stdout.strip(), bool(git("status", "--porcelain").stdout.strip()), ""


if __name__ == "__main__":
    print(to_json(collect()))
