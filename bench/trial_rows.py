"""The trials of a search as rows of a table, told from their records alone."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.record import Record
from bench.row_facts import Row
from bench.rows import rows
from bench.space import KINDS, Value, reads, show, value_of
from bench.tuning import SUITE, Trial, trials_of


def told_apart(records: Iterable[Record]) -> tuple[list[Record], list[list[Record]]]:
    """The records of cells, and those of every search."""
    cells: list[Record] = []
    searches: dict[str, list[Record]] = {}
    for record in records:
        (searches.setdefault(record.run_id, []) if record.suite == SUITE else cells).append(record)
    return cells, list(searches.values())


def trial_rows(records: Sequence[Record]) -> list[Row]:
    """One row per trial of a search, the best first.

    It is the row of its record (see `bench.rows.rows`), with `trial`, counted from 1; `epochs_run`
    of `epochs_planned`; and every field in which trials differ, None where a trial does not read
    it. `validation_top1` is None but for those that came to their end. `status` is `ok` for these,
    else what became of the trial, and `reason` tells why if it was not pruned.
    """
    trials = trials_of(records)
    last = {record.repeat: record for record in records}
    varied = [
        field
        for field in KINDS
        if len({value_of(trial.train, field) for trial in trials if reads(trial.train, field)}) > 1
    ]
    known = {
        name: next((found for each in records if (found := getattr(each, name))), None)
        for name in ("environment", "data")
    }
    return [_row(trial, _completed(last[trial.number], known), varied) for trial in trials]


def _completed(record: Record, known: dict[str, object]) -> Record:
    """One that died before it said where it ran, or on which images, did as the others."""
    inherited = {name: value for name, value in known.items() if getattr(record, name) is None}
    return replace(record, **inherited)  # type: ignore[arg-type]


def _row(trial: Trial, record: Record, varied: Sequence[str]) -> Row:
    (row,) = rows([record])
    return {
        **row,
        "trial": trial.number + 1,
        "epochs_run": len(trial.curve),
        "epochs_planned": trial.train.recipe.epochs,
        **{field: _flat(trial, field) for field in varied},
        "worker": None,  # its share of the cores, and which GPU: that it ran beside others
        **_status(trial),
    }


def _flat(trial: Trial, field: str) -> str | int | float | None:
    if not reads(trial.train, field):
        return None
    value: Value = value_of(trial.train, field)
    return show(value) if isinstance(value, tuple) else value


def _status(trial: Trial) -> Row:
    if trial.state == "finished":
        return {}
    told = "" if trial.state == "pruned" else f"trial {trial.number + 1}: {trial.reason}"
    return {"status": trial.state, "reason": told}
