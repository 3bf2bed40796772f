"""The picture of how training scales: images/s and efficiency over processes, and by exchange."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.row_facts import Row
from cifar.figures import as_png, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "scaling.png"
"""The file in a run's folder and beside saved results."""
_COLOURS = ("#4477aa", "#cc6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#8a8a8a")
_MARKERS = "osD^v<>"
_IDEAL = "#8a8a8a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Images/s and efficiency (a fraction) by number of processes, rising."""

    label: str
    batch: int
    """Of a device, or of all together."""
    points: tuple[tuple[int, float, float], ...]


def scaling_lines(table: Sequence[Row], *, weak: bool) -> list[Line]:
    """One line per launcher, and per model, precision and batch where there are several.

    The batch is that of a device (weak) or the global one (strong). Every line begins with the one
    process that its others are compared with; those that have no others are left out.
    """
    efficiency = "weak_efficiency" if weak else "strong_efficiency"
    found: dict[tuple[str, ...], dict[int, tuple[float, float]]] = {}
    first: dict[tuple[str, ...], tuple[float, float]] = {}
    for row in table:
        rate, value = row.get("train_throughput"), row.get(efficiency)
        if row.get("exchange") or not isinstance(rate, float) or not isinstance(value, float):
            continue
        count, batch = int(row["num_processes"] or 1), int(row["batch_size"] or 1)
        size = batch // count if weak else batch
        sweep = (str(row["model"]), str(row["precision"]), str(size))
        if count == 1:
            first[sweep] = rate, value
        else:
            found.setdefault((*sweep, str(row["launcher"])), {})[count] = rate, value
    lines = [
        (key[:-1], key[-1], {1: first[key[:-1]], **dict(sorted(points.items()))})
        for key, points in found.items()
    ]
    several = len({sweep for sweep, _, _ in lines}) > 1
    return [
        Line(
            label=launcher + (f" {' '.join(sweep[:2])} b{sweep[2]}" if several else ""),
            batch=int(sweep[2]),
            points=tuple((count, *values) for count, values in points.items()),
        )
        for sweep, launcher, points in lines
    ]


def exchange_bars(table: Sequence[Row]) -> list[tuple[str, float]]:
    """Images/s by exchange under DDP, and of DDP's own way in the same processes and batch."""
    keys = ("model", "precision", "num_processes", "batch_size")
    compared = {tuple(row.get(key) for key in keys) for row in table if row.get("exchange")}
    return [
        (str(row.get("exchange") or "ddp"), rate)
        for row in table
        if row["launcher"] == "ddp" and tuple(row.get(key) for key in keys) in compared
        if isinstance(rate := row.get("train_throughput"), float)
    ]


def scaling_plot(table: Sequence[Row]) -> bytes:
    """A PNG of rows of `bench.efficiency.scaling_rows`: weak above strong scaling, then exchanges.

    Images/s on the left, with a dotted line at what no loss would give; efficiency on the right.
    """
    bars = exchange_bars(table)
    figure = new_figure(10, 7.5 + (0.6 + 0.28 * len(bars) if bars else 0))
    ratios = (3, 3, 0.6 + 0.28 * len(bars)) if bars else (3, 3)
    grid = figure.add_gridspec(len(ratios), 2, height_ratios=ratios)
    for number, weak in enumerate((True, False)):
        lines = scaling_lines(table, weak=weak)
        kind = "weak scaling: {} images per process" if weak else "strong scaling: {} images in all"
        left, right = (figure.add_subplot(grid[number, column]) for column in (0, 1))
        _draw_rates(left, lines, kind)
        _draw_efficiency(right, lines)
    if bars:
        _draw_bars(figure.add_subplot(grid[2, :]), bars)
    hardware = ", ".join(dict.fromkeys(str(row["hardware"]) for row in table))
    models = ", ".join(dict.fromkeys(f"{row['model']} {row['precision']}" for row in table))
    compared = ", ".join(dict.fromkeys(str(row["compared_with"]) for row in table
                                       if row.get("compared_with")))  # fmt: skip
    figure.suptitle(f"{models} on {hardware}\n{compared}", parse_math=False)
    return as_png(figure)


def _draw_rates(axes: "Axes", lines: Sequence[Line], kind: str) -> None:
    """On two linear axes from zero, where what no loss would give is a straight line."""
    _draw(axes, lines, 1, 1.0)
    axes.set_xscale("linear")
    counts = sorted({count for line in lines for count, *_ in line.points})
    axes.set_xticks(counts, [str(count) for count in counts])
    ideal: dict[int, dict[int, float]] = {}
    for line in lines:
        for count, rate, efficiency in line.points:
            ideal.setdefault(line.batch, {})[count] = rate / efficiency
    for number, rates in enumerate(ideal.values()):
        label = None if number else "no loss"
        among = sorted(rates)
        axes.plot(among, [rates[count] for count in among], color=_IDEAL, linestyle=":",
                  label=label)  # fmt: skip
    axes.set_ylabel("images/s")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    batches = dict.fromkeys(str(line.batch) for line in lines)
    axes.set_title(kind.format(" or ".join(batches) or "no"), fontsize=10)
    if lines:
        axes.legend(fontsize=8, loc="lower right")


def _draw_efficiency(axes: "Axes", lines: Sequence[Line]) -> None:
    _draw(axes, lines, 2, 100.0)
    axes.axhline(100, color=_IDEAL, linestyle=":")
    axes.set_ylabel("efficiency (%)")
    axes.set_ylim(0, max(105, 1.05 * axes.get_ylim()[1]))


def _draw(axes: "Axes", lines: Sequence[Line], column: int, scale: float) -> None:
    """One column of the lines' points over their processes."""
    for number, line in enumerate(lines):
        axes.plot(
            [point[0] for point in line.points],
            [scale * point[column] for point in line.points],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            label=line.label,
        )
    counts = sorted({count for line in lines for count, *_ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("processes")
    axes.grid(alpha=0.3)


def _draw_bars(axes: "Axes", bars: Sequence[tuple[str, float]]) -> None:
    drawn = axes.barh(range(len(bars)), [rate for _, rate in bars], color=_COLOURS[0])
    axes.bar_label(drawn, fmt="%.4g", padding=2, fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(rate for _, rate in bars))
    axes.set_xlabel("images/s by exchange, the same processes and batch")
