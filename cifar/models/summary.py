"""The layer table of a network: output shape, receptive field, parameters and multiply-adds.

It is computed on torch's meta device: no weights are allocated and nothing is calculated.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cifar.config import ModelConfig, require
from cifar.models.meta import build_on_meta, check_images, counted_flops, multiply_adds_of
from cifar.models.resnet import BasicBlock, Bottleneck, PaddingShortcut

if TYPE_CHECKING:
    from rich.table import Table

WHOLE_IMAGE = "all"
"""Shown for the receptive field of layers behind a global pooling."""
UNKNOWN = "-"
"""Shown for it in libraries' networks, whose paths nobody has told this program."""

KINDS: dict[type[nn.Module], str] = {
    nn.BatchNorm2d: "batch norm",
    nn.Linear: "linear",
    nn.AdaptiveAvgPool2d: "global pool",
    nn.AdaptiveMaxPool2d: "global max-pool",
    nn.Dropout: "dropout",
    nn.LayerNorm: "layer norm",
    nn.MultiheadAttention: "attention",
    PaddingShortcut: "zero pad",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSummary:
    """One layer, for one image.

    `output_shape` is (channels, height, width) or (features,). `receptive_field` is the side in
    pixels of the square of input pixels that one output can depend on, None for the whole image; it
    is not clipped to the image. In a library's network it is 0: unknown.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    receptive_field: int | None
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """The layers of a network in the order of execution, and their totals.

    `multiply_adds` counts convolutions and linear layers, as is usual, and the products of
    attention, which are no layer's; `trainable_bytes` is the size of the parameters in fp32.
    """

    label: str
    input_shape: tuple[int, int, int]
    layers: tuple[LayerSummary, ...]
    param_count: int
    multiply_adds: int

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the parameters in fp32."""
        return 4 * self.param_count

    def to_rows(self) -> list[dict[str, str | int]]:
        """One flat dict per layer, as `csv.DictWriter` wants them."""
        return [
            {
                "name": layer.name,
                "kind": layer.kind,
                "output_shape": _by(layer.output_shape),
                "receptive_field": _shown(layer.receptive_field),
                "parameters": layer.parameters,
                "multiply_adds": layer.multiply_adds,
            }
            for layer in self.layers
        ]


def _shown(receptive_field: int | None) -> int | str:
    return WHOLE_IMAGE if receptive_field is None else receptive_field or UNKNOWN


class _Field(NamedTuple):
    """What one output sees: `size` pixels (None: all), and `jump` pixels between neighbours."""

    size: int | None
    jump: int

    def behind(self, layer: nn.Module) -> "_Field":
        if isinstance(layer, nn.Conv2d) and self.size is not None:
            grown = self.size + (layer.kernel_size[0] - 1) * self.jump
            return _Field(grown, self.jump * layer.stride[0])
        if isinstance(layer, nn.MaxPool2d) and self.size is not None:
            side, stride = layer.kernel_size, layer.stride
            assert isinstance(side, int), "square, as all pools here"
            assert isinstance(stride, int)
            return _Field(self.size + (side - 1) * self.jump, self.jump * stride)
        if isinstance(layer, nn.Linear | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            return _Field(None, self.jump)
        return self


class _Recorder:
    """Forward hooks that note every layer as it runs."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[LayerSummary] = []
        self.field = self.block_input = _Field(1, 1)
        for name, module in model.named_modules():
            if isinstance(module, BasicBlock | Bottleneck):
                module.register_forward_pre_hook(self._enter_block)
            elif not any(module.children()):
                module.register_forward_hook(self._layer_hook(name))

    def _enter_block(self, _block: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        self.block_input = self.field

    def _layer_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if "downsample" in name.split("."):
                # The branch, noted before, sees all of this and more: self.field is their sum's.
                field = self.block_input = self.block_input.behind(layer)
            else:
                field = self.field = self.field.behind(layer)
            self.layers.append(
                LayerSummary(
                    name=name,
                    kind=_kind(layer),
                    output_shape=tuple(output.shape[1:]),
                    receptive_field=field.size,
                    parameters=_param_count(layer),
                    multiply_adds=_multiply_adds(layer, output),
                )
            )

        return note


class _LibraryRecorder:
    """The same of any network: its layers, and the parameters of blocks beside their layers'.

    Those are their own, and those of layers that never run, since a function computes with their
    weights. A layer that runs again has another row, without parameters. Activations and the like,
    which leave the shape alone, are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[LayerSummary] = []
        self._counted: set[nn.Parameter] = set()
        for name, module in model.named_modules():
            module.register_forward_hook(self._layer_hook(name))

    def _layer_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            is_leaf = not any(layer.children())
            left = set(layer.parameters()) - self._counted  # by the layers in it, which have run
            self._counted |= left
            count = sum(parameter.numel() for parameter in left)
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            if not isinstance(output, Tensor):
                return
            given = inputs[0] if inputs else None
            same = isinstance(given, Tensor) and output.shape == given.shape
            multiply_adds = _multiply_adds(layer, output)
            if count == 0 and multiply_adds == 0 and (same or not is_leaf):
                return
            self.layers.append(
                LayerSummary(
                    name=name or "(network)",
                    kind=_kind(layer),
                    output_shape=tuple(output.shape[1:]),
                    receptive_field=0,
                    parameters=count,
                    multiply_adds=multiply_adds,
                )
            )

        return note


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        stride = f" /{layer.stride[0]}" if layer.stride[0] > 1 else ""
        return f"conv {_by(layer.kernel_size)}{stride}"
    if isinstance(layer, nn.MaxPool2d):
        return f"max-pool {layer.kernel_size}x{layer.kernel_size} /{layer.stride}"
    return KINDS.get(type(layer), type(layer).__name__)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _param_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _multiply_adds(layer: nn.Module, output: Tensor) -> int:
    return multiply_adds_of(layer, output) if isinstance(layer, nn.Conv2d | nn.Linear) else 0


def summarize_model(config: ModelConfig, image_size: tuple[int, int] = (32, 32)) -> ModelSummary:
    """Describe the layers of a network for images of `image_size` (height, width) in pixels.

    The receptive field is the theoretical one, the larger of the two paths where a shortcut joins
    (https://distill.pub/2019/computing-receptive-fields/). Behind the classifier's pooling, and
    behind the first squeeze-excitation gate, it is the whole image. Where the network resizes
    images first, it is in pixels of the resized ones.

    Raises:
        ConfigError: a side of the image is not positive, or a library has no such network, or it
            does not take such images.
        UnsupportedError: the library is not installed.
    """
    require(min(image_size) > 0, "image-size", image_size, "give 1 pixel or more each way")
    if config.library:
        check_images(config, image_size, batch_size=2)
    model = build_on_meta(config).eval()
    recorder = (_LibraryRecorder if config.library else _Recorder)(model)
    with torch.no_grad():
        model(torch.empty(1, config.in_channels, *image_size, device="meta"))
    in_layers = sum(layer.multiply_adds for layer in recorder.layers)
    return ModelSummary(
        label=config.label,
        input_shape=(config.in_channels, *image_size),
        layers=tuple(recorder.layers),
        param_count=_param_count(model),
        multiply_adds=counted_flops(config, image_size)[0] // 2 if config.library else in_layers,
    )


def render_summary(summary: ModelSummary) -> "Table":
    """The layer table for `rich.print`; it fits into 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{summary.label} on {_by(summary.input_shape)}",
        caption=f"{summary.trainable_bytes / 2**20:,.2f} MiB of trainable parameters in fp32; "
        "receptive field in input pixels, multiply-adds per image",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        show_footer=True,
    )
    table.add_column("Layer", "Total", overflow="fold")
    table.add_column("Kind", no_wrap=True)
    table.add_column("Output", justify="right", overflow="fold")
    table.add_column("Receptive\nfield", justify="right", no_wrap=True)
    table.add_column("Parameters", f"{summary.param_count:,}", justify="right", no_wrap=True)
    table.add_column("Multiply-adds", f"{summary.multiply_adds:,}", justify="right", no_wrap=True)
    for row in summary.to_rows():
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row.values()))
    return table


def summary_text(summary: ModelSummary) -> str:
    """The layer table as lines of at most 100 characters."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(render_summary(summary))
    return captured.get()


def print_summary(config: ModelConfig, image_size: tuple[int, int] = (32, 32)) -> None:
    """Print the layer table on standard output; raises what `summarize_model` raises."""
    from rich.console import Console

    Console().print(render_summary(summarize_model(config, image_size)))
