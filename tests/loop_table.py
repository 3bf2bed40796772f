"""The table of what loop.py has printed: `python tests/loop_table.py FILE`, one JSON per line."""

import json
import sys
from pathlib import Path
from typing import Any

JUDGED = {
    "input": ("bench / loop that does not augment", ("plain_input/bench",)),
    "agree": ("bench / loop", ("same_input/bench", "loop/bench")),
    "timm": ("bench / timm", ("timm/bench",)),
    "cost": ("unmarked / bench", ("bench/unmarked",)),
}
"""Of what a mode compared, the ratio that it is about: as the table calls it, and as loop.py does,
whose ratios are of seconds. The throughput of the first is so many times that of the second."""
HEADER = (
    *("Model", "Precision", "Layout", "Batch", "Part", "Rounds", "Compared"),
    *("Ratio of throughputs [95 %]", "Control [95 %]"),
)


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table; one whose intervals reach further than 1 % is marked with ?."""
    compared, names = JUDGED[line["what"]]
    (name,) = (each for each in names if each in line)
    (control,) = (each for each in line if each.startswith("control/"))
    is_training = line["part"] == "train"
    doubt = "" if line["known_within_1_percent"] else " ?"
    return (
        line["model"],
        line["precision"],
        "NHWC" if line["channels_last"] else "NCHW",
        str(line["batch_size"] if is_training else line["part"].rpartition("b")[2]),
        _windows(line["steps"]) if is_training else "latency",
        str(line["rounds"]),
        compared,
        _interval(line[name]) + doubt,
        _interval(line[control]),
    )


def _windows(steps: int) -> str:
    return f"train, {steps} step{'s' * (steps > 1)}"


def _interval(found: tuple[float, float, float]) -> str:
    median, low, high = found
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def table(lines: list[dict[str, Any]]) -> str:
    """In Markdown, without the cells that were skipped."""
    rows = [HEADER, ("---",) * len(HEADER), *(cells(each) for each in lines if "part" in each)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))), end="")
