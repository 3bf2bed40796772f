"""Whether what was observed to run is what a cell asked for. No torch."""

from collections.abc import Iterable

from bench.record import Label
from bench.spec import Cell
from cifar.config import PRECISIONS, TrainConfig

Labels = dict[str, Label]

UNOBSERVED = "unobserved"
"""Where compiled code keeps it to itself: autocast's state, or fused convolutions' formats."""
LAYOUT = ("input_channels_last", "weight_channels_last")
KERNEL = ("autocast", "input_dtype", "weight_dtype", *LAYOUT)
"""What an inner convolution received; a linear layer, of a network without any, has no layout."""
GROWTH_INTERVAL = 2000
"""Steps after which torch.amp.GradScaler by default tries a larger loss scale, which may skip one
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling)."""
WRAPPERS: dict[str, str] = {
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
"""What a launcher's strategy is observed to be wrapped in, see `bench.placement`; one process alone
needs nothing of the first."""
SHARED = {
    "fsdp": ("weights_held", "weights_updated"),
    "zero1": ("weights_updated",),
    "zero2": ("weights_updated",),
    "zero3": ("weights_held", "weights_updated"),
}
"""What of a strategy a process has less than all of, where there are several."""
_PROGRESS = ("loss_scale", "recompiles")
"""What may differ between two steps of one configuration."""
_FP32_OF_A_CPU: Labels = {
    "float32_matmul_precision": "highest",
    "onednn_matmul": "ieee",
    "onednn_convolution": "ieee",
}
"""Switches with which a CPU computes fp32 as such; a reduced precision comes by autocast alone."""


def changes(before: Labels, after: Labels) -> str:
    """What two steps of one configuration differ in; empty if in nothing."""
    pairs = {
        name: (before.get(name, UNOBSERVED), after.get(name, UNOBSERVED))
        for name in (before | after)
        if name not in _PROGRESS
    }
    return ", ".join(
        f"{name}: {first} before, {then} after"
        for name, (first, then) in pairs.items()
        if first != then
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
    return [
        *told,
        *_unshared(cell, effective),
        *_missing_rounds(cell, effective),
        *_skipped_graphs(cell.train.compile_mode, effective),
        *_early_recompiles(cell.train, effective),
        *_disturbances(effective),
    ]


def unproven(train: TrainConfig, seen: Labels) -> list[str]:
    """What was asked that compiled code has not shown, one phrase each: the number format.

    Autocast's state is the compiler's own business, and so is a layout that nobody asked for.
    """
    names = ["input_dtype", "weight_dtype"]
    if train.channels_last:
        names += LAYOUT
    return [
        f"{name} of a convolution was not seen in the compiled code"
        for name in names
        if seen.get(name) == UNOBSERVED
    ]


def _asked(cell: Cell, effective: Labels, device: str) -> Labels:
    """What the observations must be; compiled code need not show what it keeps to itself."""
    train, precision = cell.train, PRECISIONS[cell.precision]
    batch = train.recipe.global_batch_size
    return {
        "device": device,
        **_asked_of_placement(cell, effective, device),
        "compile": train.compile,
        **_asked_of_mode(train, effective),
        **_asked_of_passes(cell),
        **_asked_of_kernel(train, cell.precision, effective, compiled=train.compile),
        "parameter_dtype": "float32",
        "tf32_matmul": precision.tf32,
        "tf32_convolution": precision.tf32,
        "loss_scaling": precision.loss_scaling,
        **(_FP32_OF_A_CPU if device == "cpu" else {}),
        "samples_in_window": int(effective["timed_steps"]) * batch,
        "samples_seen": int(effective["steps"]) * batch,
    }


def _asked_of_mode(train: TrainConfig, effective: Labels) -> Labels:
    """torch.compile's mode, where the compiler tells it."""
    told = train.compile and effective.get("compile_mode") != UNOBSERVED
    return {"compile_mode": train.compile_mode} if told else {}


def _asked_of_passes(cell: Cell) -> Labels:
    """How often a step runs the network on a process, and on how many images each time."""
    train = cell.train
    return {
        "forward_passes": train.accumulation_steps * train.recipe.passes,
        "micro_batch_size": train.per_device_batch_size(cell.num_processes),
    }


def _asked_of_placement(cell: Cell, effective: Labels, device: str) -> Labels:
    """Processes with a device each, and how they work together; see `bench.placement`."""
    asked: Labels = {"num_processes": cell.num_processes, "devices": cell.num_processes}
    if cell.num_processes > 1 or cell.launcher != "ddp":
        asked["backend"] = "nccl" if device == "cuda" else "gloo"
        asked["wrapper"] = WRAPPERS[cell.launcher]
        if cell.num_processes > 1 and effective.get("wrapper") == asked["wrapper"]:
            asked |= _asked_of_exchange(cell, effective)
    return asked


def _asked_of_exchange(cell: Cell, effective: Labels) -> Labels:
    """Over what BatchNorm must take its statistics, and how DDP average gradients."""
    parallel, asked = cell.train.parallel, Labels()
    if effective.get("batch_norm") != "":  # the network has one
        asked["batch_norm"] = parallel.batch_norm
    if cell.launcher == "ddp":
        asked["gradient_hook"] = parallel.gradient_hook
        asked["bucket_bytes"] = parallel.bucket_bytes
    return asked


def _unshared(cell: Cell, effective: Labels) -> Iterable[str]:
    """What lies on this process as a whole though the launcher's strategy shares it out."""
    if cell.num_processes == 1:
        return
    for name in SHARED.get(cell.launcher, ()):
        fraction = effective.get(name, UNOBSERVED)
        if not isinstance(fraction, float) or fraction >= 1:
            yield f"{name}: {fraction} where a share was asked"


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

    `train` names the precision and the mode; see `bench.observe.InferenceWitness` for the rest.
    """
    assert train.precision is not None, "resolved"
    asked = _asked_of_kernel(train, train.precision, before, compiled=compiled)
    told = [
        f"{name}: {before.get(name, UNOBSERVED)} where {value} was asked"
        for name, value in asked.items()
        if before.get(name, UNOBSERVED) != value
    ]
    if compiled:
        told += _skipped_graphs(train.compile_mode, before)
    if recompiles := int(after["recompiles"]) - int(before["recompiles"]):
        told.append(f"recompiled {recompiles} times in the timed window")
    if changed := changes(before, after):
        told.append(f"changed in the timed window: {changed}")
    return told


def _skipped_graphs(mode: str, seen: Labels) -> Iterable[str]:
    """Whether Inductor left out CUDA graphs that the mode asks for, as it does with a log line.

    On a CPU `max-autotune` asks for none.
    """
    skips = seen["cudagraph_skips"]
    with_graphs = {"reduce-overhead": True, "max-autotune": seen.get("device") == "cuda"}
    if skips and with_graphs.get(mode, False):
        yield f"compile_mode: CUDA graphs skipped {skips} times: {mode} was asked"


def _early_recompiles(train: TrainConfig, effective: Labels) -> Iterable[str]:
    """Whether code was compiled anew in the warm-up, as for other shapes: it may be slower code.

    SAM's second pass and a backbone that is set free need code of their own; so do blocks of other
    shapes where a graph breaks between them, as under FSDP.
    """
    recipe, count = train.recipe, effective.get("recompiles_before_window", 0)
    breaks = effective.get("graph_breaks", 0)
    if count and not (recipe.sam_rho or recipe.frozen_epochs or breaks):
        yield f"recompiled {count} times before the timed window"


def _disturbances(effective: Labels) -> Iterable[str]:
    """What must not happen between the two observed steps."""
    if recompiles := effective["recompiles_in_window"]:
        yield f"recompiled {recompiles} times in the timed window"
    steps, skipped = int(effective["timed_steps"]), int(effective["skipped_steps_in_window"])
    if skipped > 1 + steps // GROWTH_INTERVAL:
        yield f"skipped {skipped} of {steps} steps in the timed window: give more warm-up steps"
    if changed := effective["changed_in_window"]:
        yield f"changed in the timed window: {changed}"
