"""The named suites: one function each, whose docstring gives purpose and cost."""

from collections.abc import Callable
from dataclasses import replace

from bench.protocol import BACKENDS, Protocol
from bench.scaling import exchange, scaling
from bench.spec import Cell, Plan, Suite, grid, seeded
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

    For a first look at a machine, on the embedded images, by the trainer's own recipe: with SGD so
    short a training differs by six to 16 points from fp32 to bf16, with Muon by two. Cost: at
    most 5 minutes on two CPU cores (3 to 5 where resnet18 trains at 22 to 34 and resnet20 at 190 to
    340 images/s and bf16 has no kernels).
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
    precisions, recipe = ["fp32", "bf16"], get_recipe("default")
    return Suite(
        name="quick",
        description="resnet20 and a narrow resnet18 trained briefly, resnet18 for speed: 5 minutes",
        plans=(
            Plan(
                protocol=trained,
                cells=grid(["resnet20", "resnet18-w16"], precisions, recipe=recipe),
            ),
            # A batch of 64 takes seconds per step on a slow CPU, and so does Muon.
            Plan(protocol=speed, cells=grid(["resnet18"], precisions, batch_sizes=(16,))),
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

    ResNet-20 and ResNet-18 in fp32 and bf16, either layout, without inference; what every
    augmentation costs besides. Cost: not measured with the augmentations; without them 8 cells of
    about a minute, on two slow CPU cores ResNet-18's of three.
    """
    protocol = Protocol(
        warmup_steps=2,
        timed_steps=8,
        inference_batch_sizes=(),
        metrics=("anatomy", "pipeline", "augmentations", "utilization"),
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
