"""The program `bench`: list, run, table, save. It imports no torch; its workers do."""

import contextlib
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro

from bench import runs
from bench.estimate import estimate_seconds, format_duration
from bench.launchers import argv_for, environment_for
from bench.options import (
    RunOptions,
    build_suite,
    check_data,
    check_devices,
    check_resume,
    runs_folder,
)
from bench.record import Record
from bench.record_file import TornLineWarning, read_records
from bench.spec import Task, expand
from bench.suites import SUITES
from cifar.cli import Command, complain, parse, run_program
from cifar.errors import Stopped, UserError

arg = tyro.conf.arg

SUMMARY = """\
Measure what CIFAR ResNets cost and reach, every cell in fresh processes.

examples:
  bench list
  bench run quick
  bench run accuracy --data cifar10:DIR
  bench run --models resnet18,resnet34 --precisions fp32,bf16 -b 256 --channels-last --seeds 3
  bench run depths --num-processes 4 --dry-run
  bench run --resume 20260101-120000-quick-1f0c
  bench table --sort train --filter precision=bf16
  bench save 20260101-120000-quick-1f0c
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """Options of `bench list`."""

    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Runs to learn this machine's speed from."""


def run_list(argv: list[str]) -> int:
    """`bench list`."""
    options = parse(
        ListOptions, argv, prog="bench list", description="List the suites and what they cost here."
    )
    past = runs.history(Path(options.runs_dir))
    width = max(map(len, SUITES))
    for name, make in SUITES.items():
        suite = make()
        tasks = expand(suite)
        about = format_duration(_expected(tasks, past))
        print(f"{name:<{width}}  {suite.description}; {len(tasks)} cells, about {about}")
    return 0


def _expected(tasks: Sequence[Task], past: Sequence[Record]) -> float:
    """Seconds for all tasks together."""
    return sum(estimate_seconds(task.cell, task.protocol, history=past) for task in tasks)


def run_run(argv: list[str]) -> int:
    """`bench run`."""
    options = parse(
        RunOptions,
        argv,
        prog="bench run",
        description="Measure a suite, or the cells that the options name; then print the tables. "
        "Example: bench run --models resnet18,resnet34 --precisions fp32,bf16 -b 256",
    )
    folder = runs_folder(options)
    past = runs.history(folder)
    if options.resume is not None:
        check_resume(options)
        run = runs.find(options.resume, folder)
        _check(run.plan.tasks)
        if options.dry_run:
            return _show_plan(runs.missing(run), past)
    else:
        suite = build_suite(options)
        tasks = expand(suite)
        _check(tasks)
        if options.dry_run:
            return _show_plan(tasks, past)
        runs.check_writable(folder)
        run = runs.create(suite, folder, argv)
    return _measure(run, past)


def _check(tasks: Sequence[Task]) -> None:
    """Refuse what no process needs to be started for."""
    check_data(tasks)
    check_devices(tasks)


def _show_plan(tasks: Sequence[Task], past: Sequence[Record]) -> int:
    """Print what would be started, and the time it would take; returns the exit code."""
    for number, task in enumerate(tasks, 1):
        seconds = estimate_seconds(task.cell, task.protocol, history=past)
        print(f"[{number}/{len(tasks)}] {task.cell.label}  about {format_duration(seconds)}")
        added = environment_for(task.cell, {})
        settings = " ".join(f"{name}={value}" for name, value in added.items())
        print(f"  {settings} {shlex.join(argv_for(task.cell, Path('FOLDER')))}")
    print(f"{len(tasks)} cells, about {format_duration(_expected(tasks, past))}")
    return 0


