"""The commands of the program `bench`: list, run, frontier, search, table, save, selfcheck.

It imports no torch; its workers do.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bench import devices, runs, selfcheck
from bench.best import BEST_FILE
from bench.console import expected_seconds, plural, shown, stoppable
from bench.device_lock import held
from bench.display import render_records
from bench.frontier_command import run_frontier
from bench.options import runs_folder
from bench.record import Record
from bench.record_file import TornLineWarning, read_records
from bench.run_command import run_run
from bench.spec import expand
from bench.suites import SUITES
from bench.tuning_command import run_search
from cifar.cli import Command, complain, parse, run_program
from cifar.config import require
from cifar.errors import UserError
from cifar.files import is_file, user_path
from cifar.progress import format_duration

arg = tyro.conf.arg

SUMMARY = """\
Measure what CIFAR ResNets cost and reach, every cell in fresh processes.

examples:
  bench list
  bench run quick
  bench run accuracy --data cifar10:DIR
  bench run --models resnet18,resnet34 --precisions fp32,bf16 -b 256 --channels-last --seeds 3
  bench run depths --num-processes 4 --dry-run
  bench run scaling --num-processes 1,2,4,8
  bench run --resume 20260101-120000-quick-1f0c
  bench run depths --devices 0,1,2,3
  bench run depths --slurm --slurm-partition gpu
  bench frontier --models resnet18,resnet34 --precisions fp32,bf16
  bench search sgd --model resnet20 --data cifar10:DIR --lr 0.01..1 --batch-size 64,128 --epochs 5
  bench table --sort train --filter precision=bf16
  bench save 20260101-120000-quick-1f0c
  bench selfcheck
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """Options of `bench list`."""

    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Runs to learn this machine's speed from."""


def run_list(argv: list[str]) -> int:
    """`bench list`."""
    options = parse(
        ListOptions,
        argv,
        prog="bench list",
        description="List the suites and what they cost here.",
        example="bench list",
    )
    past = runs.history(runs_folder(options.runs_dir))
    width = max(map(len, SUITES))
    for name, make in SUITES.items():
        suite = make()
        tasks = expand(suite)
        about = format_duration(expected_seconds(tasks, past))
        print(f"{name:<{width}}  {suite.description}; {plural(len(tasks), 'cell')}, about {about}")
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TableOptions:
    """Options of `bench table`."""

    source: Annotated[
        tuple[str, ...], tyro.conf.Positional, arg(metavar="[RUN|FILE.jsonl ...]")
    ] = ()
    """Runs (id or folder) or record files; when none is given, the newest run but self-checks."""
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
        description="Print the tables of runs or record files.",
        example="bench table --sort train --filter precision=bf16 --format markdown",
    )
    records = _named_records(options.source, runs_folder(options.runs_dir))
    if not records:
        raise UserError("records: none yet; bench run --resume RUN measures what is missing")
    text = render_records(
        records, options.format, sys.stdout.isatty(), options.sort, options.filter
    )
    print(text, end="")
    return 0


def _named_records(names: Sequence[str], folder: Path) -> list[Record]:
    """The records of runs and files, of the newest run if none is named; not of a self-check."""
    if not names:
        return runs.newest(folder, but=(selfcheck.SUITE,)).records()
    records: list[Record] = []
    for name in names:
        path = user_path(name, "records")
        if name.endswith(".jsonl") or is_file(path, "records"):
            found = read_records(path)
            if not found:
                raise UserError(f"records: {name}: no whole record in it; give another file")
            selfcheck.refuse_records(found, name)
        else:
            run = runs.find(name, folder)
            selfcheck.refuse(run)
            found = run.records()
        records += found
    return records


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """Options of `bench save`."""

    run: tyro.conf.Positional[Annotated[str, arg(metavar="RUN")]]
    """The run's id or its folder."""
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
        description="Put a run's records and tables under results/<hardware>/.",
        example="bench save 20260101-120000-quick-1f0c",
    )
    from bench.save import save, uncommitted

    run = runs.find(options.run, runs_folder(options.runs_dir))
    selfcheck.refuse(run)
    if run.plan.kind == "search":
        raise UserError(
            f"run: {run.id!r}: is a search, whose accuracies chose its winner; train that with "
            f"other seeds, as its {BEST_FILE} says, and keep what comes of it"
        )
    tell = partial(complain, "bench")
    for path in save(run, user_path(options.results_dir, "results-dir"), tell):
        print(shown(path))
    if note := uncommitted(runs.latest(run.records()).values()):
        complain("bench", note)
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfcheckOptions:
    """Options of `bench selfcheck`."""

    max_rounds: Annotated[int, arg(metavar="N")] = selfcheck.MAX_ROUNDS
    """Rounds of fresh processes after which it ends anyway; 6 at least."""
    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Where runs are kept."""

    def __post_init__(self) -> None:
        least = selfcheck.MIN_ROUNDS
        require(self.max_rounds >= least, "max-rounds", self.max_rounds, f"give {least} or more")


def run_selfcheck(argv: list[str]) -> int:
    """`bench selfcheck`."""
    options = parse(
        SelfcheckOptions,
        argv,
        prog="bench selfcheck",
        description="Show that costs of known size and a wrong number format are seen.",
        example="bench selfcheck",
    )
    folder = runs_folder(options.runs_dir)
    with held(devices.find_machine(()).locks):
        runs.check_writable(folder)
        run = runs.create(selfcheck.suite(options.max_rounds), folder, argv)
        with stoppable():
            findings = selfcheck.execute(run)
    print(selfcheck.render(findings, color=sys.stdout.isatty()), end="")
    print(f"records and logs are in {shown(run.folder)}")
    return 0 if all(each.verdict == "seen" for each in findings) else 1


COMMANDS = {
    "list": Command(help="list the suites and their cost", run=run_list),
    "run": Command(help="measure a suite or single cells", run=run_run),
    "frontier": Command(help="search the largest batch that fits", run=run_frontier),
    "search": Command(help="search for a better recipe", run=run_search),
    "table": Command(help="print tables of records", run=run_table),
    "save": Command(help="put a run's records under results/", run=run_save),
    "selfcheck": Command(help="show that known costs are seen", run=run_selfcheck),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is named; returns the exit code."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("default", TornLineWarning)
        warnings.showwarning = lambda message, *_: notes.append(f"note: {message}")
        code = run_program("bench", SUMMARY, COMMANDS, argv)
    if code != UserError.exit_code:  # which has one line on stderr and no other
        for note in notes:
            complain("bench", note)
    return code
