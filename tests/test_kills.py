"""kill -9 at random moments: of a rank, of the launcher, of the suite; and a disk that fills up.

Twice each by default, twenty times with `-m slow`. KILL_SEED=N repeats the moments of a run.
"""

import contextlib
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import make_dataset, save_npz
from test_bench_cli import FAKE, bench, environ, statuses
from test_run import assert_same
from training import after_step, complaints, finish, start, train

from bench import runs
from bench.record_file import read_records
from cifar.checkpoint import list_checkpoints, read_folder

TIMES = [2, pytest.param(20, marks=pytest.mark.slow)]
STARTED = 8.0
"""Seconds within which a start is killed: about as long as it takes to start and train a while on
an idle machine."""
EPOCHS = 20
"""Epochs for each kill, which comes at the latest when they are over."""


@pytest.fixture
def moments() -> random.Random:
    seed = int(os.environ.get("KILL_SEED", secrets.randbelow(2**16)))
    print(f"KILL_SEED={seed}")  # which pytest shows of a test that fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_npz(tmp_path_factory.mktemp("data") / "toy.npz", make_dataset())


def epochs(times: int) -> tuple[object, ...]:
    return ("--epochs", EPOCHS * times, "--keep-checkpoints", 2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Callable[[int], Path]:
    """The folder of the run that is killed so often elsewhere."""
    root = tmp_path_factory.mktemp("straight")

    def get(times: int) -> Path:
        folder = root / str(times)
        if not folder.exists():
            assert train(toy, folder, *epochs(times)) == 0
        return folder

    return get


def launch(toy: Path, folder: Path, times: int, restarts: int) -> subprocess.Popen[str]:
    """torchrun of one process, whose runs can be equal bit for bit to one without a launcher."""
    return start(
        *("torch.distributed.run", "--standalone", "--max-restarts", restarts, "-m", "cifar"),
        *("train", "--cpu", "--data", f"npz:{toy}", "--model", "resnet20-w4", "-b", 32),
        *("--lr", 0.05, "--no-report", *epochs(times)),
        *("--resume", "auto", "--output-dir", folder),
    )


def wait_to_kill(folder: Path, seconds: float, epochs: int) -> None:
    """Sleep so long, but on a machine that is faster not past so many epochs."""
    ends, metrics = time.monotonic() + seconds, folder / "metrics.jsonl"
    while time.monotonic() < ends:
        if metrics.exists() and metrics.read_text().count("\n") >= epochs:
            return
        time.sleep(0.05)


def workers(launcher: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return launcher.children(recursive=True)
    return []


def stopped(launcher: psutil.Process) -> list[psutil.Process]:
    """A launcher's processes as they are at this moment, so that no checkpoint is replaced."""
    found = []
    for worker in workers(launcher):
        with contextlib.suppress(psutil.Error):
            worker.suspend()
            if worker.status() != psutil.STATUS_ZOMBIE:
                found.append(worker)
    return found


def wait_for_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, "what a killed launcher leaves has to end"


def assert_whole(folder: Path) -> None:
    """No kill has damaged a checkpoint or a line of the metrics."""
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        read_folder(checkpoint)
    if (folder / "metrics.jsonl").exists():
        lines = (folder / "metrics.jsonl").read_text().split("\n")
        assert [json.loads(line)["epoch"] for line in lines[:-1]] == [*range(1, len(lines))]


@pytest.mark.multiprocess
@pytest.mark.parametrize("times", TIMES)
def test_a_rank_that_is_killed_goes_on_where_it_was(
    times: int, toy: Path, tmp_path: Path, straight: Callable[[int], Path], moments: random.Random
) -> None:
    folder = tmp_path / "run"
    launcher = launch(toy, folder, times, restarts=times)
    watched, killed = psutil.Process(launcher.pid), 0
    while killed < times and launcher.poll() is None:
        wait_to_kill(folder, moments.uniform(0, STARTED), EPOCHS * killed + EPOCHS // 2)
        found = stopped(watched)
        try:
            assert_whole(folder)
        finally:
            for worker in found:
                with contextlib.suppress(psutil.Error):
                    worker.kill()
        killed += len(found)
    code, _, err = finish(launcher)
    assert code == 0, err
    assert killed >= times, "or the run was over too soon"
    assert_same(folder, straight(times))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("times", TIMES)
def test_a_launcher_that_is_killed_takes_its_processes_with_it_and_can_start_again(
    times: int, toy: Path, tmp_path: Path, straight: Callable[[int], Path], moments: random.Random
) -> None:
    folder = tmp_path / "run"
    for _ in range(times):
        launcher = launch(toy, folder, times, restarts=0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(moments.uniform(0, STARTED))
        left = workers(psutil.Process(launcher.pid)) if launcher.poll() is None else []
        launcher.kill()
        launcher.communicate()
        wait_for_end(left)
        assert_whole(folder)
    code, _, err = finish(launch(toy, folder, times, restarts=0))
    assert code == 0, err
    assert_same(folder, straight(times))


CELLS = ("run", "--models", "resnet20,resnet18,resnet34", "--repeats", "3")


@pytest.mark.parametrize("times", TIMES)
def test_a_suite_that_is_killed_keeps_what_it_has_finished(
    times: int, tmp_path: Path, moments: random.Random
) -> None:
    """Every record that was complete stays, none is damaged, and the rest is measured."""
    words, finished = list(CELLS), 0
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, str(FAKE), *words], cwd=tmp_path, env=environ(), **nowhere
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 5.0))
        process.kill()
        process.wait()
        if list(tmp_path.glob("runs/*/run.json")):
            run = runs.newest(tmp_path / "runs")
            words = ["run", "--resume", run.id]
            found = len(read_records(run.records_file)) if run.records_file.exists() else 0
            assert found >= finished
            finished = found
    done = bench(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == ["ok"] * 9, "none twice, none missing"


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, which can fill up."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount") or os.getuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("spare", [0, 1, 8])
def test_a_disk_that_is_full_costs_no_checkpoint(
    spare: int, toy: Path, tmp_path: Path, straight: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """After the first epochs something else takes all but a few pages of 4 KiB."""
    expected = straight(1)
    with disk(tmp_path / "disk", "8m") as mounted:

        def fill() -> None:
            free = shutil.disk_usage(mounted).free
            (mounted / "filler").write_bytes(bytes(max(0, free - spare * 4096)))

        folder = mounted / "run"
        auto = (*epochs(1), "--resume", "auto")
        with after_step(14, fill):
            assert train(toy, folder, *auto) == 1
        (line,) = complaints(capsys.readouterr().err)
        assert "cannot be written: No space left on device; make room" in line
        assert [path.name[-2:] for path in list_checkpoints(folder / "checkpoints")] == ["09", "12"]
        assert_whole(folder)
        (mounted / "filler").unlink()
        assert train(toy, folder, *auto) == 0
        assert_same(folder, expected)
