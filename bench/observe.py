"""What real training steps ran with, observed next to a timed window.

An eager step is observed by hooks, and by a dispatch mode around one convolution (or linear layer,
of a network without), which sees what the kernel receives below autocast. Both would change what
torch.compile runs, so a compiled step is observed by a CPU profile of it; where that would replay a
CUDA graph, by one of the steps in which the graph was recorded. In the window itself nothing is
observed: Dynamo's counters and the trainer's own are read on either side of it.
"""

import contextlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.judge import KERNEL, UNOBSERVED, Labels, changes
from bench.placement import placement
from cifar.accelerator import is_native
from cifar.distributed import gather_text
from cifar.sync_batch_norm import batch_norm_of
from cifar.teacher import EVENT
from cifar.trainer import Trainer

T = TypeVar("T")

_CONVOLUTION = "aten::convolution"
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)
"""What a dispatch mode sees of a layer: the second where nothing is recorded for a backward."""
_PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.linear.default)
"""The same of a linear layer, with a bias or without."""


def _counters() -> Mapping[str, Counter[str]]:
    """What torch's compiler has counted, which is nothing in a process that has not imported it."""
    module = sys.modules.get("torch._dynamo.utils")
    return defaultdict(Counter) if module is None else module.counters


class Witness:
    """Takes and observes the last step before a timed window and the first after it.

    Both are ordinary steps of the trainer's budget.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._graphs = _counters()["stats"]["unique_graphs"]
        self._skips = _counters()["inductor"]["cudagraph_skips"]
        self._recorded: Labels = {}
        self._before: Labels = {}
        self._window: Labels = {}
        self._start: dict[str, int] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note what the kernels of the step inside receive, which may record a CUDA graph.

        Its replays call no kernel by name; what they compute with is what was recorded last.
        """
        with _profiled() as profiled:
            yield
        _, formats = _seen_in(profiled, self._trainer.module)
        self._recorded = formats or self._recorded

    def before_window(self) -> None:
        """Observe a step, then count; a collective call."""
        self._before = self._observe_step()
        self._start = self._counts()

    def after_window(self, steps: int) -> None:
        """Count what the window's `steps` did, then observe a step."""
        end = self._counts()
        self._window = {name: end[name] for name in ("graph_breaks", "cudagraph_skips")}
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
        if trainer.config.compile:
            seen = dict.fromkeys(KERNEL, UNOBSERVED) | self._recorded | _observe_compiled(trainer)
        else:
            seen = _observe_eager(trainer.module, trainer.train_step)
            seen["compile"] = _counters()["stats"]["unique_graphs"] > self._graphs
        return {**_settings(trainer), **seen}


