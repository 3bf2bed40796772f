"""A run's records to the results that are kept: `results/<hardware>/<suite>.{jsonl,md}`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.columns import frontier_columns, scaling_columns
from bench.efficiency import SUITE as SCALING
from bench.efficiency import in_order, scaling_rows
from bench.frontier import SUITE as FRONTIER
from bench.frontier import frontier
from bench.record import Record
from bench.record_file import read_records
from bench.rows import rows
from bench.runs import Run, latest
from bench.table import render_markdown
from cifar.errors import OutputError, UserError
from cifar.files import in_turn, write_atomic
from cifar.serialize import to_json


def save(run: Run, results_dir: Path, tell: Callable[[str], None] = print) -> list[Path]:
    """Add a run's records to the results and render their table; returns the files written.

    The latest records of a cell take the place of all that are stored of it and of the same images,
    whichever repeats those are: a run of fewer repeats would else be mixed with an older one. But
    where none of them is finished and one of those is, the stored ones stay, and `tell` is given a
    line that says so.

    Raises:
        UserError: the run has no record that says what it ran on, or a file cannot be read or
            written.
    """
    written = []
    for hardware, records in _by_hardware(run).items():
        path = results_dir / hardware / f"{run.plan.suite}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with in_turn(path.parent):  # another run's may be saved at the same time
                added = _merge(records, path, run.plan.suite)
        except OSError as error:
            raise UserError(
                f"results-dir: {str(results_dir)!r}: cannot be written ({error.strerror}); "
                "give another folder"
            ) from None
        written += [path, path.with_suffix(".md")]
        written += [plot] if (plot := write_plot(path.parent, read_records(path))) else []
        keys = {record.key for record in added}
        lines = (_staying(record) for record in records if record.key not in keys)
        for line in dict.fromkeys(lines):
            tell(line)
    return written


def _merge(records: Sequence[Record], path: Path, suite: str) -> list[Record]:
    """Put records into a file beside those of other cells; returns those that were put."""
    stored = read_records(path) if path.exists() else []
    added = _none_worse(records, stored)
    merged = [*_others(stored, added), *added]
    write_atomic(path, "".join(to_json(record) + "\n" for record in merged))
    write_atomic(path.with_suffix(".md"), f"# {suite}\n\n{table(suite, merged)}\n")
    return added


def _staying(record: Record) -> str:
    return (
        f"note: {record.cell.label}: {record.status} ({' '.join(record.reason.split())}); the "
        "results keep what they had of it"
    )


def _none_worse(records: Sequence[Record], stored: Sequence[Record]) -> list[Record]:
    """The records without those of a cell of which none is a result, though a stored one is."""
    told = {record.key[:2] for record in records if _is_result(record)}

    def is_worse(new: Record) -> bool:
        return new.key[:2] not in told and any(
            _is_result(old) and old.key[:2] == new.key[:2] and _may_share_images(old, new)
            for old in stored
        )

    return [record for record in records if not is_worse(record)]


def _is_result(record: Record) -> bool:
    """Whether trying again would change nothing; a search for memory's end wants to find it."""
    return record.finished or (record.suite == FRONTIER and record.status == "oom")


def _may_share_images(old: Record, new: Record) -> bool:
    """Whether two records of a cell are of the same images, as far as is known."""
    return not (old.data and new.data) or old.data.fingerprint == new.data.fingerprint


def _others(stored: Iterable[Record], records: Iterable[Record]) -> list[Record]:
    """The stored records that are of other cells than these records, or of other images.

    One that died before it read its images is of the same ones as any other of its cell.
    """
    anew: dict[tuple[str, str], set[str]] = {}
    for record in records:
        images = anew.setdefault(record.key[:2], set())
        if record.data:
            images.add(record.data.fingerprint)

    def is_replaced(old: Record) -> bool:
        if old.key[:2] not in anew:
            return False
        images = anew[old.key[:2]]
        return not images or old.data is None or old.data.fingerprint in images

    return [old for old in stored if not is_replaced(old)]


def table(suite: str, records: Iterable[Record]) -> str:
    """The Markdown of a suite's records."""
    if suite == FRONTIER:
        return render_markdown(frontier(records), frontier_columns).rstrip()
    if suite == SCALING:
        return render_markdown(in_order(scaling_rows(records)), scaling_columns).rstrip()
    return render_markdown(rows(records)).rstrip()


def write_plot(folder: Path, records: Sequence[Record]) -> Path | None:
    """Draw how the records of the suite `scaling` scale, in a file in `folder`; None of others.

    Raises:
        OutputError: it cannot be written.
    """
    swept = [record for record in records if record.suite == SCALING]
    if not swept:
        return None
    from bench.scaling_plot import PLOT, scaling_plot

    path = folder / PLOT
    try:
        write_atomic(path, scaling_plot(in_order(scaling_rows(swept))))
    except OSError as error:
        raise OutputError(
            f"plot: {path}: cannot be written ({error.strerror}); the records are safe, make room "
            "and draw it again with bench save"
        ) from None
    return path


def _by_hardware(run: Run) -> dict[str, list[Record]]:
    """The latest records; one that died before it said what it ran on goes with its run's."""
    records = list(latest(run.records()).values())
    known = [record.environment for record in records if record.environment]
    if not known:
        raise UserError(f"run: {run.id!r}: has no finished record to save; see bench table")
    groups: dict[str, list[Record]] = {}
    for record in records:
        hardware = (record.environment or known[0]).hardware
        groups.setdefault(hardware, []).append(record)
    return groups


def uncommitted(records: Iterable[Record]) -> str:
    """A note if records cannot be traced to a commit, else an empty text."""
    environments = [record.environment for record in records if record.environment]
    if any(environment.git_sha is None for environment in environments):
        return "note: these records name no git commit"
    if any(environment.git_dirty for environment in environments):
        return "note: these records were taken with uncommitted changes"
    return ""
