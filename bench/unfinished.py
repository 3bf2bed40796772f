"""Records of cells that broke down on their way: kept, and explained.

A worker writes what it knows, where it runs and which images it read, and after the training what
it has measured, before every metric that follows. If its processes end, in whatever way and on
whatever rank, that record stays, and the launcher adds the reason. No torch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from bench.record import Measurement, Record, Status

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


def explained(record: Record, status: Status, why: str) -> Record:
    """An unfinished record with the reason for which its processes ended.

    The `status` that gives it becomes the record's, unless the training had been measured.
    """
    if record.reason == PENDING:
        return replace(record, status=status, reason=why)
    measurements = tuple(
        replace(each, reason=why) if each.reason == PENDING else each
        for each in record.measurements
    )
    return replace(record, reason=_joined(record.reason, why), measurements=measurements)


def pruned(record: Record, why: str) -> Record:
    """An unfinished record of a trial that was ended because others are better.

    That is no failure and no accuracy: what it had reached after every epoch stays.
    """
    return replace(
        record,
        status="ok",
        reason=why,
        measurements=(*record.measurements, no_validation("pruned", why)),
    )


def no_validation(kind: Literal["pruned", "diverged"], why: str) -> Measurement:
    """In the place of what a trial has reached, if it never came to its end."""
    return Measurement(
        name="validation_top1",
        unit="fraction",
        better="higher",
        labels={"kind": kind},
        status="absent",
        reason=why,
    )


def is_unfinished(record: Record) -> bool:
    """Whether a worker wrote it on its way and never came to write a finished one."""
    return PENDING in (record.reason, *(each.reason for each in record.measurements))


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))
