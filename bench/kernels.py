"""What kernels receive of an inner convolution, or a linear layer of a network without any.

Eager code is observed by hooks, and by a dispatch mode around the one layer, which sees what comes
below autocast; both would change what torch.compile runs, so that is observed by a CPU profile.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.judge import KERNEL, UNOBSERVED, Labels
from cifar.teacher import EVENT

T = TypeVar("T")

_CONVOLUTION = "aten::convolution"
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default)
"""What a dispatch mode sees of a layer: the second where nothing is recorded for a backward."""
_PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.linear.default)
"""The same of a linear layer, with a bias or without."""


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


def observe_eager(module: nn.Module, act: Callable[[], object]) -> Labels:
    """Have a network work with hooks on an inner convolution, or an inner linear layer."""
    inner = inner_layer(module)
    seen: Labels = dict.fromkeys(KERNEL, UNOBSERVED)
    mode = _Received(seen)

    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kind = inputs[0].device.type
        on = torch.is_autocast_enabled(kind)
        seen["autocast"] = dtype_name(torch.get_autocast_dtype(kind)) if on else "off"
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


def profiled_run() -> profile:
    """A profile of what runs in it, with the shapes that operators receive."""
    return profile(activities=[ProfilerActivity.CPU], record_shapes=True)


def seen_in(profiled: profile, module: nn.Module) -> tuple[list[Any], Labels]:
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
    return {"input_dtype": dtype_name(image.dtype), "weight_dtype": dtype_name(weight.dtype)}


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


def inner_layer(module: nn.Module) -> nn.Conv2d | nn.Linear:
    """A convolution in the middle of the network; a linear layer where it has none to tell of."""
    spatial = _spatial_convolutions(module)
    if spatial:
        return _middle(spatial)
    return _middle([layer for layer in module.modules() if isinstance(layer, nn.Linear)])


def _middle(items: Sequence[T]) -> T:
    return items[len(items) // 2]


def dtype_name(dtype: torch.dtype) -> str:
    """As `float32`."""
    return str(dtype).removeprefix("torch.")


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether NHWC order alone describes the tensor's memory."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
