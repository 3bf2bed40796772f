"""Stands in for bench.worker: does what $FAKE says for its model, `MODEL=what,...` or `what`.

A trial of a search goes by `trialN` instead, N counted from 1.
"""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.job import CELL_FILE, RECORD_FILE, Job
from bench.record import DataFacts, Environment, Measurement, Record
from bench.unfinished import PENDING, unfinished
from cifar.files import write_atomic
from cifar.serialize import from_json, to_json


def environment(**fields):
    """A made-up environment; $FAKE_CODE is its code digest."""
    known = {
        "cpu_model": "Fake CPU",
        "cpu_count": 2,
        "memory_bytes": 2**30,
        "os": "Linux",
        "python": "3.12.0",
        "torch": "2.11.0",
        "accelerate": "1.15.0",
        "numpy": "2.0.0",
        "code_digest": os.environ.get("FAKE_CODE", "c0de"),
        "git_reason": "not a checkout",
        "threads": 1,
        "started": "2026-01-01T00:00:00+00:00",
    }
    return Environment(**known | fields)


STUCK = "stuck"
"""The file that a worker makes before it waits for ever."""
DATA = DataFacts(name="toy", fingerprint="f00d", train_samples=96, test_samples=50, classes=10)


def record_of(job, **fields):
    """A finished record of a job."""
    rate = Measurement(
        name="train_throughput",
        unit="samples/s",
        better="higher",
        labels={"samples_per_step": 128},
        samples=((0.5, 0.5),),
    )
    known = {
        "cell": job.task.cell,
        "protocol": job.task.protocol,
        "repeat": job.task.repeat,
        "status": "ok",
        "started": "2026-01-01T00:00:00+00:00",
        "duration_s": 1.0,
        "environment": environment(),
        "data": DATA,
        "measurements": (rate,),
    }
    return Record(**known | fields)


def reached(train):
    """What a trial comes to: 1 at a learning rate of 0.2, a quarter less tenfold away from it."""
    return 1 - abs(math.log10(train.recipe.lr / 0.2)) / 4


def begun_trial(job, epochs):
    """What a worker keeps of a trial after so many epochs; it reaches the more the longer."""
    train = job.task.cell.train
    curve = tuple(reached(train) * epoch / train.recipe.epochs for epoch in range(1, epochs + 1))
    known = {"name": "epoch_validation_top1", "unit": "fraction", "better": "none"}
    found = (Measurement(**known, samples=(curve,)),) if epochs else ()
    return record_of(job, status="failed", reason=PENDING, measurements=found)


def trial_of(job, **fields):
    """A finished record of a trial."""
    train = job.task.cell.train
    ends = (("validation_top1", "fraction", "higher", reached(train)),
            ("validation_loss", "nats", "lower", 1 - reached(train)))  # fmt: skip
    found = [
        Measurement(
            name=name, unit=unit, better=better, samples=((value,),), labels={"samples": 100}
        )
        for name, unit, better, value in ends
    ]
    curve = begun_trial(job, train.recipe.epochs).measurements
    return record_of(job, **{"measurements": (*curve, *found)} | fields)


def get_stuck():
    (Path(sys.argv[1]) / STUCK).touch()
    time.sleep(600)


def time_is_up(folder):
    """A watch that ends a job as its time limit does, once its worker is stuck."""
    if (folder / STUCK).exists():
        raise subprocess.TimeoutExpired("worker", 0)
    return ""


def break_down(what):
    """End without a word to the launcher, as a worker does."""
    match what:
        case "crash":
            raise ValueError("the worker broke")
        case "oom":
            raise MemoryError("no room")
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleep":
            get_stuck()


def hang(folder, what):
    """With a child like torchrun's workers: in a session of its own, deaf to polite requests."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('ready', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    write_atomic(folder / "child", str(child.pid))
    if what != "orphan":
        get_stuck()
    os._exit(0)


def main():
    folder = Path(sys.argv[1])
    job = from_json(Job, (folder / CELL_FILE).read_text())
    whats = dict(part.rpartition("=")[::2] for part in os.environ.get("FAKE", "ok").split(","))
    model, is_trial = job.task.cell.train.model.label, job.task.protocol.validation_alone
    name = f"trial{job.task.repeat + 1}" if is_trial else model
    what = whats.get(name, whats.get("", "ok"))
    invalid = ("a goat",) if what == "disturbed" else ()
    good = to_json((trial_of if is_trial else record_of)(job, invalid=invalid))
    match what:
        case "hang" if is_trial:
            write_atomic(folder / RECORD_FILE, to_json(begun_trial(job, 2)))
        case "ok" | "ok-exit3" | "ok-hang" | "disturbed":
            write_atomic(folder / RECORD_FILE, good)
        case "unsupported" | "unsupported-exit1" | "told-exit0" | "told-exit1" | "told-exit4":
            told = ("failed", "wrong dtype"), ("unsupported", "no such unit")
            status, reason = told[what.startswith("unsupported")]
            record = record_of(job, status=status, reason=reason, measurements=())
            write_atomic(folder / RECORD_FILE, to_json(record))
        case "early-crash" | "early-exit0" | "early-oom" | "early-sleep":
            begun = record_of(job, status="failed", reason=PENDING, measurements=())
            write_atomic(folder / RECORD_FILE, to_json(begun))
        case "later-crash" | "later-oom" | "later-sleep":
            known = unfinished(record_of(job), ["inference", "anatomy"])
            write_atomic(folder / RECORD_FILE, to_json(known))
        case "garbage":
            (folder / RECORD_FILE).write_text('{"schema_version": 1, "cell"')
        case "unknown-key":
            (folder / RECORD_FILE).write_text(good.replace('"suite":', '"color": 1, "suite":', 1))
        case "other-cell":
            write_atomic(folder / RECORD_FILE, good.replace('"repeat": 0', '"repeat": 7'))
    break_down(what.removeprefix("later-").removeprefix("early-"))
    if what in ("hang", "ok-hang", "orphan"):
        hang(folder, what)
    code = what.rpartition("exit")[2]
    sys.exit(int(code) if code.isdigit() else 0)


if __name__ == "__main__":
    main()
