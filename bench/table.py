"""Rows to tables for the terminal, Markdown and CSV: one per hardware and precision."""

import csv
import io
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.rows import Row, filter_rows, parse_filter, rows, sort_rows
from cifar.config import PRECISIONS

__all__ = [
    "filter_rows",
    "frontier_columns",
    "parse_filter",
    "render_csv",
    "render_markdown",
    "render_terminal",
    "result_columns",
    "rows",
    "sort_rows",
]

DASH = "\N{EN DASH}"
"""Not measured, or nothing to compare with."""


def _places(value: float) -> int:
    """Behind the point, for three significant digits and all those before the point."""
    return next((places for places, least in ((0, 100), (1, 10), (2, 1)) if value >= least), 3)


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f}"


Show = Callable[[Row], str]


def _number(key: str, show: Callable[[float], str]) -> Show:
    def cell(row: Row) -> str:
        value = row.get(key)
        if isinstance(value, (int, float)):
            return show(value)
        return "failed" if row.get(f"{key}_status") == "failed" else DASH

    return cell


def _speed(key: str, *, scale: float = 1.0, unit: str = "", places: int | None = None) -> Show:
    """A number, with the interval of its median if it has one: `412 [405, 418]`."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if not isinstance(value, (int, float)):
            return _number(key, str)(row)
        behind = _places(scale * value) if places is None else places
        text = f"{scale * value:,.{behind}f}{unit}"
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        if isinstance(low, float) and isinstance(high, float):
            text += f" [{scale * low:,.{behind}f}, {scale * high:,.{behind}f}]"
        return text

    return cell


def _text(key: str) -> Show:
    def cell(row: Row) -> str:
        value = row[key]
        return f"{value:,}" if isinstance(value, int) else str(value or DASH)

    return cell


def _top1(row: Row) -> str:
    mean, deviation = row.get("top1"), row.get("top1_std")
    if not isinstance(mean, float):
        trained = row["train_samples"] or row["status"] != "ok"
        return _number("top1", str)(row) if trained else "not trained"
    plus_minus = f" ± {100 * deviation:.2f}" if isinstance(deviation, float) else ""
    return f"{100 * mean:.2f}{plus_minus} (n={row['top1_n']})"


def _notes(table: Sequence[Row]) -> list[str]:
    """Why rows are not ok or not valid, each reason once, with the models it befell."""
    models: dict[str, list[str]] = {}
    for row in table:
        if row["status"] != "ok":
            models.setdefault(f"{row['status']}: {row['reason']}", []).append(str(row["model"]))
        if row["valid"] is False:
            models.setdefault(f"invalid: {row['invalid_reason']}", []).append(str(row["model"]))
    return [f"{', '.join(dict.fromkeys(names))} {why}" for why, names in models.items()]


def _status(row: Row) -> str:
    """Its status, and whether its runs were disturbed: `ok`, `invalid`, `oom, invalid`."""
    if row.get("valid") is not False:
        return str(row["status"])
    return "invalid" if row["status"] == "ok" else f"{row['status']}, invalid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the tables that people read."""

    heading: str
    show: Show
    numeric: bool = True


IDENTITY = (
    ("model", "Model", "{}"),
    ("layout", "Layout", "{}"),
    ("compile", "Compile", "{}"),
    ("batch_size", "Batch", "batch {}"),
    ("num_processes", "Procs", "{} process(es)"),
    ("launcher", "Launcher", "{}"),
    ("accumulation_steps", "Accum.", "{} accumulation step(s)"),
    ("data", "Data", ""),
    ("recipe", "Recipe", "recipe {}"),
    ("train_samples", "Trained (samples)", "top-1 after {} training samples"),
    ("torch", "torch", ""),
    ("code", "Sources", ""),
    ("runs", "Runs", "{} run(s) each"),
)
"""Key, heading, and how the caption says it when it is the same for all rows."""

ALWAYS = ("model", "batch_size")

SIZES = (
    Column(heading="Top-1 (%)", show=_top1),
    Column(
        heading="Size (MiB)",
        show=_number("checkpoint_bytes", lambda value: f"{value / 2**20:,.2f}"),
    ),
    Column(heading="Params (M)", show=_number("param_count", lambda value: f"{value / 1e6:,.2f}")),
)

SPEEDS = (
    Column(heading="Train (images/s)", show=_speed("train_throughput")),
    Column(
        heading="Peak memory (MiB)",
        show=_number("peak_memory_bytes", _mebibytes),
    ),
    Column(heading="vs fp32", show=_speed("vs_fp32", unit="x", places=2)),
)


def _distinct(table: Sequence[Row], key: str) -> list[str]:
    """The texts of a column in order; rows that trained or finished nothing say nothing of it."""
    silent = key in ("train_samples", "runs")
    return list(dict.fromkeys(_text(key)(row) for row in table if not (silent and row[key] == 0)))


def _identity_columns(table: Sequence[Row], always: Sequence[str]) -> list[Column]:
    return [
        Column(heading=heading, show=_text(key), numeric=isinstance(table[0][key], int))
        for key, heading, _ in IDENTITY
        if key in always or (key not in ALWAYS and len(_distinct(table, key)) > 1)
    ]


def _status_columns(table: Sequence[Row]) -> list[Column]:
    broken = any(_status(row) != "ok" for row in table)
    return [Column(heading="Status", show=_status, numeric=False)] if broken else []


