"""`bench selfcheck`: whether costs of known size and a wrong number format are seen.

Fresh processes of one small cell take turns in random order: two plain ones, one with a sleep in
every step, one with matrix products in every step. Each cost is also measured by itself in its own
process; what it adds to a step's median seconds must agree with that. A process that computes in
another number format than asked must come out as `failed`.

Rounds end once every interval is narrow enough to decide, whichever way: were a cost measured again
until it agrees, chance would make it agree in the end.
"""

import io
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench import execution, runs
from bench.estimate import estimate_seconds
from bench.job import Fault, Job
from bench.launchers import launch
from bench.progress import SuiteProgress, outcome
from bench.protocol import Protocol
from bench.record import Record
from bench.spec import Plan, Suite, Task, grid
from bench.stats import headline, median_interval
from cifar.errors import UserError

SUITE = "selfcheck"
FAULTS: dict[str, Fault | None] = {
    "plain": None,
    "control": None,
    "sleep": Fault(kind="sleep", seconds=0.05),
    "matmul": Fault(kind="matmul", seconds=0.05),
}
"""The processes of a round by name. A twentieth of a second is twice a step of the cell on two slow
CPU cores; a GPU's step is shorter still, so the cost stands well above the noise."""
WRONG_DTYPE = Fault(kind="wrong-dtype")
MODEL, BATCH_SIZE = "resnet20-w8", 16
MIN_ROUNDS = 6
"""The fewest that give a 95 % interval of a median."""
MAX_ROUNDS = 12
TOLERANCE = 0.10
"""Of the true cost: how far from it the interval of the measured one may reach, or, where it holds
the true one, how wide half of it may be."""

Verdict = Literal["seen", "not seen", "too noisy", "failed"]
Launch = Callable[[Job, Path], Record]
Round = Mapping[str, Record]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What became of one fault; seconds per step, None where it has none.

    `added`, `low` and `high` are the median and the 95 % interval over rounds of the faulty
    process's median step less the plain one's; `true` is the cost as measured by itself, the median
    over rounds, from which each round's own is set off.
    """

    name: str
    verdict: Verdict
    true: float | None = None
    added: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The cost as seen over its true size."""
        return self.added / self.true if self.added is not None and self.true else None


def suite(max_rounds: int = MAX_ROUNDS) -> Suite:
    """The cell, once for every process that adds a cost or none, and once for the wrong format."""
    cells = grid([MODEL], ["fp32"], batch_sizes=(BATCH_SIZE,))
    costs = Protocol(
        warmup_steps=3,
        max_warmup_steps=12,
        timed_steps=20,
        repeats=len(FAULTS) * max_rounds,
        inference_batch_sizes=(),
        timeout=300.0,
    )
    brief = replace(costs, warmup_steps=0, timed_steps=2, repeats=1)  # bf16 may be emulated
    return Suite(
        name=SUITE,
        description="known costs and a wrong number format, to check the measurement itself",
        plans=(Plan(protocol=costs, cells=cells), Plan(protocol=brief, cells=cells)),
    )


def refuse(run: runs.Run) -> None:
    """Raise a UserError for a self-check: faults were put into the processes of its one cell."""
    _refuse(run.id, {run.plan.suite})


def refuse_records(records: Iterable[Record], source: str) -> None:
    """The same of records from a file, `source`."""
    _refuse(source, {record.suite for record in records})


def _refuse(name: str, suites: Set[str]) -> None:
    if SUITE in suites:
        raise UserError(
            f"run: {name!r}: a self-check is neither resumed, tabulated nor saved; "
            "start bench selfcheck anew"
        )


def execute(run: runs.Run, *, launch: Launch = launch) -> list[Finding]:
    """Measure in rounds until every cost is decided, or the run's tasks are used up.

    Raises:
        UserError: another process runs this run, or its folder cannot be written.
    """
    with execution.taken_up(run):
        return _Execution(run, launch).all()


class _Execution:
    """The loop over rounds."""

    def __init__(self, run: runs.Run, launch: Launch) -> None:
        self._run = run
        self._launch = launch
        self._records: list[Record] = []
        self._progress = SuiteProgress(len(run.plan.tasks), sys.stderr)
        brief = min(task.protocol.timed_steps for task in run.plan.tasks)
        numbered = list(enumerate(run.plan.tasks, 1))
        self._brief = [each for each in numbered if each[1].protocol.timed_steps == brief]
        self._costs = [each for each in numbered if each not in self._brief]

    def all(self) -> list[Finding]:
        rounds: list[Round] = []
        with self._progress:
            wrong = self._one(*self._brief[0], WRONG_DTYPE)
            while self._costs and not settled(rounds):
                rounds.append(self._round(len(rounds)))
        return [*judge_costs(rounds), judge_wrong_dtype(wrong)]

    def _round(self, number: int) -> Round:
        names = list(FAULTS)
        random.Random(number).shuffle(names)
        return {name: self._one(*self._costs.pop(0), FAULTS[name]) for name in names}

    def _one(self, number: int, task: Task, fault: Fault | None) -> Record:
        label = f"{task.cell.label} {fault.label if fault else 'plain'}"
        left = estimate_seconds(task.cell, task.protocol, history=self._records)
        self._progress.start(number, label, left * (len(self._costs) + 1))
        record = execution.measure(self._run, number, task, self._launch, fault)
        self._records.append(record)
        self._progress.finish(outcome(record), 0.0)
        return record


