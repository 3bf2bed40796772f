"""The columns of the tables that people read: what they are called and how they show a row."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.row_facts import Row
from bench.space import KINDS, show
from cifar.comparison import HEADINGS, inference_heading, mebibytes, millions, places
from cifar.config import option_name

DASH = "\N{EN DASH}"
"""Not measured, or nothing to compare with."""


Show = Callable[[Row], str]


def _number(key: str, show: Callable[[float], str]) -> Show:
    def cell(row: Row) -> str:
        value = row.get(key)
        if isinstance(value, (int, float)):
            return show(value)
        return "failed" if row.get(f"{key}_status") == "failed" else DASH

    return cell


def _speed(key: str, *, scale: float = 1.0, unit: str = "", fixed: int | None = None) -> Show:
    """A number, with the interval of its median if it has one: `412 [405, 418]`."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if not isinstance(value, (int, float)):
            return _number(key, str)(row)
        behind = places(scale * value) if fixed is None else fixed
        text = f"{scale * value:,.{behind}f}{unit}"
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        if isinstance(low, float) and isinstance(high, float):
            text += f" [{scale * low:,.{behind}f}, {scale * high:,.{behind}f}]"
        return text

    return cell


def _percent(key: str) -> Show:
    return _number(key, lambda value: f"{100 * value:.2f}")


def _text(key: str) -> Show:
    def cell(row: Row) -> str:
        value = row.get(key)
        return f"{value:,}" if isinstance(value, int) else str(value or DASH)

    return cell


def _setting(field: str) -> Show:
    def cell(row: Row) -> str:
        value = row[field]
        return DASH if value is None else show(value)

    return cell


def _top1(row: Row) -> str:
    mean, deviation = row.get("top1"), row.get("top1_std")
    if not isinstance(mean, float):
        trained = row["train_samples"] or row["status"] != "ok"
        return _number("top1", str)(row) if trained else "not trained"
    plus_minus = f" ± {100 * deviation:.2f}" if isinstance(deviation, float) else ""
    return f"{100 * mean:.2f}{plus_minus} (n={row['top1_n']})"


