"""How a cell's processes are started, watched and ended."""

import contextlib
import importlib.resources
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType

from bench import device_lock
from bench.failure import classify
from bench.job import CELL_FILE, LAUNCHED, RECORD_FILE, Job
from bench.processes import GRACE_SECONDS, MARK, OOM_KILLS, end
from bench.record import Record, Status
from bench.record_file import parse_record
from bench.spec import Cell
from bench.unfinished import explained, is_unfinished, pruned
from cifar.errors import ConfigError, UserError
from cifar.files import write_atomic
from cifar.process import worker_environment
from cifar.serialize import to_json
from cifar.strategy import STRATEGIES

WORKER = "bench.worker"
_STDERR_TAIL = 256 * 1024

LOOK_SECONDS = 0.5
"""Between two looks into the folder of a job that is watched."""

ArgvFor = Callable[[Cell, Path], list[str]]
Watch = Callable[[Path], str]
"""Looks into a job's folder while it runs; returns why to end it early, else an empty text."""


def check_launcher(name: str) -> None:
    """Raise a ConfigError unless it is that of a strategy, see `cifar.strategy`."""
    if name not in STRATEGIES:
        raise ConfigError(f"launcher: {name!r}: choose one of {', '.join(STRATEGIES)}")


def config_for(launcher: str, num_processes: int) -> str:
    """The file in `launch` that configures Accelerate; DDP does nothing for one process.

    Raises:
        ConfigError: no such launcher.
    """
    check_launcher(launcher)
    return "single.yaml" if (launcher, num_processes) == ("ddp", 1) else f"{launcher}.yaml"


def argv_for(cell: Cell, folder: Path) -> list[str]:
    """The command that measures a cell and leaves `folder`/record.json."""
    config = config_for(cell.launcher, cell.num_processes)
    yaml = importlib.resources.files("launch") / config
    options = {
        "--config_file": str(yaml),
        "--num_processes": str(cell.num_processes),
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
        "--main_process_port": "0",  # any free one, so that several jobs do not clash
    }
    words = [word for option in options.items() for word in option]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launch, *words, "-m", WORKER, str(folder)]


