"""The named suites: one function each, whose docstring gives purpose and cost."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from bench.protocol import BACKENDS, Protocol
from bench.scaling import exchange, scaling
from bench.spec import Cell, Plan, Suite, grid, seeded
from bench.stats import FEWEST
from cifar.config import Parallel, TrainConfig, require
from cifar.data.config import DataConfig
from cifar.errors import ConfigError
from cifar.recipes import get_config, get_recipe

P99_BATCHES = 100
"""As many as a 99th percentile needs (`bench.stats.resolves`); large batches on a CPU take too long
for so many."""


PROCESSES = 8
"""At most for a cell of a suite of speeds: identical processes differ by several per cent."""
NARROW = 0.01
"""How far the 95 % interval of such a cell's throughput is to reach, as a fraction."""


def _repeated(protocol: Protocol) -> Protocol:
    """In several processes, until the throughput is known."""
    return replace(protocol, repeats=PROCESSES, target_interval=NARROW)


def quick() -> Suite:
    """Two small models trained for 12,800 samples and resnet18 for speed, in fp32 and bf16.

    For a first look at a machine, on the embedded images. Cost: at most 5 minutes on two CPU cores
    (3 to 5 where resnet18 trains at 22 to 34 and resnet20 at 190 to 340 images/s and bf16 has no
    kernels).
    """
    trained = Protocol(
        train_samples=12_800,
        warmup_steps=2,
        timed_steps=8,
        inference_batch_sizes=(1, 64),
        inference_iterations=P99_BATCHES,
        inference_seconds=15.0,
        allow_emulated=False,
    )
    speed = replace(trained, train_samples=0)
    return Suite(
        name="quick",
        description="resnet20 and a narrow resnet18 trained briefly, resnet18 for speed: 5 minutes",
        plans=(
            Plan(protocol=trained, cells=grid(["resnet20", "resnet18-w16"], ["fp32", "bf16"])),
            # A batch of 64 takes seconds per step on a slow CPU.
            Plan(protocol=speed, cells=grid(["resnet18"], ["fp32", "bf16"], batch_sizes=(16,))),
        ),
    )


def depths() -> Suite:
    """The cost of depth: ResNet-18 to ResNet-152 in fp32, speed only.

    Up to `PROCESSES` processes per cell, fewer where the interval is narrow sooner. Cost: half an
    hour on a GPU; on two CPU cores half an hour to an hour for one process each (`--repeats 1`).
    """
    models = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
    return Suite(
        name="depths",
        description="resnet18, 34, 50, 101 and 152 in fp32, speed only",
        plans=(
            Plan(
                protocol=_repeated(Protocol(inference_iterations=P99_BATCHES)),
                cells=grid(models, ["fp32"], batch_sizes=(128,)),
            ),
        ),
    )


def precisions() -> Suite:
    """Number format x memory layout x torch.compile, for ResNet-18 and ResNet-50, speed only.

    Up to `PROCESSES` processes per cell, fewer where the interval is narrow sooner. Cost: 32 cells;
    half an hour for one process each on a GPU (`--repeats 1`), hours on two CPU cores, where fp16
    and tf32 are unsupported, and bf16 where there are no instructions for it.
    """
    protocol = _repeated(Protocol(inference_iterations=P99_BATCHES, allow_emulated=False))
    cells = grid(
        ["resnet18", "resnet50"],
        ["fp32", "tf32", "bf16", "fp16"],
        channels_last=(False, True),
        compile=(False, True),
        batch_sizes=(128,),
    )
    return Suite(
        name="precisions",
        description="resnet18 and resnet50 x precision x channels-last x compile, speed only",
        plans=(Plan(protocol=protocol, cells=cells),),
    )


