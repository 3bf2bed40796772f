"""Whether what was observed to run is what a cell asked for. No torch."""

from collections.abc import Iterable

from bench.record import Label
from bench.spec import Cell
from cifar.config import PRECISIONS, Parallel, TrainConfig

Labels = dict[str, Label]

UNOBSERVED = "unobserved"
"""Where compiled code keeps it to itself: autocast's state, or fused convolutions' formats."""
LAYOUT = ("input_channels_last", "weight_channels_last")
KERNEL = ("autocast", "input_dtype", "weight_dtype", *LAYOUT)
"""What an inner convolution received; a linear layer, of a network without any, has no layout."""
GROWTH_INTERVAL = 2000
"""Steps after which torch.amp.GradScaler by default tries a larger loss scale, which may skip one
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling)."""
_PROGRESS = ("loss_scale", "recompiles")
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
    told += _missing_rounds(cell, effective)
    return [*told, *_skipped_graphs(cell, effective), *_disturbances(effective)]


def unproven(cell: Cell, effective: Labels) -> list[str]:
    """What was asked that compiled code has not shown, one phrase each: the number format.

    Autocast's state is the compiler's own business, and so is a layout that nobody asked for.
    """
    names = ["input_dtype", "weight_dtype"]
    if cell.train.channels_last:
        names += LAYOUT
    return [
        f"{name} of a convolution was not seen in the compiled code"
        for name in names
        if effective.get(name) == UNOBSERVED
    ]


def _asked(cell: Cell, effective: Labels, device: str) -> Labels:
    """What the observations must be; compiled code need not show what it keeps to itself."""
    train, precision = cell.train, PRECISIONS[cell.precision]
    batch = train.recipe.global_batch_size
    asked: Labels = {
        "device": device,
        "num_processes": cell.num_processes,
        "compile": train.compile,
        **_asked_of_kernel(train, cell.precision, effective, compiled=train.compile),
        "parameter_dtype": "float32",
        "tf32_matmul": precision.tf32,
        "tf32_convolution": precision.tf32,
        "loss_scaling": precision.loss_scaling,
        "samples_in_window": int(effective["timed_steps"]) * batch,
        "samples_seen": int(effective["steps"]) * batch,
    }
    if cell.num_processes > 1:
        asked["wrapper"] = "DistributedDataParallel"
        if effective.get("wrapper") == asked["wrapper"]:
            asked |= _asked_of_exchange(train.parallel, effective)
    return asked


def _asked_of_exchange(parallel: Parallel, effective: Labels) -> Labels:
    """How DDP must average gradients, and over what BatchNorm take its statistics."""
    asked: Labels = {
        "gradient_hook": parallel.gradient_hook,
        "bucket_bytes": parallel.bucket_bytes,
        "batch_norm": parallel.batch_norm,
    }
    if effective.get("batch_norm") == "":  # the network has none
        del asked["batch_norm"]
    return asked


def _missing_rounds(cell: Cell, effective: Labels) -> Iterable[str]:
    """Whether weights were averaged less often than local steps ask for."""
    count, steps = cell.train.parallel.local_steps, int(effective["steps"])
    if count > 1 and (rounds := int(effective.get("rounds", 0))) < steps // count:
        yield f"rounds: {rounds} in {steps} steps where one every {count} was asked"


def _asked_of_kernel(train: TrainConfig, name: str, seen: Labels, *, compiled: bool) -> Labels:
    """What an inner convolution must receive in the precision of that name.

    Without what compiled code keeps to itself, and where a library's network lays its features out
    as it likes, as those with LayerNorm do.
    """
    precision = PRECISIONS[name]
    emulated = seen.get("emulated", False)  # by fp32 kernels, see `cifar.emulation`
    computed = "float32" if emulated else precision.autocast or "float32"
    asked: Labels = {
        "autocast": precision.autocast or "off",
        "input_dtype": computed,
        "weight_dtype": computed,
        "input_channels_last": train.channels_last,
        "weight_channels_last": train.channels_last,
    }
    hidden = {name for name in LAYOUT if seen.get(name) == UNOBSERVED}
    if train.model.library:
        hidden.add("input_channels_last")
    if compiled:
        hidden |= {name for name in KERNEL if seen.get(name) == UNOBSERVED}
        if not train.channels_last:  # Inductor lays convolutions out as it likes
            hidden |= set(LAYOUT)
    return {name: value for name, value in asked.items() if name not in hidden}


def inference_mismatches(
    train: TrainConfig, before: Labels, after: Labels, *, compiled: bool
) -> list[str]:
    """What batches next to a timed window of inference differ in from what was asked.

    `train` names the precision; see `bench.observe.observe_inference` for the rest.
    """
    assert train.precision is not None, "resolved"
    asked = _asked_of_kernel(train, train.precision, before, compiled=compiled)
    told = [
        f"{name}: {before.get(name, UNOBSERVED)} where {value} was asked"
        for name, value in asked.items()
        if before.get(name, UNOBSERVED) != value
    ]
    if recompiles := int(after["recompiles"]) - int(before["recompiles"]):
        told.append(f"recompiled {recompiles} times in the timed window")
    if changed := changes(before, after):
        told.append(f"changed in the timed window: {changed}")
    return told


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
