"""Memory limits: part of the protocol, kept by the kernel or the GPU's allocator, told as oom."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench_cli import environ

from bench import limits
from bench.environment import collect
from bench.failure import classify
from bench.job import Job
from bench.launchers import launch
from bench.limits import limit_memory
from bench.protocol import Protocol
from bench.spec import Task, grid
from cifar.errors import ConfigError

MIB = 2**20


def test_a_limit_is_part_of_what_is_measured() -> None:
    limited = Protocol(memory_limit=MIB)
    assert limited.digest != Protocol().digest
    assert Protocol(memory_limit=None).digest == Protocol().digest
    with pytest.raises(ConfigError, match="memory-limit: 0: give 1 or more"):
        Protocol(memory_limit=0)


ONEDNN = "Traceback (most recent call last):\n  File\nRuntimeError: could not create a primitive\n"


def test_onednns_error_is_out_of_memory_under_a_limit_alone() -> None:
    reason = "RuntimeError: could not create a primitive"
    assert classify(1, ONEDNN) == ("failed", reason)
    assert classify(1, ONEDNN, limited=True) == ("oom", reason)
    other = ONEDNN.replace("primitive", "primitive descriptor for the convolution")
    assert classify(1, other, limited=True)[0] == "failed"


ALLOCATE = """
import sys
import torch
from bench.limits import limit_memory
limit_memory(int(sys.argv[1]) * 2**20 or None)
torch.empty(int(sys.argv[2]) * 2**18)
print("allocated")
"""


def allocate(limit: int, size: int) -> subprocess.CompletedProcess[str]:
    """Allocate `size` MiB on the CPU under a limit in MiB (0: none), in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", ALLOCATE, str(limit), str(size)],
        env=environ(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no such limit")
def test_a_limit_turns_over_allocation_into_an_error() -> None:
    assert allocate(0, 3000).stdout == "allocated\n"
    assert allocate(2500, 300).stdout == "allocated\n"
    over = allocate(2500, 3000)
    assert over.returncode == 1
    assert classify(1, over.stderr)[0] == "oom"


def test_more_than_is_allowed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (MIB, MIB))
    with pytest.raises(ConfigError, match=r"^memory-limit: 2097152: the process may have 1048576"):
        limits._limit_process(2 * MIB)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no such limit")
def test_a_worker_keeps_to_its_limit_and_says_out_of_memory(tmp_path: Path) -> None:
    """Activations of 4,096 images in resnet20-w4 take about 2 GiB, those of 8 next to nothing."""
    protocol = Protocol(
        warmup_steps=0, timed_steps=1, inference_batch_sizes=(), memory_limit=1536 * MIB
    )
    small, large = (
        launch(Job(task=Task(cell=cell, protocol=protocol)), tmp_path / cell.slug)
        for cell in grid(["resnet20-w4"], ["fp32"], batch_sizes=(8, 4096))
    )
    assert (small.status, small.reason) == ("ok", "")
    assert small.value("peak_memory_bytes") < 1536 * MIB
    assert large.status == "oom", large.reason
    assert "allocate memory" in large.reason or "could not" in large.reason


@pytest.mark.gpu
def test_a_limit_on_a_gpu_is_the_allocators() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(ConfigError, match=r"memory-limit: .*: the device has"):
        limit_memory(total + 1)
    try:
        torch.cuda.empty_cache()
        limit_memory(torch.cuda.memory_reserved() + 256 * MIB)  # tests before may hold some
        torch.ones(64 * MIB // 4, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(512 * MIB // 4, device="cuda")
    finally:
        limit_memory(total)


@pytest.mark.gpu
def test_the_environment_tells_every_gpu_s_memory() -> None:
    found = collect()
    assert len(found.gpu_memory_bytes) == found.gpu_count == torch.cuda.device_count()
    assert found.gpu_names[0] == torch.cuda.get_device_name(0)
    assert found.gpu_memory_bytes[0] == torch.cuda.get_device_properties(0).total_memory
