"""The suites of several devices: how training scales, and what cheaper exchanges do to top-1."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace

from bench.nvml import visible_gpus
from bench.protocol import Protocol
from bench.spec import Cell, Plan, Suite, grid, seeded
from cifar.config import Parallel
from cifar.data.config import DataConfig
from cifar.process import available_cores
from cifar.recipes import get_recipe
from cifar.strategy import STRATEGIES

PER_DEVICE = 64
"""Images of a step and device, where the batch grows with the devices."""
SETTINGS = (
    *(Parallel(bucket_mib=1.0), Parallel(bucket_mib=100.0)),
    *(Parallel(overlap=False), Parallel(compression="bf16")),
    *(Parallel(local_steps=8), Parallel(sync_batch_norm=True)),
)
"""Exchanges under DDP that are compared with its own."""


def device_count() -> int:
    """Devices of this machine: GPUs, or where there is none its cores, whose share is one."""
    return visible_gpus(os.environ) or available_cores()


def default_counts() -> tuple[int, ...]:
    """1, 2, 4, ... processes: up to the devices, and on cores those that share them out evenly.

    All cells of a sweep then have the same threads in total.
    """
    devices, on_gpus = device_count(), visible_gpus(os.environ) > 0
    powers = [2**power for power in range(devices.bit_length())]
    return tuple(count for count in powers if on_gpus or devices % count == 0)


def scaling(
    *,
    models: Sequence[str] = ("resnet18",),
    precisions: Sequence[str] = ("fp32",),
    launchers: Sequence[str] = (),
    counts: Sequence[int] = (),
    batch_size: int = PER_DEVICE,
) -> Suite:
    """Weak and strong scaling of ResNet-18 over 1, 2, 4, ... processes, speed only.

    `launchers`: all there are; `counts`: `default_counts`, and one process in any case, with which
    all are compared. The global batch is `batch_size` for every process (weak), or in every cell as
    large as for their least common multiple (strong). In the most processes DDP also runs with the
    exchanges of `SETTINGS`. Cost: on two CPU cores 13 cells of two to three minutes; on a GPU less
    than a minute each.
    """
    counts = sorted({1, *(counts or default_counts())})
    strong = batch_size * math.lcm(*counts)
    cells = [*grid(models, precisions, batch_sizes=(batch_size, strong))]
    for count in counts[1:]:
        for launcher in launchers or STRATEGIES:
            sizes = dict.fromkeys((batch_size * count, strong))
            cells += grid(models, precisions, batch_sizes=tuple(sizes), launcher=launcher,
                          num_processes=count)  # fmt: skip
    most = counts[-1]
    if most > 1 and "ddp" in (launchers or STRATEGIES):
        plain = grid(models, precisions, batch_sizes=(batch_size * most,), num_processes=most)
        cells += [exchanging(cell, parallel) for parallel in SETTINGS for cell in plain]
    protocol = Protocol(
        warmup_steps=2,
        timed_steps=10,
        inference_batch_sizes=(),
        metrics=("anatomy",),
        allow_emulated=False,
    )
    return Suite(
        name=scaling.__name__,
        description="weak and strong scaling of resnet18 over 1, 2, 4, ... processes, speed only",
        plans=(Plan(protocol=protocol, cells=tuple(cells)),),
    )


def exchange() -> Suite:
    """What cheaper exchanges and other BatchNorm statistics do to top-1: ResNet-20 on CIFAR-10.

    The default recipe at its full budget and three seeds, by one process and by as many as there
    are devices (two at least): under DDP, with gradients in bf16, with 4 and 16 local steps, and
    with BatchNorm over all processes. Cost: 18 cells of half a million images each; on two CPU
    cores ten hours, a tenth of it with `--train-samples 50000`.
    """
    recipe = get_recipe("default")
    steps = recipe.epochs * (50_000 // recipe.global_batch_size)
    protocol = Protocol(
        train_samples=steps * recipe.global_batch_size,
        inference_batch_sizes=(),
        timeout=4 * 3600.0,
    )
    data = DataConfig(source="cifar10")
    (alone,) = grid(["resnet20"], ["fp32"], recipe=recipe, data=data)
    together = replace(alone, num_processes=max(2, default_counts()[-1]))
    compared = (
        *(Parallel(), Parallel(compression="bf16")),
        *(Parallel(local_steps=4), Parallel(local_steps=16)),
        Parallel(sync_batch_norm=True),
    )
    cells = (alone, *(exchanging(together, parallel) for parallel in compared))
    return Suite(
        name=exchange.__name__,
        description="resnet20's top-1 with bf16 gradients, local steps, BatchNorm over all devices",
        plans=(Plan(protocol=protocol, cells=seeded(cells, 3)),),
    )


def exchanging(cell: Cell, parallel: Parallel) -> Cell:
    """The cell with another exchange."""
    return replace(cell, train=replace(cell.train, parallel=parallel))
