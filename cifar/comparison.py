"""One run as a row of the table that compares runs: the suite's headings and units. No torch here.

`bench` shows its own rows under these headings, so that both say the same with the same word.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

HEADINGS = {
    "model": "Model",
    "batch_size": "Batch",
    "top1": "Top-1 (%)",
    "checkpoint_bytes": "Size (MiB)",
    "param_count": "Params (M)",
    "train_throughput": "Train (images/s)",
    "training_seconds": "Training (s)",
    "peak_memory_bytes": "Peak memory (MiB)",
}
"""Of columns, by the name that their values have in a CSV."""


def inference_heading(batch_size: int) -> str:
    """Of the latency at a batch size."""
    return f"Inference b{batch_size} (ms/sample)"


def places(value: float) -> int:
    """Behind the point, for three significant digits and all those before the point."""
    return next((places for places, least in ((0, 100), (1, 10), (2, 1)) if value >= least), 3)


def rounded(value: float) -> str:
    """A number with `places` behind its point."""
    return f"{value:,.{places(value)}f}"


def mebibytes(value: float, behind: int = 0) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.{behind}f}"


def millions(value: float) -> str:
    """A count in millions."""
    return f"{value / 1e6:,.2f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What a run has reached and what it costs, in base units.

    `top1` is a fraction, `inference_latency` seconds per sample by batch size, `train_throughput`
    samples/s of an epoch in the middle, `training_seconds` those of all epochs without their
    evaluations, `peak_memory_bytes` of the first process or its device.
    """

    model: str
    precision: str
    batch_size: int
    num_processes: int
    top1: float
    checkpoint_bytes: int
    param_count: int
    inference_latency: Mapping[int, float]
    train_throughput: float
    training_seconds: float
    peak_memory_bytes: int

    def to_csv(self) -> str:
        """A line of base units under the names that `bench table --format csv` has for them."""
        row = {
            "model": self.model,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "num_processes": self.num_processes,
            "top1": self.top1,
            "checkpoint_bytes": self.checkpoint_bytes,
            "param_count": self.param_count,
            **{f"inference_latency_b{size}": s for size, s in self.inference_latency.items()},
            "train_throughput": self.train_throughput,
            "training_seconds": self.training_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table of one line for people."""
        cells = {
            HEADINGS["batch_size"]: str(self.batch_size),
            HEADINGS["top1"]: f"{100 * self.top1:.2f}",
            HEADINGS["checkpoint_bytes"]: mebibytes(self.checkpoint_bytes, 2),
            HEADINGS["param_count"]: millions(self.param_count),
            **{
                inference_heading(size): rounded(1000 * seconds)
                for size, seconds in self.inference_latency.items()
            },
            HEADINGS["train_throughput"]: rounded(self.train_throughput),
            HEADINGS["training_seconds"]: rounded(self.training_seconds),
            HEADINGS["peak_memory_bytes"]: mebibytes(self.peak_memory_bytes),
        }
        lines = (
            [HEADINGS["model"], *cells],
            [":---", *["---:"] * len(cells)],
            [self.model, *cells.values()],
        )
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        count = f"{self.num_processes} process{'es' * (self.num_processes > 1)}"
        return f"### {self.precision}, {count}\n\n{table}\n"
