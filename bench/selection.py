"""Which rows of a table, and in which order."""

import difflib
import re
from collections.abc import Mapping, Sequence

from bench.row_facts import Row
from cifar.errors import UserError

ALIASES = {
    "batch": "batch_size",
    "procs": "num_processes",
    "accumulation": "accumulation_steps",
    "samples": "trained_samples",
    "size": "checkpoint_bytes",
    "params": "param_count",
    "inference_b1": "inference_latency_b1",
    "inference_b256": "inference_latency_b256",
    "weak": "weak_efficiency",
    "strong": "strong_efficiency",
    "train": "train_throughput",
    "memory": "peak_memory_bytes",
}
"""Short names of columns, for `--sort` and `--filter`; every column of the CSV works as well."""

LARGE = (
    "augmentation_headroom",
    "augmentation_throughput",
    "inference_throughput",
    "input_throughput",
    "model_flops_utilization",
    "output_agreement",
    "peak_flops",
    "published_top1",
    "speed_up",
    "strong_efficiency",
    "top1",
    "top5",
    "train_throughput",
    "validation_top1",
    "vs_fp32",
    "weak_efficiency",
)
"""Columns of which large values are the better ones, by their beginnings: there may be several, one
per batch size, backend or bound."""
SMALL = ("_std", "_failed", "_straggler_ratio")
"""Endings of those columns beside them of which small values are."""


def _column(table: Sequence[Row], name: str) -> str:
    key = name.strip().lower().replace("-", "_")
    key = ALIASES.get(key, key)
    known = dict.fromkeys([*(key for row in table for key in row), *ALIASES.values(), "top1"])
    if key not in known:
        short = {long: alias for alias, long in ALIASES.items()}
        names = [short.get(other, other) for other in known]
        close = difflib.get_close_matches(name, names) or list(ALIASES)
        remedy = f"choose a column of the CSV, such as {', '.join(close)}"
        raise UserError(f"column: {name!r}: {remedy}")
    return key


def sort_rows(table: Sequence[Row], name: str) -> list[Row]:
    """Sort by a column, the best first: large for accuracies and rates, small for all others.

    Numbers within names count as numbers (resnet18 before resnet101); rows without a value come
    last.

    Raises:
        UserError: no such column; names some that exist.
    """
    key = _column(table, name)

    def order(row: Row) -> tuple[object, ...]:
        value = row[key]
        if isinstance(value, str):
            parts = re.split(r"(\d+)", value)
            return (True, *(int(part) if part.isdigit() else part for part in parts))
        return (False, value)  # a column may hold both

    present = [row for row in table if row.get(key) is not None]
    missing = [row for row in table if row.get(key) is None]
    descending = key.startswith(LARGE) and not key.endswith(SMALL)
    return sorted(present, key=order, reverse=descending) + missing


def parse_filter(text: str) -> dict[str, list[str]]:
    """Read `model=resnet18,precision=bf16`; a column given twice accepts either value.

    Raises:
        UserError: a part that is not NAME=VALUE.
    """
    wanted: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals):
            raise UserError(f"filter: {part!r}: write COLUMN=VALUE[,COLUMN=VALUE...]")
        wanted.setdefault(name.strip(), []).append(value.strip())
    return wanted


def filter_rows(table: Sequence[Row], wanted: Mapping[str, Sequence[str]]) -> list[Row]:
    """The rows whose columns have the wanted values (see `parse_filter`).

    Raises:
        UserError: no such column, or no such row; names those that exist.
    """
    kept = list(table)
    for name, values in wanted.items():
        key = _column(table, name)
        there = sorted({str(row.get(key)) for row in kept})
        kept = [row for row in kept if str(row.get(key)) in values]
        if not kept:
            raise UserError(
                f"filter: '{name}={'|'.join(values)}': no row is left; there are {', '.join(there)}"
            )
    return kept