def step_seconds(record: Record) -> float:
    """The median of a finished record's steps; of several ranks, the largest of their medians."""
    measured = record.find("train_throughput")
    assert measured is not None
    return headline(measured.samples, "lower")


def true_seconds(record: Record) -> float:
    """The median of a cost's seconds measured by itself in the record's own process."""
    measured = [each for each in record.measurements if each.name == "fault_seconds"]
    return statistics.median(value for each in measured for rank in each.samples for value in rank)


def judge_costs(rounds: Sequence[Round]) -> list[Finding]:
    """What every kind of process adds to the plain ones of the same round; the control adds 0.

    A cost differs from process to process, and with the speed of a shared machine: what a process
    seems to add is compared with what the cost took by itself in that same process.
    """
    broken = [record for each in rounds for record in each.values() if record.status != "ok"]
    if broken:
        note = f"{broken[0].status}: {broken[0].reason}"
        return [Finding(name=name, verdict="failed", note=note) for name in _measured_names()]
    costs = {
        name: [true_seconds(each[name]) if fault else 0.0 for each in rounds]
        for name, fault in FAULTS.items()
    }
    slack = TOLERANCE * min(statistics.median(costs[name]) for name in FAULTS if FAULTS[name])
    findings = []
    for name in _measured_names():
        true = statistics.median(costs[name])
        differences = [
            step_seconds(each[name]) - step_seconds(each["plain"]) - own + true
            for each, own in zip(rounds, costs[name], strict=True)
        ]
        findings.append(judge(name, differences, true, slack=TOLERANCE * true or slack))
    return findings


def _measured_names() -> list[str]:
    return [name for name in FAULTS if name != "plain"]


def judge(name: str, differences: Sequence[float], true: float, *, slack: float) -> Finding:
    """One cost's verdict, from its differences to the plain processes, one per round.

    It is seen at its true size if the 95 % interval of the median difference lies within `slack`
    seconds of the true cost, or holds it and is no wider than that to either side of its middle. It
    is not seen if the interval lies wholly beyond the slack, or is as narrow and meets neither. A
    wider interval tells nothing yet.
    """
    try:
        low, high = median_interval(differences)
    except ValueError as error:
        return Finding(name=name, verdict="too noisy", true=true, note=str(error))
    added = statistics.median(differences)
    least, most = true - slack, true + slack
    narrow = (high - low) / 2 <= slack
    verdict: Verdict = "too noisy"
    if (least <= low and high <= most) or (narrow and low <= true <= high):
        verdict = "seen"
    elif narrow or high < least or most < low:
        verdict = "not seen"
    return Finding(name=name, verdict=verdict, true=true, added=added, low=low, high=high)


def settled(rounds: Sequence[Round]) -> bool:
    """Whether no cost is left to decide, seen or not, or a process failed."""
    if not rounds:
        return False
    return all(each.verdict != "too noisy" for each in judge_costs(rounds))


def judge_wrong_dtype(record: Record) -> Finding:
    """A process that ran in bf16 where fp32 was asked must be `failed`, for that reason."""
    told = record.status == "failed" and "bfloat16" in record.reason
    return Finding(
        name="wrong-dtype",
        verdict="seen" if told else "not seen",
        note=f"{record.status}: {record.reason or 'no reason'}",
    )


def render(findings: Sequence[Finding], *, color: bool) -> str:
    """The findings as a table in milliseconds per step; plain unless `color`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Added to every step", "True (ms)", "Measured (ms)", "95 % interval", "Ratio"):
        table.add_column(heading, justify="left" if heading.startswith("Added") else "right")
    table.add_column("Verdict")
    for each in findings:
        interval = f"{_ms(each.low)} to {_ms(each.high)}" if each.low is not None else ""
        ratio = f"{each.ratio:.3f}" if each.ratio is not None else ""
        table.add_row(each.name, _ms(each.true), _ms(each.added), interval, ratio, each.verdict)
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=color, highlight=False, markup=False)
    console.print(table)
    for each in findings:
        if each.note:
            console.print(Text(f"{each.name}: {each.note}"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.2f}"
