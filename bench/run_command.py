"""`bench run`: which cells are measured, where, and what is printed of them. No torch."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import cluster, devices, execution, runs, selfcheck, slurm
from bench.console import plural, show_plan, shown, stoppable
from bench.device_lock import held
from bench.devices import Machine
from bench.display import print_tables
from bench.options import RunOptions, build_suite, check_resume, runs_folder
from bench.preflight import check
from bench.record import Record
from bench.repeats import Fingerprints, interleaved
from bench.runs import Run
from bench.slurm_config import SlurmConfig
from bench.spec import Task, expand
from cifar.cli import parse
from cifar.errors import OutputError, Stopped
from cifar.progress import format_duration
from cifar.recipes import from_scratch


def run_run(argv: list[str]) -> int:
    """`bench run`."""
    options = parse(
        RunOptions,
        argv,
        prog="bench run",
        description="Measure a suite, or the cells that the options name; then print the tables.",
        example="bench run --models resnet18,resnet34 --precisions fp32,bf16 -b 256",
    )
    folder = runs_folder(options.runs_dir)
    past = runs.history(folder)
    if options.resume is not None:
        run = _run_to_resume(options, folder)
        words, config = options.place.resumed(run.plan)
        fingerprints, machine = _checked(run.plan.tasks, words, config, dry_run=options.dry_run)
        if options.dry_run:
            return _show(_missing(run, fingerprints, machine, config), past, machine, config)
        if config is None:
            execution.release(run)
        with held(machine.locks):
            return measure(run, past, fingerprints, machine, config)
    words, config = options.place.planned()
    suite = build_suite(options)
    tasks = expand(suite)
    fingerprints, machine = _checked(tasks, words, config, dry_run=options.dry_run)
    for note in dict.fromkeys(filter(None, (from_scratch(task.cell.train) for task in tasks))):
        print(f"note: {note}", file=sys.stderr)
    if options.dry_run:
        return _show(interleaved(tasks), past, machine, config)
    with held(machine.locks):
        runs.check_writable(folder)
        run = runs.create(suite, folder, argv, devices=words, slurm=config)
        return measure(run, past, fingerprints, machine, config)


def _run_to_resume(options: RunOptions, folder: Path) -> Run:
    assert options.resume is not None
    check_resume(options)
    run = runs.find(options.resume, folder).with_timeout(options.timeout)
    selfcheck.refuse(run)
    runs.require_kind(run, "run")
    return run


def _checked(
    tasks: Sequence[Task],
    words: Sequence[str],
    config: SlurmConfig | None,
    *,
    dry_run: bool,
) -> tuple[Fingerprints, Machine]:
    """Refuse what cannot be measured where it is asked for; the images and the devices.

    Raises:
        UserError: see `bench.preflight.check`, `bench.devices.find_machine`, `bench.slurm_config`.
    """
    fingerprints = check(tasks, whole_machine=not words and config is None)
    if config is not None:
        for task in tasks:
            config.check(task)
        if not dry_run:
            cluster.require_slurm()
        return fingerprints, Machine()
    most = max(task.cell.num_processes for task in tasks)
    # a plan on paper needs no more of the machine as a whole than that it is there
    machine = devices.find_machine(words, most) if words or not dry_run else Machine()
    machine.check(tasks)
    return fingerprints, machine


def _missing(
    run: Run, fingerprints: Fingerprints, machine: Machine, config: SlurmConfig | None
) -> Sequence[Task]:
    if config is None:
        return execution.missing(run, fingerprints=fingerprints, machine=machine)
    return execution.missing_of(run, is_current=slurm.current(), fingerprints=fingerprints)


def _show(
    tasks: Sequence[Task], past: Sequence[Record], machine: Machine, config: SlurmConfig | None
) -> int:
    """What would be started, and where; returns the exit code."""
    if config is None:
        return show_plan(tasks, past, machine)
    return show_plan(tasks, past, submitted=config.described)


def measure(
    run: Run,
    past: Sequence[Record],
    fingerprints: Fingerprints,
    machine: Machine = execution.WHOLE_MACHINE,
    config: SlurmConfig | None = None,
) -> int:
    """Execute a run, on SLURM if there is a `config`, print its tables; returns the exit code."""
    from bench.save import write_plot

    start = time.monotonic()
    resume = f"bench run --resume {shlex.quote(shown(run.folder))}"
    stay = f" (SLURM keeps its jobs; to end them: scancel --name {run.id})" if config else ""
    try:
        with stoppable(resume + stay):
            records = _execute(run, past, fingerprints, machine, config)
    except (Stopped, OutputError):
        print_tables([*runs.latest(run.records()).values()])
        raise
    print_tables(records)
    if plot := write_plot(run.folder, records):
        print(f"how it scales is drawn in {shown(plot)}")
    took = format_duration(time.monotonic() - start)
    broken = [record for record in records if not record.finished]
    skipped = len(run.plan.tasks) - len(records)
    more = f" ({skipped} more were not needed)" if skipped else ""
    cells = plural(len(records), "cell")
    print(f"{cells} in {took}{more}; records and logs are in {shown(run.folder)}")
    if broken:
        print(f"{len(broken)} did not finish; to try them again: {resume}")
    if disturbed := [record for record in records if not record.valid]:
        them = "it" if len(disturbed) == 1 else "them"
        print(f"{len(disturbed)} disturbed; to measure {them} again: {resume}")
    return 1 if broken else 0


def _execute(
    run: Run,
    past: Sequence[Record],
    fingerprints: Fingerprints,
    machine: Machine,
    config: SlurmConfig | None,
) -> list[Record]:
    if config is None:
        return execution.execute(run, past=past, fingerprints=fingerprints, machine=machine)
    jobs = slurm.SlurmJobs(run, config, cluster.Slurm(run.folder / slurm.FOLDER, run.id))
    return execution.execute_in(
        jobs, run, is_current=slurm.current(), past=past, fingerprints=fingerprints
    )