def accuracy() -> Suite:
    """What the default recipe reaches: ResNet-20 on CIFAR-10 in fp32 and bf16, full budget.

    The aim is a top-1 of 0.85 on the 10,000 test images; see the recipe for what was found. A CPU
    without bf16 kernels emulates them, for the accuracy is the same. Cost: 33 minutes per cell
    on two CPU cores, at 270 images/s.
    """
    recipe = get_recipe("default")
    steps = recipe.epochs * (50_000 // recipe.global_batch_size)
    protocol = Protocol(
        train_samples=steps * recipe.global_batch_size,
        inference_iterations=P99_BATCHES,
        inference_seconds=60.0,
        timeout=4 * 3600.0,
    )
    cells = grid(["resnet20"], ["fp32", "bf16"], recipe=recipe, data=DataConfig(source="cifar10"))
    return Suite(
        name="accuracy",
        description="resnet20 on CIFAR-10 in fp32 and bf16, the default recipe's full budget",
        plans=(Plan(protocol=protocol, cells=cells),),
    )


def latency() -> Suite:
    """Inference at batch 1, 2, 4, ..., 1024: eager, compiled, exported and in ONNX Runtime.

    ResNet-20 and ResNet-18 in fp32 and bf16, speed only; each batch size of each backend is built
    anew and timed for 2 seconds, or three batches if that takes longer, and half a second in a row.
    Cost: not measured; most of it is compiling, which is assumed to take 30 seconds for each of 33
    builds in a cell. By arithmetic 45 minutes on two slow CPU cores without bf16 kernels, twice as
    many with them.
    """
    protocol = Protocol(
        warmup_steps=2,
        timed_steps=8,
        inference_batch_sizes=tuple(2**power for power in range(11)),
        inference_iterations=200,
        inference_seconds=2.0,
        inference_backends=BACKENDS,
        metrics=("cold",),
        allow_emulated=False,
        timeout=2 * 3600.0,
    )
    return Suite(
        name="latency",
        description="resnet20 and resnet18, inference at batch 1 to 1024, eager and three backends",
        plans=(Plan(protocol=protocol, cells=grid(["resnet20", "resnet18"], ["fp32", "bf16"])),),
    )


def anatomy() -> Suite:
    """What a step is made of: its parts, the input pipeline's ceiling, and the share of the peak.

    ResNet-20 and ResNet-18 in fp32 and bf16, either layout, without inference. Cost: 8 cells of
    about a minute; on two slow CPU cores ResNet-18's take three.
    """
    protocol = Protocol(
        warmup_steps=2,
        timed_steps=8,
        inference_batch_sizes=(),
        metrics=("anatomy", "pipeline", "utilization"),
        allow_emulated=False,
    )
    cells = grid(
        ["resnet20", "resnet18"], ["fp32", "bf16"], channels_last=(False, True), batch_sizes=(64,)
    )
    return Suite(
        name="anatomy",
        description="parts of a step of resnet20 and resnet18, input ceiling, share of the peak",
        plans=(Plan(protocol=protocol, cells=cells),),
    )


REFERENCE = (
    *("resnet18-jitter", "resnet18-muon"),
    *("resnet50-small", "resnet34-small", "resnet26-small", "resnet34-muon-small"),
    *("resnet9-one-cycle", "resnet9-muon"),
    *("resnet50-finetune", "resnet50-finetune-fast"),
)
"""Recipes after published small projects, each group with one of ours that is to beat it."""


def reference() -> Suite:
    """Published small projects and our better recipes, each at its full budget and three seeds.

    The table has the published figures beside what was found, see `bench.published`. Two recipes
    fetch 100 MiB of weights each. Cost: 30 cells of 0.5 to 15 million images; by arithmetic some
    eight hours on one H100, most of them for the 470,000 steps of 64 images per seed at 10 to 20 ms
    each, and weeks on two CPU cores, where `bench run reference --train-samples 7000 --seeds 1`
    tells whether all of it runs.
    """
    return Suite(
        name="reference",
        description="four published small projects and our better recipes, full budget, 3 seeds",
        plans=tuple(map(_full_budget, REFERENCE)),
    )


def _full_budget(recipe: str) -> Plan:
    """A recipe's own configuration on CIFAR-10 for all of its epochs."""
    config = replace(get_config(recipe), data=DataConfig(source="cifar10"))
    train = replace(config, precision=config.precision or "fp32")
    size = train.recipe.global_batch_size
    protocol = Protocol(
        train_samples=train.recipe.epochs * (50_000 // size) * size,
        inference_iterations=P99_BATCHES,
        inference_seconds=30.0,
        timeout=24 * 3600.0,
    )
    return Plan(protocol=protocol, cells=seeded((Cell(train=train),), 3))


SUITES: dict[str, Callable[[], Suite]] = {
    suite.__name__: suite
    for suite in (
        *(quick, depths, precisions, accuracy, latency, anatomy, reference),
        *(scaling, exchange),
    )
}


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: no such suite.
    """
    if name not in SUITES:
        raise ConfigError(f"suite: {name!r}: choose one of {', '.join(SUITES)}")
    return SUITES[name]()


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