def result_columns(table: Sequence[Row]) -> list[Column]:
    """The columns of rows of `bench.rows.rows`."""
    keys = {key for row in table for key in row}
    sizes = sorted(int(key[19:]) for key in keys if re.fullmatch(r"inference_latency_b\d+", key))
    inference = [
        Column(
            heading=f"Inference b{size} (ms/sample)",
            show=_speed(f"inference_latency_b{size}", scale=1000),
        )
        for size in sizes
    ]
    identity, status = _identity_columns(table, ALWAYS), _status_columns(table)
    return [*identity, *SIZES, *inference, *SPEEDS, *status]


def frontier_columns(table: Sequence[Row]) -> list[Column]:
    """The columns of rows of `bench.frontier.frontier`."""
    rate, memory, _ = SPEEDS
    return [
        *_identity_columns(table, ("model",)),
        Column(heading="Memory limit (MiB)", show=_number("memory_limit", _mebibytes)),
        Column(heading="Largest batch", show=_text("largest_batch")),
        Column(heading="Smallest out of memory", show=_text("smallest_oom")),
        memory,
        rate,
        Column(heading="Probes", show=_text("probes")),
        *_status_columns(table),
    ]


def _captions(table: Sequence[Row]) -> list[tuple[str, str]]:
    """What all rows share, as (subject, text)."""
    subjects = (
        ("Hardware", "machine"),
        ("Worker", "worker"),
        ("Software", "software"),
        ("Code", "source"),
        ("Data", "data_set"),
    )
    lines = [
        (name, text) for name, key in subjects for text in _distinct(table, key) if text != DASH
    ]
    shared = []
    for key, _, phrase in IDENTITY:
        values = _distinct(table, key)
        if phrase and key not in ALWAYS and len(values) == 1:
            shared.append(_plural(phrase.format(values[0]), values[0]))
    shown = r"(train_throughput|inference_latency_b\d+)_low"
    if any(re.fullmatch(shown, key) for row in table for key in row):
        lines.append(("[ ]", "95 % interval of the median over processes"))
    return [*lines, ("Cells", ", ".join(shared))]


def _plural(phrase: str, count: str) -> str:
    one = count == "1"
    return phrase.replace("(es)", "" if one else "es").replace("(s)", "" if one else "s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """The tables of one hardware: the same columns for all precisions."""

    hardware: str
    captions: list[tuple[str, str]]
    columns: list[Column]
    tables: dict[str, list[list[str]]]
    """By precision, the cells' texts in the order of `columns`."""
    notes: dict[str, list[str]]
    """By precision, why rows are not ok or not valid."""


Layout = Callable[[Sequence[Row]], list[Column]]
"""From the rows of one hardware to the columns that show them."""


def sections(table: Sequence[Row], layout: Layout) -> list[Section]:
    """Split rows by hardware and precision, and lay them out."""
    by_hardware: dict[str, list[Row]] = {}
    for row in table:
        by_hardware.setdefault(str(row["hardware"]), []).append(row)
    result = []
    for hardware, group in by_hardware.items():
        columns = layout(group)
        cells = {
            precision: [
                [column.show(row) for column in columns]
                for row in group
                if row["precision"] == precision
            ]
            for precision in PRECISIONS
        }
        tables = {precision: lines for precision, lines in cells.items() if lines}
        notes = {
            precision: _notes([row for row in group if row["precision"] == precision])
            for precision in tables
        }
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


def render_markdown(table: Sequence[Row], layout: Layout = result_columns) -> str:
    """Tables in GitHub's Markdown, a heading per hardware and per precision."""
    lines: list[str] = []
    for section in sections(table, layout):
        lines += [f"## {section.hardware}", ""]
        lines += [f"- {subject}: {_escape(text)}" for subject, text in section.captions]
        for precision, cells in section.tables.items():
            headings = [column.heading for column in section.columns]
            rule = ["---:" if column.numeric else ":---" for column in section.columns]
            lines += ["", f"### {precision}", ""]
            lines += [f"| {' | '.join(headings)} |", f"| {' | '.join(rule)} |"]
            lines += [f"| {' | '.join(map(_escape, texts))} |" for texts in cells]
            notes = section.notes[precision]
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
    from rich import box
    from rich.console import Console
    from rich.table import Table
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
        for precision, cells in section.tables.items():
            console.print()
            grid = Table(title=Text(precision), title_justify="left", box=box.SIMPLE_HEAD)
            grid.padding, grid.pad_edge = (0, 1, 0, 0), False
            for column, texts in zip(section.columns, zip(*cells, strict=True), strict=True):
                grid.add_column(
                    Text(column.heading),
                    justify="right" if column.numeric else "left",
                    overflow="fold",
                    no_wrap=not column.numeric,
                    min_width=max(
                        len(word) for text in (column.heading, *texts) for word in text.split()
                    ),
                )
            for line in cells:
                grid.add_row(*map(Text, line))
            console.print(grid, crop=False)
            for note in section.notes[precision]:
                console.print(Text(f" {note}"))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def render_csv(table: Sequence[Row]) -> str:
    """All rows in one CSV: bytes, seconds, samples/s, fractions; empty where not measured."""
    header = list(dict.fromkeys(key for row in table for key in row))
    output = io.StringIO()
    writer = csv.DictWriter(output, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return output.getvalue()
