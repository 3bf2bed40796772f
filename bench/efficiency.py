"""How training scales over processes: rows of a sweep, compared with its cells of one process."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.record import Record
from bench.row_facts import Row
from bench.rows import grouped, rates, row_key, rows
from bench.stats import FEWEST, ratio_interval
from cifar.config import Parallel
from cifar.serialize import digest

SUITE = "scaling"
"""The suite's name in runs and records."""
_THREADS = "OMP_NUM_THREADS"
"""A process's share of the cores, so that it differs within a sweep."""
Baseline = tuple[object, ...]
"""What a one-process cell is known by: its sweep, its batch, and last its threads in total."""


def scaling_rows(records: Iterable[Record]) -> list[Row]:
    """The rows of `bench.rows.rows`, and how far those of several processes scale.

    A row is compared with that of one process under plain DDP which is otherwise equal, and of the
    same sources, software, machine and images. `weak_efficiency` is its images/s over those that N
    processes would have without any loss, by one process at the batch of one of them;
    `strong_efficiency` the same by one process at the same global batch, and `speed_up` its
    images/s over those of that process. Without loss N GPUs have N times the images/s of one. N
    processes on a CPU share its cores: they are compared with one process that has as many threads
    as all of them together, and without loss have as many images/s as that.

    `_low` and `_high` bound the ratios as they do `vs_fp32`. `communication_share` is what
    averaging adds to a step over the step. `compared_with` says with what, or why with nothing.
    Only rows that were compared have these columns; None: not measured.
    """
    known = list(records)
    groups = grouped(known)
    pairs = list(zip(rows(known), groups, strict=True))
    alone = {_baseline(group[0]): group for _, group in pairs if _is_alone(group[0])}
    return [_compared(row, group, alone) for row, group in pairs]


def _is_on_cpu(record: Record) -> bool:
    return record.environment is not None and record.environment.device == "cpu"


def _is_alone(record: Record) -> bool:
    return record.cell.num_processes == 1 and record.cell.launcher == "ddp"


def _baseline(record: Record, *, batch_size: int | None = None) -> Baseline:
    """What a row of one process is known by that this record may be compared with.

    Its batch is the record's own when none is given.
    """
    train, environment, data = record.cell.train, record.environment, record.data
    recipe = replace(train.recipe, global_batch_size=1)
    same = replace(train, seed=0, parallel=Parallel(), recipe=recipe)
    machine: tuple[object, ...] = ()
    if environment:
        key = environment.key()
        settings = {k: v for k, v in environment.settings.items() if k != _THREADS}
        machine = (
            *(repr(key["code"]), repr(key["software"]), environment.cpu_model),
            *(frozenset(environment.gpu_names), environment.side_by_side),
            frozenset(filter(None, environment.gpu_power_limits)),
            frozenset(filter(None, environment.gpu_application_clocks)),
            *(tuple(sorted(settings.items())), environment.cpu_count if _is_on_cpu(record) else 0),
        )
    images = data.fingerprint if data else ""
    size = train.recipe.global_batch_size if batch_size is None else batch_size
    return digest(same), record.protocol.digest, machine, images, size, _threads(record)


def _threads(record: Record) -> int:
    """Of all processes on a CPU together; 0 on GPUs, where they do not matter."""
    if record.environment is None or not _is_on_cpu(record):
        return 0
    return record.environment.threads * record.cell.num_processes


def _compared(row: Row, group: Sequence[Record], alone: dict[Baseline, list[Record]]) -> Row:
    record = group[0]
    count, batch = record.cell.num_processes, record.cell.train.recipe.global_batch_size
    keys = _baseline(record, batch_size=batch // count), _baseline(record)
    same_share, same_batch = map(alone.get, keys)
    if same_share is None and same_batch is None:
        others = [each[-1] for each in alone if each[:-1] in [key[:-1] for key in keys]]
        return {**row, "compared_with": _with_nothing(record, others)} if others else row
    if count == 1 and not _is_alone(record):
        return row
    times = 1 if _is_on_cpu(record) else count
    weak = _ratio("weak_efficiency", group, same_share, times)
    strong = _ratio("strong_efficiency", group, same_batch, times)
    return {
        **row,
        **weak,
        **strong,
        **_ratio("speed_up", group, same_batch, 1),
        "communication_share": _communication_share(row),
        "compared_with": _with_what(record),
    }


def _ratio(
    name: str, group: Sequence[Record], reference: Sequence[Record] | None, times: int
) -> Row:
    """A ratio of median images/s to `times` those of a reference, with its interval."""
    mine, other = rates(group), rates(reference or ())
    if not (mine and other):
        return {name: None}
    ratio = statistics.median(mine) / statistics.median(other) / times
    if mine == other or min(len(mine), len(other)) < FEWEST:
        return {name: ratio}
    low, high = ratio_interval(mine, other)
    return {name: ratio, f"{name}_low": low / times, f"{name}_high": high / times}


def _communication_share(row: Row) -> float | None:
    added, rate, batch = (
        row.get(key) for key in ("step_communication", "train_throughput", "batch_size")
    )
    if isinstance(added, float) and isinstance(rate, float) and isinstance(batch, int):
        return added / (batch / rate)
    return None


def _with_what(record: Record) -> str:
    threads = _threads(record)
    if not threads:
        return "images/s against N times those of one process"
    them = "the same 1 thread" if threads == 1 else f"the same {threads} threads in total"
    return f"images/s against those of one process with {them}"


def _with_nothing(record: Record, threads: Sequence[object]) -> str:
    """Why processes that do not share the cores out evenly are not compared."""
    return (
        f"none of {record.cell.num_processes} processes, which have {_threads(record)} threads in "
        f"total where one process has {threads[0]}"
    )


def told_apart(table: Sequence[Row], records: Iterable[Record]) -> tuple[list[Row], list[Row]]:
    """The rows to show as scaling, and those to show by themselves.

    Of the suite `scaling` all are the former alone; those of others that were compared over several
    processes are both.
    """
    known = list(records)
    own = {row_key(each) for each in known if each.suite == SUITE}
    within = [row for row in table if (row["cell"], row["protocol"]) in own]
    compared = [row for row in table if "compared_with" in row and row not in within]
    if all(row["num_processes"] == 1 for row in compared):
        compared = []
    others = [
        {key: each for key, each in row.items() if key != "compared_with"}
        for row in table
        if row not in within
    ]
    return [*within, *compared], others


def in_order(table: Iterable[Row]) -> list[Row]:
    """The rows by model, exchange, launcher, processes and batch."""
    keys = ("model", "exchange", "launcher", "num_processes", "batch_size")

    def order(row: Row) -> tuple[tuple[int, str | int | float], ...]:
        values = (row.get(key) or "" for key in keys)
        return tuple((isinstance(value, str), value) for value in values)

    return sorted(table, key=order)
