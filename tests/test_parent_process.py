"""The program that starts the cells leaves the machine to them."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
CELL = [
    "--models=resnet20-w4", "--batch-size=32", "--timed-seconds=12", "--inference-batch-sizes=1",
]  # fmt: skip


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    """Until a file of that pattern has something in it."""
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in folder.glob(pattern)):
        assert process.poll() is None, "bench ended early"
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)


def cpu_seconds(process: psutil.Process) -> float:
    """Of the process itself, its children left out."""
    times = process.cpu_times()
    return times.user + times.system


@pytest.mark.slow
def test_the_parent_uses_under_2_percent_of_a_core_while_a_cell_runs(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()  # with a terminal there is a live display
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "run", *CELL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        wait_for(tmp_path, "runs/*/cells/*/cell.json", process)
        parent = psutil.Process(process.pid)
        before, start = cpu_seconds(parent), time.monotonic()
        wait_for(
            tmp_path, "runs/*/records.jsonl", process
        )  # the cell's own tells its beginning too
        spent, wall = cpu_seconds(parent) - before, time.monotonic() - start
        assert wall > 12
        assert spent / wall < 0.02
        assert b"[1/1] resnet20-w4" in os.read(ours, 65536)
        assert process.wait(60) == 0
    finally:
        process.terminate()  # it ends its cell's processes
        process.wait(60)
        os.close(ours)
