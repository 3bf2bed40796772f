"""Records as the tables that commands print: cells, sweeps, memory frontiers and searches."""

import itertools
import sys
from collections.abc import Sequence
from functools import partial
from typing import Literal

from bench.record import Record


def print_tables(records: Sequence[Record]) -> None:
    """For the terminal; nothing if there are no records."""
    if records:
        print(render_records(records, "terminal", sys.stdout.isatty()))


def render_records(
    records: Sequence[Record],
    form: Literal["terminal", "markdown", "csv"],
    color: bool,
    sort: str | None = None,
    chosen: str | None = None,
) -> str:
    """The tables of records, rows sorted by a column and filtered; see `bench table`."""
    from bench import columns, efficiency, frontier, selection, table, trial_rows
    from bench.row_facts import Row

    def picked(lines: list[Row]) -> list[Row]:
        if chosen is not None:
            lines = selection.filter_rows(lines, selection.parse_filter(chosen))
        return lines if sort is None else selection.sort_rows(lines, sort)

    cells, searches = trial_rows.told_apart(records)
    trials = [picked(trial_rows.trial_rows(search)) for search in searches]
    lines = picked(efficiency.scaling_rows(cells)) if cells else []
    if form == "csv":
        return table.render_csv([*lines, *itertools.chain(*trials)])
    markdown = form == "markdown"
    render = table.render_markdown if markdown else partial(table.render_terminal, color=color)
    swept, others = efficiency.told_apart(lines, cells)
    tables = [render(others)] if others else []
    if swept:
        ordered = efficiency.in_order(swept) if sort is None else swept
        tables.append(render(ordered, columns.scaling_columns))
    probes = [record for record in cells if record.suite == frontier.SUITE]
    if probes and chosen is None and sort is None:
        tables.append(render(frontier.frontier(probes), columns.frontier_columns))
    return "\n".join([*tables, *(render(each, columns.trial_columns) for each in trials)])
