"""What real training steps ran with, observed next to a timed window.

What kernels receive is seen as `bench.kernels` does; where a step or a batch would replay a CUDA
graph, in one in which the graph was recorded. In the window itself nothing is observed: Dynamo's
counters and the trainer's own are read on either side of it.
"""

import contextlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bench.judge import KERNEL, UNOBSERVED, Labels, changes
from bench.kernels import dtype_name, inner_layer, observe_eager, profiled_run, seen_in
from bench.placement import placement
from bench.spec import CAPTURE_STEPS
from cifar.distributed import gather_text
from cifar.precision import is_native
from cifar.sync_batch_norm import batch_norm_of
from cifar.trainer import Trainer

_MODES = {
    (False, False): "default",
    (False, True): "reduce-overhead",
    (True, False): "max-autotune-no-cudagraphs",
    (True, True): "max-autotune",
}
"""torch.compile's modes by what they switch on: tuning, CUDA graphs (see
`torch._inductor.list_mode_options`)."""


def _counters() -> Mapping[str, Counter[str]]:
    """What torch's compiler has counted, which is nothing in a process that has not imported it."""
    module = sys.modules.get("torch._dynamo.utils")
    return defaultdict(Counter) if module is None else module.counters


def _recompiled() -> int:
    """How often Dynamo has compiled code once more that it had compiled, in this process."""
    module = sys.modules.get("torch._dynamo.convert_frame")
    return 0 if module is None else sum(n - 1 for n in module.FRAME_COMPILE_COUNTER.values())


class Witness:
    """Takes and observes the last step before a timed window and the first after it.

    Both are ordinary steps of the trainer's budget.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._graphs = _counters()["stats"]["unique_graphs"]
        self._skips = _counters()["inductor"]["cudagraph_skips"]
        self._recompiled = _recompiled()
        self._recorded: Labels = {}
        self._before: Labels = {}
        self._window: Labels = {}
        self._start: dict[str, int] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note what the kernels of the step inside receive, which may record a CUDA graph.

        Its replays call no kernel by name; what they compute with is what was recorded last.
        """
        with profiled_run() as profiled:
            yield
        _, formats = seen_in(profiled, self._trainer.module)
        self._recorded = formats or self._recorded

    def before_window(self) -> None:
        """Observe a step, then count; a collective call."""
        self._before = self._observe_step()
        self._start = self._counts()
        self._window = {"recompiles_before_window": max(0, _recompiled() - self._recompiled)}

    def after_window(self, steps: int) -> None:
        """Count what the window's `steps` did, then observe a step."""
        end = self._counts()
        self._window |= {name: end[name] for name in ("graph_breaks", "cudagraph_skips")}
        self._window["timed_steps"] = steps
        for name in ("samples", "skipped_steps", "recompiles"):
            self._window[f"{name}_in_window"] = end[name] - self._start[name]
        self._window["changed_in_window"] = changes(self._before, self._observe_step())

    def effective(self) -> Labels:
        """What was observed, and what the whole training came to; a collective call."""
        counts = self._counts()
        return {
            **self._before,
            **self._window,
            "steps": self._trainer.step,
            "samples_seen": counts["samples"],
            "skipped_steps": counts["skipped_steps"],
            **self._rounds(),
        }

    def _rounds(self) -> Labels:
        """How often local steps ended in an average of all state; nothing where there are none."""
        local = self._trainer.config.parallel.local_steps > 1
        return {"rounds": self._trainer.rounds.ended} if local else {}

    def _counts(self) -> dict[str, int]:
        """Everything counted so far; waits for the device."""
        counters = _counters()
        stats, frames = counters["stats"], counters["frames"]
        meter = self._trainer.meter
        return {
            "samples": meter.train_metrics().samples,
            "skipped_steps": meter.skipped_steps,
            "recompiles": max(stats["unique_graphs"], frames["total"]),
            "graph_breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"] - self._skips,
        }

    def _observe_step(self) -> Labels:
        """Take one step and tell what it ran with."""
        trainer = self._trainer
        with _passes(trainer.model) as sizes:
            if trainer.config.compile:
                seen = _unobserved() | self._recorded | _observe_compiled(trainer)
            else:
                seen = observe_eager(trainer.module, trainer.train_step)
                seen["compile"] = _counters()["stats"]["unique_graphs"] > self._graphs
        return {**_settings(trainer), **seen, **_told_of_passes(sizes)}


