"""Pictures of a training run, each a PNG as bytes. Matplotlib is imported where one is drawn."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cifar.predictions import CalibrationBin, Predictions, calibration_error
from cifar.range_test import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
MOST_NUMBERED = 20
"""Classes of a confusion matrix whose cells have room for their counts."""
MOST_NAMED = 60
"""Classes whose names have room at the edge of a confusion matrix."""
GRID_COLUMNS, MISTAKE_ROWS, HIT_ROWS = 8, 4, 1
_RIGHT, _WRONG, _QUIET = "#1a7f37", "#c62828", "#8a8a8a"
_TRAIN, _TEST, _VALIDATION = "#4477aa", "#cc6677", "#228833"


def curves(metrics: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Loss and top-1 per epoch: of training, of the test split and, where there is one, validation.

    `metrics` are the lines of `metrics.jsonl`. The loss of training is what was minimised, so it
    holds label smoothing and mixing; its top-1 is that of augmented images, while training.
    """
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in metrics]
    for axes, name, scale, unit in (
        (left, "loss", 1, "loss (nats)"),
        (right, "top1", 100, "top-1 (%)"),
    ):
        for split, colour in (("train", _TRAIN), ("val", _VALIDATION), ("test", _TEST)):
            if f"{split}_{name}" in metrics[0]:
                values = [scale * line[f"{split}_{name}"] for line in metrics]
                told = {"train_loss": "train, as minimised", "train_top1": "train, augmented"}
                label = told.get(f"{split}_{name}", split)
                axes.plot(epochs, values, color=colour, label=label, marker=".", markersize=4)
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, parse_math=False)
    return as_png(figure)