def _status(row: Row) -> str:
    """What became of its runs and their numbers: `ok`, `invalid`, `oom, invalid, partly failed`."""
    told = [str(row["status"])] if row["status"] != "ok" else []
    told += ["invalid"] if row.get("valid") is False else []
    told += ["partly failed"] if row.get("failed_measurements") else []
    return ", ".join(told) or "ok"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the tables that people read."""

    heading: str
    show: Show
    numeric: bool = True


IDENTITY = (
    ("model", HEADINGS["model"], "{}"),
    ("layout", "Layout", "{}"),
    ("compile", "Compile", "{}"),
    ("batch_size", HEADINGS["batch_size"], "batch {}"),
    ("num_processes", "Procs", "{} process(es)"),
    ("launcher", "Launcher", "{}"),
    ("exchange", "Exchange", "{}"),
    ("accumulation_steps", "Accum.", "{} accumulation step(s)"),
    ("data", "Data", ""),
    ("recipe", "Recipe", "recipe {}"),
    ("trained_samples", "Trained (samples)", "top-1 after {} training samples"),
    ("torch", "torch", ""),
    ("code", "Sources", ""),
    ("runs", "Runs", "{} run(s) each"),
)
"""Key, heading, and how the caption says it when it is the same for all rows."""

ALWAYS = ("model", "batch_size")

SIZES = (
    Column(heading=HEADINGS["top1"], show=_top1),
    Column(
        heading=HEADINGS["checkpoint_bytes"],
        show=_number("checkpoint_bytes", lambda value: mebibytes(value, 2)),
    ),
    Column(heading=HEADINGS["param_count"], show=_number("param_count", millions)),
)

RATE = Column(heading=HEADINGS["train_throughput"], show=_speed("train_throughput"))
TRAINING = Column(heading=HEADINGS["training_seconds"], show=_speed("training_seconds"))
MEMORY = Column(heading=HEADINGS["peak_memory_bytes"], show=_number("peak_memory_bytes", mebibytes))
STRAGGLER = Column(heading="Straggler", show=_speed("straggler_ratio", unit="x", fixed=2))
RATIO = Column(heading="vs fp32", show=_speed("vs_fp32", unit="x", fixed=2))


def distinct(table: Sequence[Row], key: str) -> list[str]:
    """The texts of a column in order; rows that trained or finished nothing say nothing of it."""
    silent = key in ("trained_samples", "runs")
    return list(dict.fromkeys(_text(key)(row) for row in table if row.get(key) or not silent))


def _identity_columns(table: Sequence[Row], always: Sequence[str]) -> list[Column]:
    return [
        Column(
            heading=heading,
            show=_text(key),
            numeric=any(isinstance(row.get(key), int) for row in table),
        )
        for key, heading, _ in IDENTITY
        if key in always or (key not in ALWAYS and len(distinct(table, key)) > 1)
    ]


def _differing(table: Sequence[Row], key: str, separator: str, heading: str) -> list[Column]:
    """A column of those parts of a text that not all rows have; none where all are equal."""
    parts = [str(row.get(key) or "").split(separator) for row in table]
    shared = set(parts[0]).intersection(*parts) if parts else set()

    def show(row: Row) -> str:
        own = str(row.get(key) or "").split(separator)
        told = [part for part in own if part not in shared and not part.startswith("torch ")]
        return separator.join(told) or DASH

    texts = {show(row) for row in table}
    return [Column(heading=heading, show=show, numeric=False)] if len(texts) > 1 else []


def _telling_columns(table: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """`columns`, and what else tells rows apart that are of different records."""
    told = [*columns, *_differing(table, "packages", ", ", "Software")]
    protocol = Column(heading="Protocol", show=lambda row: str(row["protocol"])[:8])
    for further in (_differing(table, "worker", " ", "Worker"), [protocol]):
        shown = [(row.get("precision"), *(column.show(row) for column in told)) for row in table]
        if len(set(shown)) < len(shown):
            told += further
    return told


def _status_columns(table: Sequence[Row]) -> list[Column]:
    broken = any(_status(row) != "ok" for row in table)
    return [Column(heading="Status", show=_status, numeric=False)] if broken else []


PUBLISHED = (
    Column(
        heading="Published top-1 (%)",
        show=_percent("published_top1"),
    ),
    Column(
        heading="Published (MiB)",
        show=_number("published_checkpoint_bytes", lambda value: mebibytes(value, 2)),
    ),
    Column(
        heading="Published (ms/sample)",
        show=_speed("published_inference_latency", scale=1000),
    ),
)
"""What the project says that a recipe is made after, see `bench.published`."""


def has_published(table: Sequence[Row]) -> bool:
    """Whether some rows stand beside the figures of the projects that their recipes are after."""
    return any("published_top1" in row for row in table)


def result_columns(table: Sequence[Row]) -> list[Column]:
    """The columns of rows of `bench.rows.rows`."""
    keys = {key for row in table for key in row}
    sizes = sorted(int(key[19:]) for key in keys if re.fullmatch(r"inference_latency_b\d+", key))
    inference = [
        Column(
            heading=inference_heading(size),
            show=_speed(f"inference_latency_b{size}", scale=1000),
        )
        for size in sizes
    ]
    identity = _telling_columns(table, _identity_columns(table, ALWAYS))
    status = _status_columns(table)
    training = [TRAINING] if "training_seconds" in keys else []
    published = PUBLISHED if has_published(table) else ()
    precision = [Column(heading="Precision", show=_text("precision"), numeric=False)]
    ranks = [STRAGGLER] if "straggler_ratio" in keys else []
    rates = [RATE, *training, *ranks]
    which = [*identity, *(precision if published else [])]
    return [*which, *SIZES, *published, *inference, *rates, MEMORY, RATIO, *status]


def scaling_columns(table: Sequence[Row]) -> list[Column]:
    """The columns of rows of `bench.efficiency.scaling_rows` that were compared."""
    keys = {key for row in table for key in row}
    accuracy = SIZES[:1] if "top1" in keys and any(row.get("top1") for row in table) else ()
    return [
        *_identity_columns(table, (*ALWAYS, "num_processes", "launcher")),
        *accuracy,
        RATE,
        Column(heading="Speed-up", show=_speed("speed_up", unit="x", fixed=2)),
        Column(heading="Weak (%)", show=_speed("weak_efficiency", scale=100, fixed=1)),
        Column(heading="Strong (%)", show=_speed("strong_efficiency", scale=100, fixed=1)),
        Column(heading="Comm. (%)", show=_speed("communication_share", scale=100, fixed=1)),
        STRAGGLER,
        MEMORY,
        *_status_columns(table),
    ]


def frontier_columns(table: Sequence[Row]) -> list[Column]:
    """The columns of rows of `bench.frontier.frontier`."""
    return [
        *_identity_columns(table, ("model",)),
        Column(heading="Memory limit (MiB)", show=_number("memory_limit", mebibytes)),
        Column(heading="Largest batch", show=_text("largest_batch")),
        Column(heading="Smallest out of memory", show=_text("smallest_oom")),
        MEMORY,
        RATE,
        Column(heading="Probes", show=_text("probes")),
        *_status_columns(table),
    ]


def trial_columns(table: Sequence[Row]) -> list[Column]:
    """The columns of rows of `bench.trial_rows.trial_rows`."""
    varied = [field for field in KINDS if field in table[0]]
    return [
        Column(heading="Trial", show=_text("trial")),
        *_identity_columns(table, ("model",)),
        Column(heading="Validation top-1 (%)", show=_percent("validation_top1")),
        Column(heading="Loss", show=_number("validation_loss", lambda value: f"{value:.4f}")),
        Column(
            heading="Epochs", show=lambda row: f"{row['epochs_run']} of {row['epochs_planned']}"
        ),
        *(
            Column(
                heading=option_name(field),
                show=_setting(field),
                numeric=KINDS[field] in (int, float),
            )
            for field in varied
        ),
        Column(heading="Status", show=_text("status"), numeric=False),
    ]
