"""The program `bench`, with workers that measure nothing (see fake_worker).

$FAKE_GRACE is how long they are asked to end, $FAKE_LOCKS begins the names of locked devices, of
which a test by default has its own; with $FAKE_TIME_UP a time limit ends a worker as soon as it
hangs, however long it is.
"""

import functools
import os
import sys
from pathlib import Path

import fake_worker

from bench import device_lock, devices, execution, launchers, probes, processes, slurm, trials
from bench.commands import main


def fake_argv(cell, folder):
    worker = Path(__file__).with_name("fake_worker.py")
    return [sys.executable, str(worker), str(folder)]


def launch_fake(job, folder, *, watch=None, **options):
    def impatient(folder):
        return (watch(folder) if watch else "") or fake_worker.time_is_up(folder)

    chosen = impatient if os.environ.get("FAKE_TIME_UP") else watch
    return launchers.launch(job, folder, argv_for=fake_argv, watch=chosen, **options)


def present(num_processes, **_):
    return fake_worker.environment()


def install():
    grace = float(os.environ.get("FAKE_GRACE", "0.5"))
    launch = functools.partial(launch_fake, grace=grace)
    execution.end_leftovers = functools.partial(processes.end_leftovers, grace=grace)
    device_lock.PREFIX += os.environ.get("FAKE_LOCKS", f"test-{os.getppid()}-")
    execution.execute = functools.partial(execution.execute, launch=launch, present=present)
    probes.execute = functools.partial(probes.execute, launch=launch, present=present)
    devices.find_machine = functools.partial(devices.find_machine, present=present)
    slurm.PROGRAM = "fake_job_runner"
    slurm.POLL_SECONDS, slurm.ASK_SECONDS = 0.05, 0.1
    slurm.SETTLE_SECONDS = slurm.COMPLETED_SETTLE_SECONDS = 0.2
    slurm.current = functools.partial(slurm.current, present=present)
    execution.missing = functools.partial(execution.missing, present=present)
    probes.missing = functools.partial(probes.missing, present=present)
    launchers.LOOK_SECONDS = 0.05
    trials.execute = functools.partial(trials.execute, launch=launch, present=present)
    trials.missing = functools.partial(trials.missing, present=present)


if __name__ == "__main__":
    install()
    sys.exit(main())
