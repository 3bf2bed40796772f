"""Rows to tables for the terminal, Markdown and CSV: one per hardware and precision.

Rows beside published figures stand in one table, whose projects chose their precisions themselves.
"""

import csv
import io
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.columns import (
    ALWAYS,
    DASH,
    IDENTITY,
    Column,
    distinct,
    has_published,
    result_columns,
)
from bench.row_facts import Row
from cifar.config import PRECISIONS

EVERY = "all precisions"
"""The title of a table that is not of one precision."""

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """The tables of one hardware: the same columns for all precisions.

    Tables have a precision for title, or `EVERY`.
    """

    hardware: str
    captions: list[tuple[str, str]]
    columns: list[Column]
    tables: dict[str, list[list[str]]]
    """By title, the cells' texts in the order of `columns`."""
    notes: dict[str, list[str]]
    """By title, why rows are not ok or not valid, and which of their numbers failed."""


Layout = Callable[[Sequence[Row]], list[Column]]
"""From the rows of one hardware to the columns that show them."""


def sections(table: Sequence[Row], layout: Layout) -> list[Section]:
    """Split rows by hardware and title, and lay them out."""
    by_hardware: dict[str, list[Row]] = {}
    for row in table:
        by_hardware.setdefault(str(row["hardware"]), []).append(row)
    result = []
    for hardware, group in by_hardware.items():
        columns, parts = layout(group), _by_title(group)
        tables = {
            title: [[column.show(row) for column in columns] for row in part]
            for title, part in parts.items()
        }
        notes = {title: _notes(part) for title, part in parts.items()}
        result.append(
            Section(
                hardware=hardware,
                captions=_captions(group),
                columns=columns,
                tables=tables,
                notes=notes,
            )
        )
    return result


def _by_title(group: Sequence[Row]) -> dict[str, Sequence[Row]]:
    if has_published(group):
        return {EVERY: group}
    parts = {name: [row for row in group if row["precision"] == name] for name in PRECISIONS}
    return {name: part for name, part in parts.items() if part}


def _notes(table: Sequence[Row]) -> list[str]:
    """What `Section.notes` holds, each reason once, with the models it befell."""
    models: dict[str, list[str]] = {}
    for row in table:
        kind = "note" if row["status"] == "ok" else row["status"]
        told = [f"{kind}: {row['reason']}"] if row["reason"] else []
        told += [f"invalid: {row['invalid_reason']}"] if row["valid"] is False else []
        told += [f"partly failed: {failed}"] if (failed := row["failed_measurements"]) else []
        for why in told:
            models.setdefault(why, []).append(str(row["model"]))
    return [f"{', '.join(dict.fromkeys(names))} {why}" for why, names in models.items()]


def _captions(table: Sequence[Row]) -> list[tuple[str, str]]:
    """What all rows share, as (subject, text)."""
    subjects = (
        ("Hardware", "machine"),
        ("Worker", "worker"),
        ("Software", "software"),
        ("Code", "source"),
        ("Data", "data_set"),
        ("Efficiency", "compared_with"),
    )
    lines = [
        (name, text) for name, key in subjects for text in distinct(table, key) if text != DASH
    ]
    shared = []
    for key, _, phrase in IDENTITY:
        values = distinct(table, key)
        if phrase and key not in ALWAYS and len(values) == 1 and values != [DASH]:
            shared.append(_plural(phrase.format(values[0]), values[0]))
    shown = r"(train_throughput|inference_latency_b\d+|(weak|strong)_efficiency|speed_up)_low"
    if any(re.fullmatch(shown, key) for row in table for key in row):
        lines.append(("[ ]", "95 % interval of the median over processes"))
    return [*lines, ("Cells", ", ".join(shared))]


def _plural(phrase: str, count: str) -> str:
    one = count == "1"
    return phrase.replace("(es)", "" if one else "es").replace("(s)", "" if one else "s")


def render_markdown(table: Sequence[Row], layout: Layout = result_columns) -> str:
    """Tables in GitHub's Markdown, a heading per hardware and per precision."""
    lines: list[str] = []
    for section in sections(table, layout):
        lines += [f"## {section.hardware}", ""]
        lines += [f"- {subject}: {_escape(text)}" for subject, text in section.captions]
        for title, cells in section.tables.items():
            headings = [column.heading for column in section.columns]
            rule = ["---:" if column.numeric else ":---" for column in section.columns]
            lines += ["", f"### {title}", ""]
            lines += [f"| {' | '.join(headings)} |", f"| {' | '.join(rule)} |"]
            lines += [f"| {' | '.join(map(_escape, texts))} |" for texts in cells]
            notes = section.notes[title]
            lines += ["", *(f"- {_escape(note)}" for note in notes)] if notes else []
        lines.append("")
    return "\n".join(lines)


def _escape(text: str) -> str:
    return re.sub(r"([\\|<`*\[])", r"\\\1", " ".join(text.split()))


def render_terminal(
    table: Sequence[Row],
    layout: Layout = result_columns,
    *,
    width: int | None = None,
    color: bool = False,
) -> str:
    """Tables for a terminal of `width` characters: the actual one's by default, or 100 if less.

    A narrower terminal wraps whole lines, which reads better than broken words.
    """
    from rich.console import Console
    from rich.text import Text

    output = io.StringIO()
    width = width or max(100, shutil.get_terminal_size((120, 24)).columns)
    console = Console(
        file=output, width=width, force_terminal=color, highlight=False, markup=False, emoji=False
    )
    for section in sections(table, layout):
        console.print(Text(section.hardware, style="bold"))
        for subject, text in section.captions:
            console.print(Text(f"{subject}: {text}", style="dim"))
        for title, cells in section.tables.items():
            console.print()
            console.print(_grid(title, section.columns, cells), crop=False)
            for note in section.notes[title]:
                console.print(Text(f" {note}"))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _grid(title: str, columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> "Table":
    """A table with columns as wide as their longest word."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    grid.padding, grid.pad_edge = (0, 1, 0, 0), False
    for column, texts in zip(columns, zip(*cells, strict=True), strict=True):
        words = [word for text in (column.heading, *texts) for word in text.split()]
        grid.add_column(
            Text(column.heading),
            justify="right" if column.numeric else "left",
            overflow="fold",
            no_wrap=not column.numeric,
            min_width=max(map(len, words)),
        )
    for line in cells:
        grid.add_row(*map(Text, line))
    return grid


def render_csv(table: Sequence[Row]) -> str:
    """All rows in one CSV: bytes, seconds, samples/s, fractions; empty where not measured."""
    header = list(dict.fromkeys(key for row in table for key in row))
    output = io.StringIO()
    writer = csv.DictWriter(output, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return output.getvalue()
