"""Suites with some of their cells, or with other fields of these. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from bench.protocol import Protocol
from bench.spec import Cell, Plan, Suite, seeded
from bench.stats import FEWEST
from cifar.config import Parallel, TrainConfig, require

_FACETS: tuple[Callable[[Cell], str], ...] = (
    lambda cell: cell.train.model.label,
    lambda cell: cell.train.recipe.name,
    lambda cell: cell.precision,
)
"""What the cells of a suite are chosen by."""


def only(suite: Suite, names: Sequence[str]) -> Suite:
    """The suite with the cells alone that have these names of models, recipes or precisions.

    Names of one kind are alternatives; a cell must have one of each kind that is named.

    Raises:
        ConfigError: no cell has such a name, or none has all.
    """
    cells = [cell for plan in suite.plans for cell in plan.cells]
    known = [{facet(cell) for cell in cells} for facet in _FACETS]
    for name in names:
        told = ", ".join(sorted(set().union(*known)))
        require(any(name in each for each in known), "only", name, f"choose some of {told}")
    wanted = [each & set(names) or each for each in known]

    def chosen(plan: Plan) -> Plan:
        matching = tuple(
            cell
            for cell in plan.cells
            if all(facet(cell) in each for facet, each in zip(_FACETS, wanted, strict=True))
        )
        return replace(plan, cells=matching)

    found = replace(suite, plans=tuple(map(chosen, suite.plans)))
    remedy = f"no cell of {suite.name} has all of that; give fewer"
    require(any(plan.cells for plan in found.plans), "only", ",".join(names), remedy)
    return found


def override(
    suite: Suite,
    *,
    batch_size: int | None = None,
    seeds: int | None = None,
    launcher: Sequence[str] = (),
    num_processes: Sequence[int] = (),
    **changes: Any,
) -> Suite:
    """The suite with these fields of `TrainConfig`, `Cell` and `Protocol` changed everywhere.

    Every cell by each launcher, in each number of processes. A recipe brings its own batch size
    unless `batch_size` is given too; a mode of compiling is that of the cells that compile, and an
    exchange that of those of several processes. Repeats too few for an interval need not aim at
    one. Cells that become equal are measured once (`bench.spec.expand`).

    Raises:
        ConfigError: a value out of range, a batch that does not divide, a mode of compiling where
            no cell compiles, or an exchange where each is of one process.
        UnsupportedError: an exchange that a cell's launcher does not do.
    """
    train, protocol = (_of(cls, changes) for cls in (TrainConfig, Protocol))
    if unknown := changes.keys() - {*train, *protocol}:
        raise TypeError(f"no such field: {', '.join(unknown)}")

    if (repeats := protocol.get("repeats")) is not None and repeats <= FEWEST:
        protocol.setdefault("target_interval", None)  # so few have none

    def changed(cells: Sequence[Cell]) -> tuple[Cell, ...]:
        new = tuple(
            _changed(cell, train, batch_size, launched, count)
            for cell in cells
            for launched in launcher or (cell.launcher,)
            for count in num_processes or (cell.num_processes,)
        )
        return new if seeds is None else seeded(new, seeds)

    plans = tuple(
        Plan(protocol=replace(plan.protocol, **protocol), cells=changed(plan.cells))
        for plan in suite.plans
    )
    cells = [cell for plan in plans for cell in plan.cells]
    mode, parallel = train.get("compile_mode"), train.get("parallel", Parallel())
    compiles = any(cell.train.compile for cell in cells)
    require(mode is None or compiles, "compile-mode", mode, "needs --compile")
    if all(cell.num_processes == 1 for cell in cells):
        parallel.check_launch("ddp", 1)
    return replace(suite, plans=plans)


def _of(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those that are fields of a dataclass."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def _changed(
    cell: Cell, train: dict[str, Any], batch_size: int | None, launcher: str, num_processes: int
) -> Cell:
    recipe = train.get("recipe", cell.train.recipe)
    if batch_size is not None:
        recipe = replace(recipe, global_batch_size=batch_size)
    changes = {**train, "recipe": recipe}
    if not train.get("compile", cell.train.compile):
        changes.pop("compile_mode", None)
    if num_processes == 1:
        changes["parallel"] = Parallel()
    changed = replace(cell.train, **changes)
    return replace(cell, train=changed, launcher=launcher, num_processes=num_processes)