class _Received(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what the kernel of a convolution or of a linear layer receives."""

    def __init__(self, seen: Labels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            self._seen |= {"device": args[0].device.type, **_formats(*args[:2])}
        elif func in _PRODUCTS:
            image, weight = args[1:3] if func is torch.ops.aten.addmm.default else args[:2]
            self._seen |= {"device": image.device.type, **_dtypes(image, weight)}
        return func(*args, **(kwargs or {}))


def observe_inference(module: nn.Module, run: Callable[[], object], *, compiled: bool) -> Labels:
    """What an inner convolution of a network received while `run` has it infer a batch."""
    if compiled:
        with _profiled() as profiled:
            run()
        seen = dict.fromkeys(KERNEL, UNOBSERVED) | _seen_in(profiled, module)[1]
    else:
        seen = _observe_eager(module, run)
    return {**seen, "recompiles": _counters()["stats"]["unique_graphs"]}


def _observe_eager(module: nn.Module, act: Callable[[], object]) -> Labels:
    """Have a network work with hooks on an inner convolution, or an inner linear layer."""
    inner = _inner_layer(module)
    seen: Labels = dict.fromkeys(KERNEL, UNOBSERVED)
    mode = _Received(seen)

    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kind = inputs[0].device.type
        on = torch.is_autocast_enabled(kind)
        seen["autocast"] = _dtype_name(torch.get_autocast_dtype(kind)) if on else "off"
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: object) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    hooks = (
        inner.register_forward_pre_hook(enter),
        inner.register_forward_hook(leave, always_call=True),
    )
    try:
        act()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _profiled() -> profile:
    return profile(activities=[ProfilerActivity.CPU], record_shapes=True)


def _observe_compiled(trainer: Trainer) -> Labels:
    """Take one step under a CPU profile; what it does not show is left out."""
    with _profiled() as profiled:
        trainer.train_step()
    events, formats = _seen_in(profiled, trainer.module)
    is_compiled = any(event.name.startswith("Torch-Compiled Region") for event in events)
    return {"compile": is_compiled, **formats}


def _seen_in(profiled: profile, module: nn.Module) -> tuple[list[Any], Labels]:
    """The events, and what an inner convolution of the network that is a call received, if any."""
    assert profiled.profiler is not None, "it has ended"
    assert profiled.profiler.kineto_results is not None
    events = _in_order(profiled.profiler.kineto_results.experimental_event_tree())
    calls = [event.extra_fields.inputs[:2] for event in events if event.name == _CONVOLUTION]
    spatial = [(image, weight) for image, weight in calls if _is_spatial(weight.sizes)]
    one_pass = spatial[: len(_spatial_convolutions(module))]
    if not one_pass:
        return events, {}
    on_meta = [
        torch.empty_strided(tensor.sizes, tensor.strides, dtype=tensor.dtype, device="meta")
        for tensor in _middle(one_pass)
    ]
    return events, _formats(*on_meta)


def _in_order(tree: Iterable[Any]) -> list[Any]:
    """The events of a profile's tree as they began; a teacher's are not the network's."""
    found, waiting = [], list(tree)
    while waiting:
        event = waiting.pop()
        if event.name != EVENT:
            found.append(event)
            waiting.extend(event.children)
    return sorted(found, key=lambda event: event.start_time_ns)


def _formats(image: Tensor, weight: Tensor) -> Labels:
    """Number formats and memory formats of what a convolution received."""
    return {
        **_dtypes(image, weight),
        "input_channels_last": _is_channels_last(image),
        "weight_channels_last": _is_channels_last(weight),
    }


def _dtypes(image: Tensor, weight: Tensor) -> Labels:
    return {"input_dtype": _dtype_name(image.dtype), "weight_dtype": _dtype_name(weight.dtype)}


def _settings(trainer: Trainer) -> Labels:
    """What switches, wrappers and parameters say; a collective call."""
    parameter = _inner_layer(trainer.module).weight
    precision = trainer.config.precision
    assert precision is not None, "a trainer has resolved it"
    scale: Labels = {} if trainer.scaler is None else {"loss_scale": trainer.scaler.get_scale()}
    return {
        "device": parameter.device.type,
        **placement(trainer),
        "parameter_dtype": _dtype_name(parameter.dtype),
        "native_dtype": is_native(precision, trainer.device),
        "emulated": trainer.emulated,
        "tf32_matmul": _is_tf32(torch.backends.cuda.matmul),
        "tf32_convolution": _is_tf32(torch.backends.cudnn.conv),  # type: ignore[attr-defined]
        "cudnn_benchmark": trainer.device.type == "cuda" and torch.backends.cudnn.benchmark,
        "loss_scaling": trainer.scaler is not None,
        **scale,
        **_exchange(trainer),
    }


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


def _spatial_convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """Those whose memory format can be told.

    A weight that is shared out may not have its shape between two steps; its layer has the sizes.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return [
        layer
        for layer in layers
        if _is_spatial((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
    ]


def _is_spatial(shape: Sequence[int]) -> bool:
    """Whether a convolution is wider than 1x1 and of several channels.

    The strides of a 1x1 weight, or of a depthwise one, are of both memory formats.
    """
    return shape[1] > 1 and max(shape[2:]) > 1


def _inner_layer(module: nn.Module) -> nn.Conv2d | nn.Linear:
    """A convolution in the middle of the network; a linear layer where it has none to tell of."""
    spatial = _spatial_convolutions(module)
    if spatial:
        return _middle(spatial)
    return _middle([layer for layer in module.modules() if isinstance(layer, nn.Linear)])


def _middle(items: Sequence[T]) -> T:
    return items[len(items) // 2]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether NHWC order alone describes the tensor's memory."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def told_by_all(phrases: Sequence[str], device: torch.device) -> list[str]:
    """Every process's phrases, with the rank if there are several; a collective call."""
    everyone = gather_text("; ".join(phrases), device)
    if len(everyone) == 1:
        return list(phrases)
    return [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
