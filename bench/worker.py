"""The program that measures one cell; runs under `accelerate launch`, one process per device.

`python -m bench.worker FOLDER` reads FOLDER/cell.json; the first process writes FOLDER/record.json.
An out-of-memory error, a crash or a hang leaves a record of what was known by then
(`bench.unfinished`); the launcher then says what happened.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from bench.environment import collect
from bench.faults import InjectedFault
from bench.job import CELL_FILE, DEVICE, RECORD_FILE, Job
from bench.judge import mismatches, unproven
from bench.limits import limit_memory
from bench.measure import BASIC, CORE, FURTHER, STEPPING, TRIAL
from bench.measure.subject import Metric, Subject
from bench.measure.training import planned_steps
from bench.nvml import installed_gpus
from bench.observe import told_by_all
from bench.record import DataFacts, Label, Measurement, Record, Status
from bench.spec import Task
from bench.unfinished import PENDING, unfinished
from cifar import device_memory
from cifar.config import RunConfig
from cifar.data.dataset import Dataset
from cifar.data.sources import load_dataset
from cifar.distributed import leave
from cifar.errors import CifarError, UnsupportedError
from cifar.files import write_atomic
from cifar.precision import shortfall_of
from cifar.process import run_to_end
from cifar.pulse import PULSE
from cifar.ranks import is_first
from cifar.serialize import from_json, to_json
from cifar.signals import end_with_parent
from cifar.trainer import Trainer


class Worker:
    """One process's part in measuring a task; what is known so far goes into the record.

    `keep` is given a record of it before the images are read, before the training, and before
    every metric that follows.
    """

    def __init__(self, job: Job, keep: Callable[[Record], None]) -> None:
        self._job, self._keep = job, keep
        self._fault = InjectedFault(job.fault) if job.fault else None
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._clock = time.monotonic()
        self._environment = collect()
        self._data: DataFacts | None = None
        self._effective: dict[str, Label] = {}
        self._measurements: list[Measurement] = []
        self._invalid: list[str] = []

    def run(self) -> Record:
        """Measure; what goes wrong in a way that has a name becomes the record's status.

        That is until the training has been measured. What a later metric raises ends this process,
        and the launcher those of the other ranks, which may be waiting for it: `keep` has had a
        record of everything before it by then.
        """
        self._keep(self._record("failed", PENDING))
        try:
            subject, status, reason = self._train(self._job.task)
        except UnsupportedError as error:
            return self._record("unsupported", str(error))
        except CifarError as error:
            return self._record("failed", str(error))
        later = self._later()
        names = list(later)
        for done, (name, metric) in enumerate(later.items()):
            self._keep(unfinished(self._record(status, reason), names[done:]))
            # Others take long without a step, or on the first process alone.
            alone = contextlib.nullcontext() if name in STEPPING else PULSE.during(name)
            with alone:
                _take(subject, metric)
        return self._record(status, reason)

    def _train(self, task: Task) -> tuple[Subject, Status, str]:
        """Take the core metrics; the subject of the others, and whether the right thing ran."""
        train, protocol = task.cell.train, task.protocol
        dataset = load_dataset(train.data)
        # before anything is refused: every record names its images
        self._data = facts = describe(dataset)
        self._keep(self._record("failed", PENDING))
        device = expected_device(self._environment.device, os.environ)
        refuse_shortfall(task)
        limit_memory(protocol.memory_limit)
        batch_size = train.recipe.global_batch_size
        trainer = Trainer(
            train,
            RunConfig(num_processes=task.cell.num_processes),
            dataset,
            train_samples=None  # the recipe's epochs
            if protocol.validation_alone
            else planned_steps(protocol, batch_size) * batch_size,
            update=self._fault.update if self._fault else None,
        )
        self._data = replace(facts, train_samples=len(trainer.dataset.train))
        subject = Subject(trainer, protocol)
        self._measurements, self._invalid = subject.taken, subject.invalid
        subject.tell = partial(self._tell, subject)
        for metric in self._core(trainer):
            _take(subject, metric)
        self._effective = subject.witness.effective()
        subject.invalid += unproven(train, self._effective)
        phrases = mismatches(task.cell, self._effective, device)
        wrong = told_by_all(phrases, trainer.device)
        if wrong:
            return subject, "failed", "; ".join(wrong)
        return subject, "ok", shortfall_of(task.cell.precision, trainer.device)

    def _tell(self, subject: Subject, known: Sequence[Measurement]) -> None:
        """Keep what a metric knows on its way, for whoever watches; a collective call."""
        self._effective = subject.witness.effective()
        begun = self._record("failed", PENDING)
        self._keep(replace(begun, measurements=(*begun.measurements, *known)))

    def _core(self, trainer: Trainer) -> tuple[Metric, ...]:
        """What a record must have, in order; a fault is put in and measured by itself first."""
        protocol = self._job.task.protocol
        metrics = CORE[:1] if protocol.training_alone else CORE
        if protocol.validation_alone:
            metrics = TRIAL
        if self._fault is None:
            return metrics
        self._fault.install(trainer)
        self._invalid.append(f"injected fault: {self._fault.fault.label}")
        return (self._fault.measure, *metrics)

    def _later(self) -> dict[str, Metric]:
        """What is measured after that, in order; a fault is measured by itself again."""
        protocol = self._job.task.protocol
        if protocol.training_alone or protocol.validation_alone:
            return {}
        fault = {} if self._fault is None else {"fault_seconds": self._fault.measure}
        return BASIC | {name: FURTHER[name] for name in protocol.metrics} | fault

    def _record(self, status: Status, reason: str) -> Record:
        task = self._job.task
        return Record(
            run_id=self._job.run_id,
            suite=self._job.suite,
            cell=task.cell,
            protocol=task.protocol,
            repeat=task.repeat,
            status=status,
            reason=reason,
            started=self._started,
            duration_s=round(time.monotonic() - self._clock, 3),
            environment=self._environment,
            data=self._data,
            effective=self._effective,
            invalid=tuple(self._invalid),
            measurements=tuple(self._measurements),
        )


def _take(subject: Subject, metric: Metric) -> None:
    for measurement in metric(subject):
        subject.taken.append(measurement)


def expected_device(seen: str, environ: Mapping[str, str]) -> str:
    """The kind of device to measure: the one that was named, else a GPU where NVML has one.

    `seen` is the kind that torch has, see `Environment.device`. CUDA_VISIBLE_DEVICES hides GPUs on
    purpose where it is empty or begins with what is no GPU, as launchers and schedulers write it.
    A torch that was built for CPUs has no other choice, so there no GPU is expected.

    Raises:
        CifarError: torch has no such GPU, and would measure the CPU.
    """
    shown, there = environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus()
    first = "0" if shown is None else shown.split(",")[0].strip()
    hidden = not first or first.startswith("-") or first == "NoDevFiles"
    expected = environ.get(DEVICE) or ("cuda" if there and not hidden else seen)
    if torch.version.cuda is None and DEVICE not in environ:
        return seen
    if (expected, seen) == ("cuda", "cpu"):
        under = "" if shown is None else f" under CUDA_VISIBLE_DEVICES={shown}"
        build = "" if torch.version.cuda else ", as it was built without CUDA"
        raise CifarError(
            f"device: cpu: NVML sees {there} GPU(s), and torch none{under}{build}; mend that, or "
            "set CUDA_VISIBLE_DEVICES= to measure the CPU on purpose"
        )
    return expected


def refuse_shortfall(task: Task) -> None:
    """Raise an UnsupportedError if the protocol refuses a precision whose speed is another's here.

    That is one that the device emulates, or has kernels but no instructions for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = shortfall_of(task.cell.precision, device)
    if told and not task.protocol.allow_emulated:
        raise UnsupportedError(
            f"{told}; to measure that, name the cell: bench run --models ... --precisions ..."
        )


