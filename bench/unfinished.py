"""Records of cells that broke down after their training had been measured: kept, and explained.

A worker writes what it knows before every metric that follows. If that metric ends its processes,
in whatever way and on whatever rank, that record stays, and the launcher adds the reason. No torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from bench.record import Measurement, Record

PENDING = "the processes ended before it was measured"


def unfinished(record: Record, names: Sequence[str]) -> Record:
    """A record of what is known while the metrics of these names are still to be taken."""
    pending = tuple(
        Measurement(name=name, unit="1", better="none", status="failed", reason=PENDING)
        for name in names
    )
    return replace(
        record,
        reason=_joined(record.reason, f"not measured: {', '.join(names)}"),
        measurements=(*record.measurements, *pending),
    )


def explained(record: Record, why: str) -> Record:
    """An unfinished record with the reason for which its processes ended."""
    measurements = tuple(
        replace(each, reason=why) if each.reason == PENDING else each
        for each in record.measurements
    )
    return replace(record, reason=_joined(record.reason, why), measurements=measurements)


def is_unfinished(record: Record) -> bool:
    """Whether a worker wrote it on its way and never came to write a finished one."""
    return any(each.reason == PENDING for each in record.measurements)


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))