def range_test(curve: Curve, suggested: float | None, title: str) -> bytes:
    """The loss by learning rate, as it was and smoothed, and a line at the one that is suggested.

    What lies further above the beginning than that above the lowest loss is cut off.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    axes.plot(curve.lrs, curve.losses, color=_QUIET, linewidth=0.8, label="loss")
    axes.plot(curve.lrs, curve.smoothed, color=_TRAIN, label="smoothed")
    axes.axhline(curve.guess, color=_QUIET, linestyle=":", label="guessing")
    if suggested is not None:
        axes.axvline(suggested, color=_RIGHT, linestyle="--", label=f"suggested: {suggested:g}")
    bottom = min([*curve.smoothed, curve.guess])
    top = max([*curve.smoothed[:1], curve.guess])
    room = max(0.1, top - bottom)
    axes.set_ylim(bottom - room / 2, top + room)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, parse_math=False)
    return as_png(figure)


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str], title: str) -> bytes:
    """`matrix[i, j]`: samples of class i predicted as j, coloured by their share of class i."""
    count = len(classes)
    side = min(24.0, 4.0 + 0.35 * count)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    totals = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if count <= MOST_NAMED:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
    if count <= MOST_NUMBERED:
        for (row, column), cell in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(cell), ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(title, parse_math=False)
    return as_png(figure)


def class_accuracy(accuracy: Sequence[float | None], classes: Sequence[str], title: str) -> bytes:
    """A bar per class that has samples, the worst on top, and a line at their mean."""
    pairs = zip(classes, accuracy, strict=True)
    known = sorted(((value, name) for name, value in pairs if value is not None), reverse=True)
    figure = new_figure(7, 1.2 + 0.24 * len(known))
    axes = figure.subplots()
    values = [100 * value for value, _ in known]
    bars = axes.barh(range(len(known)), values, color=_TRAIN)
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    names = [_short(name) for _, name in known]
    axes.set_yticks(range(len(known)), names, fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(known) - 0.4)
    axes.axvline(sum(values) / len(values), color=_QUIET, linestyle="--", linewidth=1)
    axes.set_xlim(0, 109)
    axes.set_xlabel("top-1 (%); dashed: mean over classes")
    axes.set_title(title, parse_math=False)
    return as_png(figure)


def calibration(bins: tuple[CalibrationBin, ...], title: str) -> bytes:
    """A reliability diagram over a histogram of the confidence."""
    figure = new_figure(5.5, 6.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middles = [(each.low + each.high) / 2 for each in bins]
    width = 0.94 / len(bins)
    above.bar(middles, [each.accuracy or 0 for each in bins], width, color=_TRAIN, label="accuracy")
    filled = [each for each in bins if each.samples]
    above.plot(
        [each.confidence for each in filled],
        [each.accuracy for each in filled],
        color=_WRONG,
        marker="o",
        markersize=4,
        linewidth=1,
        label="accuracy at the mean confidence",
    )
    above.plot([0, 1], [0, 1], color=_QUIET, linestyle="--", label="perfectly calibrated")
    above.set_ylabel("fraction that is right")
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    above.legend(loc="upper left", fontsize=8)
    above.set_title(f"{title}\nexpected calibration error {calibration_error(bins):.2%}",
                    parse_math=False)  # fmt: skip
    below.bar(middles, [each.samples for each in bins], width, color=_QUIET)
    below.set_xlabel("confidence")
    below.set_ylabel("samples")
    return as_png(figure)


def prediction_grid(
    images: npt.NDArray[np.uint8], predictions: Predictions, classes: Sequence[str], title: str
) -> bytes:
    """Four rows of the most confident mistakes, and one of the hits that were nearest to a miss.

    `images` are the split's, `[N, C, H, W]`. Without labels: five rows of the least confident
    predictions.
    """
    chosen = _chosen(predictions)
    rows = max(1, -(-len(chosen) // GRID_COLUMNS))
    figure = new_figure(1.55 * GRID_COLUMNS, 1.9 * rows + 0.6)
    grid = figure.subplots(rows, GRID_COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, sample in zip(grid.flat, chosen, strict=False):
        _show(axes, images[sample])
        text, colour = _caption(predictions, sample, classes)
        axes.set_title(text, color=colour, fontsize=8, parse_math=False)
    figure.suptitle(title, parse_math=False)
    return as_png(figure)


def _chosen(predictions: Predictions) -> list[int]:
    room = GRID_COLUMNS * (MISTAKE_ROWS + HIT_ROWS)
    if predictions.labels is None:
        order = np.argsort(predictions.confidence, kind="stable")
        return [int(sample) for sample in order[:room]]
    wrong = predictions.mistakes()[: GRID_COLUMNS * MISTAKE_ROWS]
    return [int(sample) for sample in (*wrong, *predictions.narrow_hits()[: room - len(wrong)])]


def _show(axes: "Axes", image: npt.NDArray[np.uint8]) -> None:
    """An image `[C, H, W]`: its first three channels as colours, or its first one as grey."""
    if len(image) >= 3:
        axes.imshow(image[:3].transpose(1, 2, 0))
    else:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=255)


def _caption(predictions: Predictions, sample: int, classes: Sequence[str]) -> tuple[str, str]:
    """`true: ...` above what was predicted, how surely, and the colour for right or wrong."""
    named = _short(classes[predictions.predicted[sample]])
    sure = f"{predictions.confidence[sample]:.0%}"
    if predictions.labels is None:
        return f"{named}\n{sure}", "black"
    truth = _short(classes[predictions.labels[sample]])
    right = bool(predictions.correct[sample])
    return f"true: {truth}\n{named} {sure}", _RIGHT if right else _WRONG


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def text_page(text: str) -> bytes:
    """Lines of text in a font of equal widths, as of a table."""
    lines = text.splitlines()
    width = max(map(len, lines), default=1)
    figure = new_figure(0.075 * width + 0.4, 0.155 * len(lines) + 0.3)
    figure.text(0, 1, text, family="monospace", fontsize=9, va="top", parse_math=False)
    return as_png(figure)


def new_figure(width: float, height: float) -> "Figure":
    """Of that size in inches, and no part of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: "Figure") -> bytes:
    """The picture as a file's contents."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # a class may be named in a script that the font has no glyphs for: boxes will have to do
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": ""})
    return file.getvalue()
