"""Whether what was observed to run is what a cell asked for. No torch."""

from collections.abc import Iterable

from bench.record import Label
from bench.spec import Cell
from cifar.config import PRECISIONS

Labels = dict[str, Label]

UNOBSERVED = "unobserved"
"""Where compiled code keeps it to itself: autocast's state, or fused convolutions' formats."""
KERNEL = (
    "autocast",
    "input_dtype",
    "weight_dtype",
    "input_channels_last",
    "weight_channels_last",
)
"""What an inner convolution received."""
GROWTH_INTERVAL = 2000
"""Steps after which torch.amp.GradScaler by default tries a larger loss scale, which may skip one
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling)."""
_PROGRESS = ("loss_scale",)
"""What may differ between two steps of one configuration."""


def changes(before: Labels, after: Labels) -> str:
    """What two steps of one configuration differ in; empty if in nothing."""
    return ", ".join(
        f"{name}: {before[name]} before, {after[name]} after"
        for name in before
        if name not in _PROGRESS and after[name] != before[name]
    )


def mismatches(cell: Cell, effective: Labels, device: str) -> list[str]:
    """What differs from what was asked, and what spoilt the timed window, one phrase each.

    `device` is the kind that the record's environment names: see `Environment.device`.
    """
    told = [
        f"{name}: {effective.get(name, UNOBSERVED)} where {value} was asked"
        for name, value in _asked(cell, effective, device).items()
        if effective.get(name, UNOBSERVED) != value
    ]
    return [*told, *_skipped_graphs(cell, effective), *_disturbances(effective)]


def _asked(cell: Cell, effective: Labels, device: str) -> Labels:
    """What the observations must be; compiled code need not show what it keeps to itself."""
    train, precision = cell.train, PRECISIONS[cell.precision]
    emulated = effective.get("emulated", False)  # by fp32 kernels, see `cifar.emulation`
    computed = "float32" if emulated else precision.autocast or "float32"
    batch = train.recipe.global_batch_size
    asked: Labels = {
        "device": device,
        "num_processes": cell.num_processes,
        "compile": train.compile,
        "autocast": precision.autocast or "off",
        "input_dtype": computed,
        "weight_dtype": computed,
        "parameter_dtype": "float32",
        "input_channels_last": train.channels_last,
        "weight_channels_last": train.channels_last,
        "tf32_matmul": precision.tf32,
        "tf32_convolution": precision.tf32,
        "loss_scaling": precision.loss_scaling,
        "samples_in_window": int(effective["timed_steps"]) * batch,
        "samples_seen": int(effective["steps"]) * batch,
    }
    if cell.num_processes > 1:
        asked["wrapper"] = "DistributedDataParallel"
    if train.compile:
        hidden = [name for name in KERNEL if effective.get(name) == UNOBSERVED]
        if not train.channels_last:  # Inductor lays convolutions out as it likes
            hidden += ["input_channels_last", "weight_channels_last"]
        asked = {name: value for name, value in asked.items() if name not in hidden}
    return asked


def _skipped_graphs(cell: Cell, effective: Labels) -> Iterable[str]:
    """Whether Inductor left out CUDA graphs that the mode asks for, as it does with a log line.

    On a CPU `max-autotune` asks for none.
    """
    mode, skips = cell.train.compile_mode, effective["cudagraph_skips"]
    with_graphs = {"reduce-overhead": True, "max-autotune": effective.get("device") == "cuda"}
    if skips and with_graphs.get(mode, False):
        yield f"compile_mode: CUDA graphs skipped {skips} times: {mode} was asked"


def _disturbances(effective: Labels) -> Iterable[str]:
    """What must not happen between the two observed steps."""
    if recompiles := effective["recompiles_in_window"]:
        yield f"recompiled {recompiles} times in the timed window"
    steps, skipped = int(effective["timed_steps"]), int(effective["skipped_steps_in_window"])
    if skipped > 1 + steps // GROWTH_INTERVAL:
        yield f"skipped {skipped} of {steps} steps in the timed window: give more warm-up steps"
    if changed := effective["changed_in_window"]:
        yield f"changed in the timed window: {changed}"