def environment_for(num_processes: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment that each of a cell's processes runs in.

    Accelerate's own variables in `base` are left out: they would change what is launched, as
    `ACCELERATE_USE_CPU` the device, and the cell and its launcher's file say that.
    """
    rest = {name: value for name, value in base.items() if not name.startswith("ACCELERATE_")}
    return worker_environment(num_processes, rest)


@contextlib.contextmanager
def _empty_compile_cache(folder: Path) -> Iterator[dict[str, str]]:
    """Variables that give a job a cache of its own, so that it compiles everything anew."""
    cache = folder / "compile-cache"
    shutil.rmtree(cache, ignore_errors=True)
    try:
        yield {
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),  # inherited, it would be used instead
        }
    finally:
        shutil.rmtree(cache, ignore_errors=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a job's processes ended; `returncode` is negative for a signal.

    `pruned` says why they were ended early, `started` is a moment of `OomKills.mark`.
    """

    returncode: int
    timed_out: bool = False
    started: float = 0.0
    pruned: str = ""


def launch(
    job: Job,
    folder: Path,
    *,
    argv_for: ArgvFor = argv_for,
    grace: float = GRACE_SECONDS,
    variables: Mapping[str, str] = MappingProxyType({}),
    watch: Watch | None = None,
) -> Record:
    """Measure a job in fresh processes; whatever becomes of them, the result is a record.

    `folder` receives cell.json, record.json, stdout and stderr. `variables` are set for the
    processes besides. When this returns or raises (KeyboardInterrupt, or what `watch` raises), none
    of the job's processes is left.

    Raises:
        OSError: the folder cannot be written.
    """
    _prepare(job, folder)
    started, clock = datetime.now(UTC), time.monotonic()
    with _empty_compile_cache(folder) as caches:
        environment = environment_for(job.task.cell.num_processes, os.environ)
        environment |= {**caches, **variables}
        argv = argv_for(job.task.cell, folder)
        ending = _run(job, folder, argv, environment, grace=grace, watch=watch)
    record = _judge(job, folder, ending)
    return replace(
        record,
        suite=job.suite,
        run_id=job.run_id,
        started=started.isoformat(timespec="seconds"),
        duration_s=round(time.monotonic() - clock, 3),
        returncode=ending.returncode,
    )


def _prepare(job: Job, folder: Path) -> None:
    """Write cell.json; clear what an earlier attempt left."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [folder / RECORD_FILE, *folder.glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)
    write_atomic(folder / CELL_FILE, to_json(job, indent=2) + "\n")


def _run(
    job: Job,
    folder: Path,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    grace: float,
    watch: Watch | None,
) -> Ending:
    """Start the command, wait until it ends or its time is up, and leave no process behind."""
    mark = f"{os.getpid()}:{time.monotonic_ns()}:{folder}"
    started, timed_out, pruned = OOM_KILLS.mark(), False, ""
    process: subprocess.Popen[bytes] | None = None
    try:
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**environment, MARK: mark, LAUNCHED: str(time.monotonic())},
                start_new_session=True,  # a terminal's Ctrl-C reaches this program alone
                pass_fds=device_lock.descriptors(),
            )
        pruned = _wait(process, job.task.protocol.timeout, folder, watch)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        end([mark], grace)
        returncode = process.poll() if process else None
    return Ending(
        returncode=-signal.SIGKILL if returncode is None else returncode,
        timed_out=timed_out,
        started=started,
        pruned=pruned,
    )


def _wait(
    process: subprocess.Popen[bytes], timeout: float, folder: Path, watch: Watch | None
) -> str:
    """Wait until the command ends, or `watch` says why not to; that is returned.

    Raises:
        subprocess.TimeoutExpired: its time is up.
    """
    deadline = time.monotonic() + timeout
    while watch is not None and time.monotonic() + LOOK_SECONDS < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_SECONDS)
            return ""
        if why := watch(folder):
            return why
    process.wait(max(0.0, deadline - time.monotonic()))
    return ""


def _judge(job: Job, folder: Path, ending: Ending) -> Record:
    """The worker's record if it wrote a good one, else a record of its failure."""
    try:
        record = parse_record((folder / RECORD_FILE).read_text("utf-8"), source=RECORD_FILE)
    except FileNotFoundError:
        return failure(job, *_why(job, folder, ending))
    except (UserError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return failure(job, "failed", f"unreadable {RECORD_FILE}: {' '.join(str(error).split())}")
    if record.key != job.task.key:
        return failure(job, "failed", f"{RECORD_FILE} is of another cell: {record.cell.label}")
    if is_unfinished(record):
        why = ending.pruned
        return pruned(record, why) if why else explained(record, *_why(job, folder, ending))
    if ending.pruned or (not ending.timed_out and ending.returncode == record.exit_code):
        return record
    end = _stopped(job) if ending.timed_out else f"exit code {ending.returncode}"
    return explained(record, record.status, f"{end}, after the record was written")


def _why(job: Job, folder: Path, ending: Ending) -> tuple[Status, str]:
    """What ended the processes before their record was finished."""
    if ending.timed_out:
        return "timeout", _stopped(job)
    limited = job.task.protocol.memory_limit is not None
    told = partial(classify, ending.returncode, _tail(folder / "stderr"), limited=limited)
    if told() == told(oom_kills=1):  # else a kill would be taken from the cell it belongs to
        return told()
    return told(oom_kills=OOM_KILLS.claim(ending.started))


def _stopped(job: Job) -> str:
    return f"stopped after {job.task.protocol.timeout:g} s"


def failure(job: Job, status: Status, reason: str) -> Record:
    """The record of a job whose processes left none."""
    return Record(
        cell=job.task.cell,
        protocol=job.task.protocol,
        repeat=job.task.repeat,
        status=status,
        reason=reason,
        started="",
        duration_s=0.0,
    )


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _STDERR_TAIL))
        return file.read().decode(errors="replace")
