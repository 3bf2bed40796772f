"""The command `bench frontier`: its options, and the largest batches that it finds."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from bench import devices, probes, runs
from bench.columns import frontier_columns
from bench.console import plural, show_plan, shown, stoppable
from bench.device_lock import held
from bench.execution import release
from bench.frontier import SUITE, frontier
from bench.frontier_search import RESOLUTION, FrontierSearch, plan_search, probe_protocol
from bench.launchers import check_launcher
from bench.option_types import CommaList, Flag
from bench.options import check_resume, runs_folder
from bench.preflight import check, examine
from bench.present import present_environment
from bench.record import Environment
from bench.repeats import Fingerprints
from bench.spec import RECIPE, Plan, Suite, Task, expand, grid
from bench.table import render_terminal
from cifar.cli import parse
from cifar.config import require
from cifar.data.config import DATA_HELP, DataConfig, parse_data
from cifar.progress import format_duration
from cifar.recipes import get_recipe

arg = tyro.conf.arg

MEMORY_SHARE = 0.75
"""Of the memory available now, for the processes of a cell on CPUs when no limit is given: more
would push other programs out, or call in the kernel's out-of-memory killer."""
LIMIT_STEP = 2**28
"""That limit is rounded down to a multiple of this, so that it is the same a while later."""
_CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Where the control group of a container is, in version 2 and 1, its files of the memory that it
may have and that it takes, and what `memory.stat` calls the part of this which is a cache of files:
the kernel gives that back (https://docs.kernel.org/admin-guide/cgroup-v2.html#memory)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierOptions:
    """Options of `bench frontier`."""

    models: CommaList = ()
    """Models whose largest batch is searched, e.g. resnet18,resnet18-w16."""
    precisions: CommaList = ()
    """Their precisions: fp32, tf32, bf16, fp16; fp32 when not given."""
    data: Annotated[str | None, arg(metavar="SOURCE[:PATH]", help=DATA_HELP)] = None
    recipe: Annotated[str | None, arg(metavar="NAME")] = None
    """Recipe to train by, whose optimiser state needs memory too; sgd when not given."""
    channels_last: Flag = False
    """Keep images and convolution weights in NHWC order."""
    compile: Flag = False
    """Run the model through torch.compile."""
    launcher: Annotated[str | None, arg(metavar="NAME")] = None
    """How processes are started: ddp, fsdp, zero1, zero2 or zero3; ddp when not given."""
    num_processes: Annotated[int | None, arg(metavar="N")] = None
    """Processes per cell, one per device; batches are over all of them."""
    memory_limit: Annotated[int | None, arg(metavar="MIB")] = None
    """Memory that each process may allocate; when not given, the whole of a GPU, or three quarters
    of a CPU's available memory."""
    start: Annotated[int | None, arg(metavar="N")] = None
    """First batch to probe, 64 when not given; batches are multiples of 8."""
    largest: Annotated[int | None, arg(metavar="N")] = None
    """Largest batch to probe; the number of training images when not given."""
    resolution: Annotated[float | None, arg(metavar="FRACTION")] = None
    """How close to find the largest batch, as a fraction of it; 0.0625 when not given."""
    timeout: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Seconds after which a probe is ended; with --resume for what is missing."""
    dry_run: Flag = False
    """Show the next probe of every search, its command and time; start nothing."""
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """Go on with a frontier, given by its run's id or folder; finished probes are used again."""
    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Where runs are kept."""


SEARCH_OPTIONS = (
    "models",
    "precisions",
    "data",
    "recipe",
    "channels_last",
    "compile",
    "launcher",
    "num_processes",
    "memory_limit",
    "start",
    "largest",
    "resolution",
)
"""The options that change what is searched."""


def run_frontier(argv: list[str]) -> int:
    """`bench frontier`."""
    options = parse(
        FrontierOptions,
        argv,
        prog="bench frontier",
        description="Search the largest batch that fits into memory, for every model and precision "
        "and every probe in fresh processes.",
        example="bench frontier --models resnet18,resnet34 --precisions fp32,bf16",
    )
    folder = runs_folder(options.runs_dir)
    if options.resume is not None:
        check_resume(options, SEARCH_OPTIONS)
        run = runs.find(options.resume, folder).with_timeout(options.timeout)
        runs.require_kind(run, "frontier")
        fingerprints = check(run.plan.tasks)
        if options.dry_run:
            left = probes.missing(run, fingerprints=fingerprints)
            return show_plan(left, runs.history(folder))
        release(run)
        with held(_locks(run.plan.tasks)):
            return _measure(run, fingerprints)
    suite, search = build_searches(options)
    tasks = expand(suite)
    fingerprints = check(tasks)
    if options.dry_run:
        return show_plan(tasks, runs.history(folder))
    with held(_locks(tasks)):
        runs.check_writable(folder)
        return _measure(runs.create(suite, folder, argv, frontier=search), fingerprints)


def _locks(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Of the devices that the probes compute on."""
    return devices.find_machine((), tasks[0].cell.num_processes).locks


def build_searches(
    options: FrontierOptions, present: Callable[[int], Environment] = present_environment
) -> tuple[Suite, FrontierSearch]:
    """The first probes of all searches that the options ask for, and how the searches go on.

    Raises:
        ConfigError: no models, or a name or value that cannot be meant.
        DataError: the data set is missing, damaged or of the wrong form.
    """
    require(bool(options.models), "models", "", "give some, e.g. --models resnet18,resnet34")
    processes = 1 if options.num_processes is None else options.num_processes
    require(processes >= 1, "num-processes", processes, "give 1 or more")
    data = DataConfig() if options.data is None else parse_data(options.data)
    launcher = "ddp" if options.launcher is None else options.launcher
    check_launcher(launcher)
    images = examine(data).images
    search = plan_search(
        processes,
        images=images,
        start=options.start,
        largest=options.largest,
        resolution=RESOLUTION if options.resolution is None else options.resolution,
    )
    cells = grid(
        options.models,
        options.precisions or ("fp32",),
        channels_last=(options.channels_last,),
        compile=(options.compile,),
        batch_sizes=(search.start,),
        recipe=get_recipe(RECIPE if options.recipe is None else options.recipe),
        data=data,
        launcher=launcher,
        num_processes=processes,
    )
    protocol = probe_protocol(options.timeout)
    limit = _memory_limit(options.memory_limit, processes, present)
    plan = Plan(protocol=replace(protocol, memory_limit=limit), cells=cells)
    return Suite(name=SUITE, description="the largest batch that fits", plans=(plan,)), search


def _memory_limit(
    mebibytes: int | None, processes: int, present: Callable[[int], Environment]
) -> int | None:
    """In bytes: what was asked; else none on GPUs and a share of what is available on CPUs."""
    here = present(processes)
    if mebibytes is not None:
        most = min(here.gpu_memory_bytes[:processes], default=here.memory_bytes) // 2**20
        require(1 <= mebibytes <= most, "memory-limit", mebibytes, f"give 1 to {most} MiB")
        return mebibytes * 2**20
    if here.gpu_count:
        return None
    share = int(MEMORY_SHARE * available_memory()) // processes
    return max(1, share // LIMIT_STEP) * LIMIT_STEP


def available_memory() -> int:
    """Bytes that programs can still take without swapping, and within the container's limit."""
    available = int(psutil.virtual_memory().available)
    for group in _CONTAINERS:
        left = _left_in_container(*group)
        available = available if left is None else min(available, left)
    return available


def _left_in_container(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes that a control group may still take; None if it has no limit, or there is none."""

    def read(name: str) -> str:
        return (folder / name).read_text().strip() if (folder / name).is_file() else ""

    most = read(limit)
    if not most.isdigit():
        return None
    stat = dict(line.split() for line in read("memory.stat").splitlines())
    return max(0, int(most) - int(read(usage) or 0) + int(stat.get(cache, 0)))


def _measure(run: runs.Run, fingerprints: Fingerprints) -> int:
    """Do the searches of a run, print the frontier, and return the exit code."""
    start = time.monotonic()
    resume = f"bench frontier --resume {shlex.quote(shown(run.folder))}"
    limit = run.plan.tasks[0].protocol.memory_limit
    each = "none but the device's" if limit is None else f"{limit / 2**20:,.0f} MiB per process"
    print(f"memory limit: {each}", file=sys.stderr)
    with stoppable(resume):
        records = probes.execute(run, fingerprints=fingerprints)
    table = frontier(records)
    print(render_terminal(table, frontier_columns, color=sys.stdout.isatty()))
    took = format_duration(time.monotonic() - start)
    print(f"{plural(len(records), 'probe')} in {took}; records and logs are in {shown(run.folder)}")
    broken = [row for row in table if row["status"] in ("failed", "timeout")]
    if broken:
        print(f"{len(broken)} did not finish; to try them again: {resume}")
    return 1 if broken else 0
