"""The memory frontier as a table: the largest batch that fits, told from the records of its probes.

See `bench.frontier_search` for which batches are probed. As the records alone tell, a search can be
taken up again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from bench.frontier_search import LEAST_GRANULE
from bench.record import Record
from bench.row_facts import Row, data_set_text
from bench.rows import rows

SUITE = "frontier"
"""The suite's name in runs and records."""

SHARED = (
    "hardware", "precision", "model", "layout", "compile", "num_processes", "launcher",
    "accumulation_steps", "data", "recipe", "protocol",
    "machine", "worker", "software", "source", "data_set",
)  # fmt: skip
"""The columns in which the probes of one search agree."""


def frontier(records: Iterable[Record]) -> list[Row]:
    """One row per search, told from the records of its probes, in order of arrival.

    It is the row of the largest batch that fits (see `bench.rows.rows`), with `largest_batch` and
    `smallest_oom` (None: no such batch was probed), `memory_limit` in bytes (None: the whole
    device) and `probes`. `status` is `ok`; `oom` if nothing fits; that of the probe that ended the
    search early; or `not monotone` if a batch fits above one that does not. The `reason` of an ok
    row tells where all training images fit, so that memory was not the limit.
    """
    known = list(records)
    limits = {record.protocol.digest: record.protocol.memory_limit for record in known}
    images = {data_set_text(each.data): each.data.train_samples for each in known if each.data}
    searches: dict[tuple[object, ...], list[Row]] = {}
    for row in rows(known):
        searches.setdefault(tuple(row[key] for key in SHARED), []).append(row)
    return [_frontier(search, limits, images) for search in searches.values()]


def _frontier(
    search: Sequence[Row], limits: Mapping[str, int | None], images: Mapping[str, int]
) -> Row:
    fitting = {_batch(row): row for row in search if row["status"] == "ok"}
    oom = {_batch(row): row for row in search if row["status"] == "oom"}
    largest = max(fitting, default=None)
    above = [batch for batch in oom if largest is None or batch > largest]
    status, reason = _status(search, fitting, oom)
    nearest = fitting[largest] if largest else min(search, key=_batch)
    if status == "ok" and largest and not above:
        reason = _all_images(nearest, largest, images)
    return {
        **nearest,
        "largest_batch": largest,
        "smallest_oom": min(above, default=None),
        "memory_limit": limits[str(nearest["protocol"])],
        "probes": len(search),
        "status": status,
        "reason": reason,
    }


def _status(
    search: Sequence[Row], fitting: Mapping[int, Row], oom: Mapping[int, Row]
) -> tuple[str, str]:
    """A search's status and reason."""
    for row in search:
        if row["status"] not in ("ok", "oom"):
            return str(row["status"]), f"batch {row['batch_size']}: {row['reason']}"
    if not fitting:
        smallest = min(oom)
        return "oom", f"batch {smallest}: {oom[smallest]['reason']}"
    crossed = [batch for batch in oom if batch < max(fitting)]
    if crossed:
        return "not monotone", f"batch {max(fitting)} fits and batch {min(crossed)} does not"
    return "ok", ""


def _all_images(row: Row, batch: int, images: Mapping[str, int]) -> str:
    """Whether no larger batch could be made of the training images; empty if one could."""
    count = images.get(str(row["data_set"]), 0)
    parts = int(row["num_processes"] or 1) * int(row["accumulation_steps"] or 1)
    if not 0 <= count - batch < math.lcm(LEAST_GRANULE, parts):
        return ""
    return f"all {count:,} training images fit: memory was not the limit"


def _batch(row: Row) -> int:
    return int(row["batch_size"] or 0)