def _measure(run: runs.Run, past: Sequence[Record]) -> int:
    """Execute a run, print its tables, and return the exit code."""
    start = time.monotonic()
    resume = f"bench run --resume {shlex.quote(_shown(run.folder))}"
    try:
        with _terminable():
            records = runs.execute(run, past=past)
    except KeyboardInterrupt:
        complain("bench", f"interrupted; to go on: {resume}")
        return 128 + signal.SIGINT
    except Stopped as stop:
        complain("bench", f"{stop}; to go on: {resume}")
        return stop.exit_code
    print(_render(records, "terminal", sys.stdout.isatty()))
    took = format_duration(time.monotonic() - start)
    broken = [record for record in records if record.status not in ("ok", "unsupported")]
    skipped = len(run.plan.tasks) - len(records)
    more = f" ({skipped} more were not needed)" if skipped else ""
    print(f"{len(records)} cells in {took}{more}; records and logs are in {_shown(run.folder)}")
    if broken:
        print(f"{len(broken)} did not finish; to try them again: {resume}")
    return 1 if broken else 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise Stopped, so that the cell's processes end as well."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number, f"stopped by {signal.Signals(number).name}")

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _shown(path: Path) -> str:
    """A path relative to the working folder if it lies in there."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableOptions:
    """Options of `bench table`."""

    source: tyro.conf.Positional[tuple[Annotated[str, arg(metavar="RUN|FILE.jsonl")], ...]] = ()
    """Runs (id or folder) or record files; the newest run when none is given."""
    sort: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Column to sort by, best first: model, top1, params, train, memory, vs_fp32, ..."""
    filter: Annotated[str | None, arg(metavar="COLUMN=VALUE[,...]")] = None
    """Rows to show, e.g. precision=bf16,model=resnet18."""
    format: Literal["terminal", "markdown", "csv"] = "terminal"
    """How to print the tables."""
    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Where runs are kept."""


def run_table(argv: list[str]) -> int:
    """`bench table`."""
    options = parse(
        TableOptions,
        argv,
        prog="bench table",
        description="Print the tables of runs or record files. "
        "Example: bench table --sort train --filter precision=bf16 --format markdown",
    )
    folder = Path(options.runs_dir)
    records = []
    for name in options.source or (runs.newest(folder).id,):
        is_file = Path(name).is_file() or name.endswith(".jsonl")
        records += read_records(Path(name)) if is_file else runs.find(name, folder).records()
    if not records:
        raise UserError("records: none yet; bench run --resume RUN measures what is missing")
    text = _render(records, options.format, sys.stdout.isatty(), options.sort, options.filter)
    print(text, end="")
    return 0


def _render(
    records: Sequence[Record],
    form: Literal["terminal", "markdown", "csv"],
    color: bool,
    sort: str | None = None,
    chosen: str | None = None,
) -> str:
    from bench import rows, table

    lines = rows.rows(records)
    if chosen is not None:
        lines = rows.filter_rows(lines, rows.parse_filter(chosen))
    if sort is not None:
        lines = rows.sort_rows(lines, sort)
    if form == "markdown":
        return table.render_markdown(lines)
    return table.render_csv(lines) if form == "csv" else table.render_terminal(lines, color=color)


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """Options of `bench save`."""

    run: tyro.conf.Positional[Annotated[str, arg(metavar="RUN")]]
    """Id or folder of the run."""
    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Where runs are kept."""
    results_dir: Annotated[str, arg(metavar="DIR")] = "results"
    """Where results are kept."""


def run_save(argv: list[str]) -> int:
    """`bench save`."""
    options = parse(
        SaveOptions,
        argv,
        prog="bench save",
        description="Put a run's records and tables under results/<hardware>/. "
        "Example: bench save 20260101-120000-quick-1f0c",
    )
    from bench.save import save, uncommitted

    run = runs.find(options.run, Path(options.runs_dir))
    for path in save(run, Path(options.results_dir)):
        print(_shown(path))
    if note := uncommitted(runs.latest(run.records()).values()):
        complain("bench", note)
    return 0


COMMANDS = {
    "list": Command(help="list the suites and their cost", run=run_list),
    "run": Command(help="measure a suite or single cells", run=run_run),
    "table": Command(help="print tables of records", run=run_table),
    "save": Command(help="put a run's records under results/", run=run_save),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", TornLineWarning)
        warnings.showwarning = lambda message, *_: complain("bench", f"note: {message}")
        return run_program("bench", SUMMARY, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