@contextlib.contextmanager
def _passes(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes with which a model is called while entered; outside of what it compiles."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def _told_of_passes(sizes: Sequence[int]) -> Labels:
    """How many forward passes there were, and the size of their micro-batches, if it is one."""
    one = sizes[0] if len(set(sizes)) == 1 else ", ".join(map(str, sizes)) or UNOBSERVED
    return {"forward_passes": len(sizes), "micro_batch_size": one}


def _unobserved() -> Labels:
    return dict.fromkeys(KERNEL, UNOBSERVED)


class InferenceWitness:
    """Observes what a network receives in batches next to timed ones of inference.

    It is made before the network is compiled, whose skipped CUDA graphs it counts.
    """

    def __init__(self, module: nn.Module, *, compiled: bool) -> None:
        self._module, self._compiled = module, compiled
        self._skips = _counters()["inductor"]["cudagraph_skips"]
        self._recorded: Labels = {}

    def record(self, run: Callable[[], object]) -> None:
        """Run the batches after the first, which may record a CUDA graph, and note what they show.

        See `Witness.recording`.
        """
        for _ in range(CAPTURE_STEPS):
            with profiled_run() as profiled:
                run()
            self._recorded = seen_in(profiled, self._module)[1] or self._recorded

    def observe(self, run: Callable[[], object]) -> Labels:
        """What an inner convolution received while `run` has the network infer a batch."""
        if self._compiled:
            with profiled_run() as profiled:
                run()
            seen = _unobserved() | self._recorded | seen_in(profiled, self._module)[1]
        else:
            seen = observe_eager(self._module, run)
        counters = _counters()
        return {
            **seen,
            "device": inner_layer(self._module).weight.device.type,
            "recompiles": counters["stats"]["unique_graphs"],
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"] - self._skips,
        }


def _observe_compiled(trainer: Trainer) -> Labels:
    """Take one step under a CPU profile; what it does not show is left out."""
    with profiled_run() as profiled:
        trainer.train_step()
    events, formats = seen_in(profiled, trainer.module)
    is_compiled = any(event.name.startswith("Torch-Compiled Region") for event in events)
    return {"compile": is_compiled, **formats}


def _settings(trainer: Trainer) -> Labels:
    """What switches, wrappers and parameters say; a collective call."""
    parameter = inner_layer(trainer.module).weight
    precision = trainer.config.precision
    assert precision is not None, "a trainer has resolved it"
    scale: Labels = {} if trainer.scaler is None else {"loss_scale": trainer.scaler.get_scale()}
    return {
        "device": parameter.device.type,
        **placement(trainer),
        "parameter_dtype": dtype_name(parameter.dtype),
        "native_dtype": is_native(precision, trainer.device),
        "emulated": trainer.emulated,
        "tf32_matmul": _is_tf32(torch.backends.cuda.matmul),
        "tf32_convolution": _is_tf32(torch.backends.cudnn.conv),  # type: ignore[attr-defined]
        "cudnn_benchmark": trainer.device.type == "cuda" and torch.backends.cudnn.benchmark,
        "loss_scaling": trainer.scaler is not None,
        **scale,
        **({} if trainer.device.type == "cuda" else _fp32_of_a_cpu()),
        **({"compile_mode": _compile_mode(trainer.model)} if trainer.config.compile else {}),
        **_exchange(trainer),
    }


def _compile_mode(model: nn.Module) -> str:
    """The mode whose switches compiled code was made with, environment variables included."""
    tell = getattr(model, "get_compiler_config", None)
    switches = tell() if tell else None
    if switches is None:  # nothing compiles, or another compiler than Inductor
        return UNOBSERVED
    return _MODES[bool(switches["max_autotune"]), bool(switches["triton.cudagraphs"])]


def _fp32_of_a_cpu() -> Labels:
    """In what oneDNN computes fp32 convolutions and matrix products, as switches say."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the old switches and the new ones
        precision = "mixed"
    found: Labels = {"float32_matmul_precision": precision}
    for name, backend in (
        ("onednn_matmul", torch.backends.mkldnn.matmul),  # type: ignore[attr-defined]
        ("onednn_convolution", torch.backends.mkldnn.conv),  # type: ignore[attr-defined]
    ):
        told = backend.fp32_precision
        found[name] = "ieee" if told == "none" else told  # nobody has set it
    return found


def _exchange(trainer: Trainer) -> Labels:
    """Over what BatchNorm takes its statistics, and how DDP averages; nothing of one process."""
    if trainer.place.count == 1:
        return {}
    found: Labels = {"batch_norm": batch_norm_of(trainer.module)}
    if isinstance(trainer.wrapped, nn.parallel.DistributedDataParallel):
        told = trainer.wrapped._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        found["gradient_hook"] = told.get("comm_hook") or "none"
        found["bucket_bytes"] = told["bucket_cap_bytes"]
    return found


def _is_tf32(backend: Any) -> bool:
    """Whether fp32 operations may use TensorFloat-32; NVIDIA's variable overrides every switch.

    `allow_tf32` sets `fp32_precision`, and raises an error on reading once both were set.
    """
    override = {"0": False, "1": True}.get(os.environ.get("NVIDIA_TF32_OVERRIDE", ""))
    return bool(backend.fp32_precision == "tf32") if override is None else override


def told_by_all(phrases: Sequence[str], device: torch.device) -> list[str]:
    """Every process's phrases, with the rank if there are several; a collective call."""
    everyone = gather_text("; ".join(phrases), device)
    if len(everyone) == 1:
        return list(phrases)
    return [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
