"""The program `bench`, with workers that measure nothing (see fake_worker)."""

import functools
import sys
from pathlib import Path

import fake_worker

from bench import execution, launchers, probes, trials
from bench.commands import main


def fake_argv(cell, folder):
    worker = Path(__file__).with_name("fake_worker.py")
    return [sys.executable, str(worker), str(folder)]


def present(num_processes):
    return fake_worker.environment()


def install():
    launch = functools.partial(launchers.launch, argv_for=fake_argv, grace=0.5)
    execution.execute = functools.partial(execution.execute, launch=launch, present=present)
    probes.execute = functools.partial(probes.execute, launch=launch, present=present)
    execution.missing = functools.partial(execution.missing, present=present)
    probes.missing = functools.partial(probes.missing, present=present)
    launchers.LOOK_SECONDS = 0.05
    trials.execute = functools.partial(trials.execute, launch=launch, present=present)
    trials.missing = functools.partial(trials.missing, present=present)


if __name__ == "__main__":
    install()
    sys.exit(main())
