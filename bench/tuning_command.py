"""The command `bench search`: trials one after the other or side by side, and the best of them."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bench import devices, runs, trials
from bench.best import BEST_FILE, render, summarise
from bench.columns import trial_columns
from bench.console import expected_seconds, plural, show_plan, shown, stoppable
from bench.device_lock import held
from bench.devices import Machine
from bench.execution import release
from bench.options import check_resume, runs_folder
from bench.preflight import check
from bench.record import Record
from bench.repeats import Fingerprints
from bench.sampler import require_optuna
from bench.space import with_values
from bench.spec import Task, expand
from bench.table import render_terminal
from bench.trial_plan import tuning_of
from bench.trial_rows import trial_rows
from bench.tuning import Tuning, trial_task, trials_of
from bench.tuning_options import AT_ANY_TIME, batch_sizes, build_search, options_class
from cifar.cli import parse
from cifar.config import option_name
from cifar.errors import OutputError, Stopped
from cifar.files import write_atomic
from cifar.progress import format_duration
from cifar.serialize import to_json


def run_search(argv: list[str]) -> int:
    """`bench search`."""
    options = parse(
        options_class(),
        argv,
        prog="bench search",
        description="Search for settings of a recipe that score better on held-out training "
        "images. SPACE is LOW..HIGH for all numbers in between, A,B,C for these alone, or one "
        "number for all trials; alternatives of augmentations stand between |, and none is none. "
        "Where no space is given, learning rate, weight decay, batch size and augmentation are "
        "searched around the recipe's own.",
        example="bench search sgd --model resnet20 --data cifar10 --lr 0.01..1 "
        '--augment "crop flip|crop flip cutout" --trials 30 --epochs 5',
    )
    require_optuna()
    folder = runs_folder(options.runs_dir)
    if options.resume is not None:
        names = (each.name for each in fields(options) if each.name not in AT_ANY_TIME)
        check_resume(options, names)
        run = _find(options.resume, folder).with_timeout(options.timeout)
        words = options.devices or run.plan.devices
        fingerprints, machine = _checked(run.plan.tasks, words)
        if options.dry_run:
            following, left = trials.missing(run, fingerprints=fingerprints, machine=machine)
            return _show(following, left, folder, machine)
        release(run)
        with held(machine.locks):
            return _measure(run, fingerprints, machine)
    suite, tuning = build_search(options)
    (base,) = expand(suite)
    fingerprints, machine = _checked(_largest_and_smallest(base, tuning), options.devices)
    if options.dry_run:
        for parameter in tuning.space:
            print(f"{option_name(parameter.field)}: {parameter}")
        return _show([base], tuning.trials, folder, machine)
    with held(machine.locks):
        runs.check_writable(folder)
        run = runs.create(suite, folder, argv, tuning=tuning, devices=options.devices)
        return _measure(run, fingerprints, machine)


def _checked(tasks: Sequence[Task], words: Sequence[str]) -> tuple[Fingerprints, Machine]:
    """The images and the devices of trials such as these.

    Raises:
        UserError: see `bench.preflight.check`, `bench.devices.find_machine`.
    """
    machine = devices.find_machine(words, tasks[0].cell.num_processes, spread=True)
    machine.check(tasks)
    return check(tasks, whole_machine=not machine.devices), machine


def _find(name: str, folder: Path) -> runs.Run:
    run = runs.find(name, folder)
    runs.require_kind(run, "search")
    return run


def _largest_and_smallest(base: Task, tuning: Tuning) -> list[Task]:
    """A trial of every batch size, or of the extreme ones."""
    train = base.cell.train
    sizes = batch_sizes(train, tuning.space)
    return [
        trial_task(base, number, with_values(train, {"global_batch_size": size}))
        for number, size in enumerate(sizes)
    ]


def _show(following: Sequence[Task], left: int, folder: Path, machine: Machine) -> int:
    """Print what would be started; returns the exit code."""
    past = runs.history(folder)
    show_plan(following, past, machine)
    seconds = left * expected_seconds(following, past)
    about = f"about {format_duration(seconds)} one after the other, less what is pruned"
    print(f"{plural(left, 'trial')} to run, {about}")
    return 0


def _measure(run: runs.Run, fingerprints: Fingerprints, machine: Machine) -> int:
    """Do a search, print its trials and the best of them, and return the exit code."""
    start = time.monotonic()
    resume = f"bench search --resume {shlex.quote(shown(run.folder))}"
    try:
        with stoppable(resume):
            records = trials.execute(run, fingerprints=fingerprints, machine=machine)
    except (Stopped, OutputError):
        _answer(run, run.records())
        raise
    found = _answer(run, records)
    took = format_duration(time.monotonic() - start)
    print(f"{plural(len(records), 'trial')} in {took}; records and logs are in {shown(run.folder)}")
    broken = [each for each in trials_of(records) if each.state in ("failed", "timeout")]
    if broken:
        print(f"{len(broken)} did not finish; to try them again: {resume}")
    return 0 if found and not broken else 1


def _answer(run: runs.Run, records: Sequence[Record]) -> bool:
    """Print the trials and the best of them, and keep it in the run's folder; whether there is one.

    Raises:
        OutputError: the folder cannot be written any more.
    """
    if not records:
        return False
    print(render_terminal(trial_rows(records), trial_columns, color=sys.stdout.isatty()))
    tuning = tuning_of(run)
    best = summarise(trials_of(records), [each.field for each in tuning.space])
    if best is None:
        print("no trial came to its end, so none is the best")
        return False
    print(render(best), end="")
    try:
        write_atomic(run.folder / BEST_FILE, to_json(best, indent=2) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"run: {str(run.folder)!r}: cannot be written any more ({reason}); make room there, "
            "then go on with --resume"
        ) from None
    return True
