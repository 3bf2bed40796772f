"""Records to rows, and which rows in which order.

A row is a flat dict: what was measured (`model`, `layout`, ...), then every measurement under its
name in base units, so that a new metric is a new column of the CSV. Runs that differ only in repeat
and seed share a row; runs on other hardware, software, code or data never do.
"""

import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bench.record import DataFacts, Environment, Measurement, Record
from bench.row_facts import Row, what
from bench.spec import Cell
from bench.stats import (
    FEWEST,
    median_interval,
    percentile,
    ratio_interval,
    resolves,
    spread,
    straggler_ratio,
)
from cifar.serialize import digest


@functools.lru_cache(maxsize=4096)
def _cell_key(cell: Cell, precision: str) -> str:
    """Digest of a cell at another precision and seed 0."""
    train = replace(cell.train, seed=0, precision=precision)  # type: ignore[arg-type]
    return digest(replace(cell, train=train))


def row_key(record: Record) -> tuple[str, str]:
    """The columns `cell` and `protocol` of the row that a record is in."""
    return _cell_key(record.cell, record.cell.precision), record.protocol.digest


def _completed(records: Iterable[Record]) -> list[Record]:
    """The last record of every task of a run; one that died early gets its run's environment.

    A task is recorded again when it is tried again. A process that died before it said what it ran
    on ran on what the others of its cell, else of its run, did; likewise for the data.
    """
    last = {(record.run_id, *record.key): record for record in records}
    environments: dict[tuple[str, str], Environment] = {}
    data: dict[tuple[str, str], DataFacts] = {}
    for record in last.values():
        for key in (_cell_key(record.cell, record.cell.precision), ""):
            if record.environment:
                environments.setdefault((record.run_id, key), record.environment)
        if record.data:
            data.setdefault((record.run_id, str(record.cell.train.data)), record.data)

    def completed(record: Record) -> Record:
        if record.environment and record.data:
            return record
        run, key = record.run_id, _cell_key(record.cell, record.cell.precision)
        inherited = environments.get((run, key)) or environments.get((run, ""))
        facts = data.get((run, str(record.cell.train.data)))
        return replace(
            record, environment=record.environment or inherited, data=record.data or facts
        )

    return [completed(record) for record in last.values()]


def rows(records: Iterable[Record]) -> list[Row]:
    """One row per cell (seeds together), protocol, environment and data set, in order of arrival.

    Speeds and sizes are medians over the runs, top-1 and top-5 means over seeds with `_std`, `_n`;
    `_p50`, `_p95` and `_p99` pool the samples of all runs and ranks, and are None where these are
    too few for them (`bench.stats.resolves`); `_straggler_ratio` is the slowest rank's seconds over
    the median rank's. `inference_throughput_b64` is the samples/s of one device that is kept busy.
    `vs_fp32` is the ratio of training throughput to the fp32 row that is otherwise equal. Where a
    value differs between `bench.stats.FEWEST` runs or more, `_low` and `_high` bound its median
    with 95 % confidence, of `_n` values: one per run, as steps of one process are not independent.

    `effective_` and a name is what the last run was observed to run with (`Record.effective`).

    A row is `valid` if no finished run was disturbed, and None if none finished; `invalid_reason`
    tells what disturbed the last such run, and how many there are. Numbers come from all finished
    runs, disturbed or not: a median withstands the minority of them, and runs left out after they
    were seen would make the rest look steadier than the machine is.

    Numbers that could not be taken, or were wrong, are told whatever the other runs found:
    `_status` is `failed`, `_failed` how often, and `failed_measurements` says which and why.
    """
    groups = {_identity(group[0], group[0].cell.precision): group for group in grouped(records)}
    result = {identity: _row(group) for identity, group in groups.items()}
    for identity, group in groups.items():
        row, reference = result[identity], result.get(_identity(group[0], "fp32"), {})
        mine, other = row.get("train_throughput"), reference.get("train_throughput")
        if isinstance(mine, float) and isinstance(other, float):
            row["vs_fp32"] = mine / other
            if row is not reference:
                row |= _ratio_bounds(rates(group), rates(groups[_identity(group[0], "fp32")]))
    return list(result.values())