def describe(dataset: Dataset) -> DataFacts:
    """What a record says of the images."""
    _, channels, height, width = dataset.train.images.shape
    return DataFacts(
        name=dataset.name,
        fingerprint=dataset.fingerprint(),
        train_samples=len(dataset.train),
        test_samples=len(dataset.test),
        classes=len(dataset.classes),
        image_shape=(channels, height, width),
    )


def main(folder: Path) -> int:
    """Measure the job in `folder`; returns the record's exit code."""
    job = from_json(Job, (folder / CELL_FILE).read_bytes(), source=str(folder / CELL_FILE))
    first = is_first(os.environ)

    def keep(record: Record) -> None:
        if first:
            write_atomic(folder / RECORD_FILE, to_json(record))

    with device_memory.named():  # the launcher goes by what the error is called
        record = Worker(job, keep).run()
    keep(record)
    if record.reason and not first:  # the first process may not have met it, and not tell it
        print(record.reason, file=sys.stderr, flush=True)
    if record.exit_code == 0:  # else the others may not come, see `run_to_end`
        leave()
    return record.exit_code


if __name__ == "__main__":
    end_with_parent()  # else it would measure on beside the next one when its launcher is killed
    sys.exit(run_to_end(lambda: main(Path(sys.argv[1]))))
