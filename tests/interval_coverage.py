"""How often the interval of a median over processes holds the median of all of them.

    python tests/interval_coverage.py                      # starts 280 processes of one small cell
    python tests/interval_coverage.py --run runs/ID        # takes those of an earlier run

The processes are those of one cell of `bench run`, so a run that was interrupted, or of which some
failed, is finished with `bench run --resume`. What was measured again counts once, as it was found
last; disturbed processes count too, as they do in the tables whose interval this is. They are dealt
at random to the groups: what the machine's drift does to a group is then left to chance, as where
cells are repeated in a random order. Prints JSON: how many groups' 95 % intervals hold the grand
median, and the share over further deals.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import runs
from bench.stats import FEWEST, median_interval, reach

ROOT = Path(__file__).parents[1]
FURTHER_DEALS = 200
LEAST_COVERED, JUDGED_GROUPS = 0.85, 40
"""34 of 40 groups: a binomial count of a true 95 % is smaller in 0.3 % of the cases."""


def deal(values: Sequence[float], groups: int, seed: int) -> list[list[float]]:
    """Values in random groups of equal size; those left over belong to none."""
    shuffled = random.Random(seed).sample(values, len(values))
    size = len(values) // groups
    return [shuffled[size * number : size * (number + 1)] for number in range(groups)]


def covered(groups: Sequence[Sequence[float]], median: float) -> int:
    """How many groups' intervals hold the median."""
    intervals = [median_interval(group) for group in groups]
    return sum(low <= median <= high for low, high in intervals)


def report(values: Sequence[float], groups: int, seed: int) -> dict[str, Any]:
    """The numbers to print, of one value per process."""
    median = statistics.median(values)
    dealt = deal(values, groups, seed)
    further = [
        covered(deal(values, groups, seed + 1 + number), median) for number in range(FURTHER_DEALS)
    ]
    return {
        "processes": len(values),
        "groups": groups,
        "processes_per_group": len(dealt[0]),
        "grand_median_images_per_s": median,
        "median_reach": statistics.median(found for group in dealt if (found := reach(group))),
        "covered": covered(dealt, median),
        "covered_share_of_further_deals": sum(further) / (groups * FURTHER_DEALS),
    }


def exit_code(covered: int, groups: int) -> int:
    """1 if so many groups cover less than they are due; few groups are not judged."""
    return int(groups >= JUDGED_GROUPS and covered < LEAST_COVERED * groups)


def measure(args: argparse.Namespace) -> runs.Run:
    """A new run of one small cell in as many processes as are needed; some of them may have failed.

    Raises:
        SystemExit: it was stopped, or did not begin; `bench run` has said why.
    """
    options = {
        "--models": args.model,
        "--batch-size": args.batch_size,
        "--warmup-steps": args.warmup_steps,
        "--timed-steps": args.timed_steps,
        "--inference-batch-sizes": 1,
        "--repeats": args.groups * args.processes,
        "--runs-dir": args.runs_dir,
    }
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "bench", "run", *words]
    folder = Path(args.runs_dir).absolute()
    before = set(runs.run_names(folder))
    code = subprocess.call(command, stdout=sys.stderr)
    made = sorted(set(runs.run_names(folder)) - before)
    if code not in (0, 1) or not made:
        raise SystemExit(code)
    return runs.find(made[-1], folder)


def throughputs(run: runs.Run) -> list[float]:
    """Training throughput of every finished process, in samples/s, in the order of the repeats."""
    records = runs.latest(run.records()).values()
    found = [record.value("train_throughput") for record in records if record.status == "ok"]
    return [value for value in found if value is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="id or folder of a run of one cell; else a new one is made")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--groups", type=int, default=40)
    parser.add_argument("--processes", type=int, default=7, help="per group")
    parser.add_argument("--seed", type=int, default=0, help="of the deal")
    parser.add_argument("--model", default="resnet20-w4")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--timed-steps", type=int, default=30)
    args = parser.parse_args()
    if args.processes < FEWEST:
        parser.error(f"--processes: {args.processes}: give {FEWEST} or more")
    folder = Path(args.runs_dir).absolute()
    run = runs.find(args.run, folder) if args.run else measure(args)
    cells = {task.key[:2] for task in run.plan.tasks}
    values, wanted = throughputs(run), args.groups * args.processes
    if len(cells) > 1 or len(values) < wanted:
        parser.exit(
            2,
            f"run: {run.id!r}: has {len(values)} finished processes of {len(cells)} cell(s), needs "
            f"{wanted} of 1; finish it with bench run --resume {run.folder}, then give --run\n",
        )
    found = report(values, args.groups, args.seed)
    print(json.dumps({"run": run.id} | found))
    return exit_code(found["covered"], args.groups)


if __name__ == "__main__":
    sys.exit(main())