def grouped(records: Iterable[Record]) -> list[list[Record]]:
    """The last record of every task, those that share a row together, in the order of the rows."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in _completed(records):
        groups.setdefault(_identity(record, record.cell.precision), []).append(record)
    return list(groups.values())


def _identity(record: Record, precision: str) -> tuple[str, ...]:
    environment, data = record.environment, record.data
    return (
        _cell_key(record.cell, precision),
        record.protocol.digest,
        repr(environment.key()) if environment else "",
        data.fingerprint if data else "",
    )


def _row(group: Sequence[Record]) -> Row:
    finished = [record for record in group if record.status == "ok"]
    broken = [record for record in group if record.status != "ok"]
    status = broken[-1].status if broken else "ok"
    told = broken or [record for record in finished if record.reason]
    reason = told[-1].reason if told else ""
    if told and len(told) < len(group):
        reason = f"{len(told)} of {len(group)} runs: {reason}"
    row = what(group[0], _cell_key(group[0].cell, group[0].cell.precision))
    row |= {
        "status": status,
        "reason": " ".join(reason.split()),
        "runs": len(finished),
        "trained_samples": _trained_samples(finished),
        **_validity(finished),
        "failed_measurements": "",
        "vs_fp32": None,
    }
    by_key: dict[str, list[tuple[int, Measurement]]] = {}
    for record in finished:
        for measurement in record.measurements:
            seeded = record.cell.train.seed, measurement
            by_key.setdefault(_metric_key(measurement), []).append(seeded)
    alone = {key: [each for _, each in found] for key, found in by_key.items()}
    row["failed_measurements"] = _failed_measurements(alone)
    measured: Row = {}
    for key, found in by_key.items():
        measured |= _scores(key, found) if key in SCORES else _summary(key, alone[key])
        measured |= _failures(key, alone[key])
    if finished:
        measured |= {f"effective_{key}": each for key, each in finished[-1].effective.items()}
    # A measurement may have the name of a column that is there already, which then stays.
    return {**row, **measured, **row}


def _failed(measurements: Iterable[Measurement]) -> list[Measurement]:
    return [each for each in measurements if each.status == "failed"]


def _failures(key: str, measurements: Sequence[Measurement]) -> Row:
    """Whether some failed, and how many, be there numbers of others or not."""
    count = len(_failed(measurements))
    return {f"{key}_status": "failed", f"{key}_failed": count} if count else {}


def _failed_measurements(found: Mapping[str, Sequence[Measurement]]) -> str:
    """Which failed, of how many, and the last one's reason; those that share both together."""
    names: dict[str, list[str]] = {}
    for key, measurements in found.items():
        if failed := _failed(measurements):
            of_runs = f"{len(failed)} of {len(measurements)}: " if len(measurements) > 1 else ""
            why = " ".join(f"{of_runs}{failed[-1].reason}".split())
            names.setdefault(why, []).append(key)
    return "; ".join(f"{', '.join(keys)}: {why}" for why, keys in names.items())


SCORES = ("top1", "top5")
"""Measurements of trained weights, of which the unit is the seed."""


def _scores(key: str, found: Iterable[tuple[int, Measurement]]) -> Row:
    """Mean over seeds, deviation and number of them; repeats of a seed are averaged first."""
    by_seed: dict[int, list[float]] = {}
    status = "absent"
    for seed, measurement in found:
        status = measurement.status
        if (value := measurement.value) is not None:
            by_seed.setdefault(seed, []).append(value)
    means = [statistics.fmean(values) for values in by_seed.values()]
    if not means:
        return {key: None, f"{key}_status": status}
    return {key: statistics.fmean(means), f"{key}_std": spread(means), f"{key}_n": len(means)}


def _trained_samples(finished: Iterable[Record]) -> int | None:
    """How many samples the weights had been trained on that top-1 was taken of; None: it was not.

    They are whole batches, and so may be fewer than the budget of the protocol, `train_samples`.
    """
    scores = (found for record in finished if (found := record.find("top1")))
    counts = (each.labels.get("trained_samples") for each in scores)
    return next((count for count in counts if isinstance(count, int)), None)


def _validity(finished: Sequence[Record]) -> Row:
    disturbed = [record for record in finished if not record.valid]
    reason = "; ".join(disturbed[-1].invalid) if disturbed else ""
    if len(finished) > 1 and disturbed:
        reason = f"{len(disturbed)} of {len(finished)} runs: {reason}"
    return {"valid": not disturbed if finished else None, "invalid_reason": reason}


def rates(group: Sequence[Record]) -> list[float]:
    """Training throughput of every finished run."""
    found = [record.value("train_throughput") for record in group if record.status == "ok"]
    return [rate for rate in found if rate is not None]


def _ratio_bounds(mine: Sequence[float], reference: Sequence[float]) -> Row:
    if min(len(mine), len(reference)) < FEWEST:
        return {}
    low, high = ratio_interval(mine, reference)
    return {"vs_fp32_low": low, "vs_fp32_high": high}


def _metric_key(measurement: Measurement) -> str:
    """Its column: the name and the labels that tell measurements of one name apart."""
    labels = measurement.labels
    per_sample = measurement.unit in ("s/sample", "samples/s")
    size = labels.get("batch_size") if per_sample else None
    kind = labels.get("kind") if measurement.unit == "FLOP/s" else None
    source = labels.get("source") if measurement.unit == "samples/s" else None
    own = (labels.get("backend"), labels.get("augmentation"))
    parts = (measurement.name, size and f"b{size}", *own, kind, source)
    return "_".join(str(part) for part in parts if part is not None).replace("-", "_")


def _summary(key: str, measurements: Sequence[Measurement]) -> Row:
    good = [each for each in measurements if each.status == "ok"]
    if not good:
        return {key: None, f"{key}_status": measurements[0].status}
    values = [value for each in good if (value := each.value) is not None]
    first = good[0]
    middle = float(statistics.median(values))
    row: Row = {key: middle}
    if len(values) >= FEWEST and min(values) < max(values):
        low, high = median_interval(values)
        row |= {f"{key}_low": low, f"{key}_high": high, f"{key}_n": len(values)}
    if first.unit == "samples/s" and len(first.samples) > 1:
        ratios = [straggler_ratio(each.samples) for each in good]
        row[f"{key}_straggler_ratio"] = statistics.median(ratios)
    if first.unit != "samples/s" and any(len(rank) > 1 for rank in first.samples):
        pooled = sorted(value for each in good for rank in each.samples for value in rank)
        row |= _percentiles(key, pooled)
    return row


def _percentiles(key: str, pooled: Sequence[float]) -> Row:
    return {
        f"{key}_p{percent}": percentile(pooled, percent) if resolves(percent, len(pooled)) else None
        for percent in (50, 95, 99)
    }
