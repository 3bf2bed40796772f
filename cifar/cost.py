"""What a network costs, by arithmetic on its configuration alone: no torch, no network.

The layers are those of this program's own networks in `cifar.models`; tests hold the two together.
Of a library's, `cifar.models.meta` tells.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from cifar.architectures import Architecture, PooledArchitecture
from cifar.config import ModelConfig, TrainConfig, require

EXPANSION = {"basic": 1, "bottleneck": 4}


class Layer(NamedTuple):
    """A layer with weights, together with its bias or its BatchNorm.

    `halvings` says how often the image was halved before the layer's output; None: one position.
    """

    weights: int
    other_parameters: int
    halvings: int | None


def _conv(inputs: int, outputs: int, kernel: int, halvings: int) -> Layer:
    return Layer(inputs * outputs * kernel**2, 2 * outputs, halvings)


def _linear(inputs: int, outputs: int) -> Layer:
    return Layer(inputs * outputs, outputs, None)


def _gate(channels: int) -> Iterator[Layer]:
    """Squeeze-excitation."""
    hidden = max(channels // 16, 4)
    yield _linear(channels, hidden)
    yield _linear(hidden, channels)


def _block(
    architecture: Architecture, gated: bool, inputs: int, width: int, *, level: int, stride: int
) -> Iterator[Layer]:
    outputs = width * EXPANSION[architecture.block]
    if architecture.block == "basic":
        yield _conv(inputs, width, 3, level)
        yield _conv(width, width, 3, level)
    else:
        yield _conv(inputs, width, 1, level - 1 if stride > 1 else level)
        yield _conv(width, width, 3, level)
        yield _conv(width, outputs, 1, level)
    if gated:
        yield from _gate(outputs)
    if architecture.shortcut == "projection" and (stride > 1 or inputs != outputs):
        yield _conv(inputs, outputs, 1, level)


def _pooled_layers(config: ModelConfig, architecture: PooledArchitecture) -> Iterator[Layer]:
    """Those of `cifar.models.resnet9`, where convolutions outside of a branch have a bias too."""

    def biased(inputs: int, outputs: int, halvings: int) -> Layer:
        return Layer(inputs * outputs * 9, 3 * outputs, halvings)

    channels = config.width or architecture.width
    yield biased(config.in_channels, channels, 0)
    for level, residual in enumerate(architecture.residual):
        yield biased(channels, 2 * channels, level)
        channels *= 2
        if residual:
            yield _conv(channels, channels, 3, level + 1)
            yield _conv(channels, channels, 3, level + 1)
            if config.squeeze_excitation:
                yield from _gate(channels)
    yield _linear(channels, config.num_classes)


def _layers(config: ModelConfig) -> Iterator[Layer]:
    architecture = config.architecture
    if isinstance(architecture, PooledArchitecture):
        yield from _pooled_layers(config, architecture)
        return
    width, gated = config.width or architecture.width, config.squeeze_excitation
    yield _conv(config.in_channels, width, 3, 0)
    channels = width
    for level, count in enumerate(architecture.stages):
        for position in range(count):
            stride = 2 if level > 0 and position == 0 else 1
            yield from _block(
                architecture, gated, channels, width * 2**level, level=level, stride=stride
            )
            channels = width * 2**level * EXPANSION[architecture.block]
    yield _linear(channels, config.num_classes)


def _positions(layer: Layer, input_size: tuple[int, int]) -> int:
    """Of the layer's output for one image, which the first layer gets in this size."""
    if layer.halvings is None:
        return 1
    return prod(-(-side // 2**layer.halvings) for side in input_size)


def check_batch(train: TrainConfig, image_size: tuple[int, int], num_processes: int) -> None:
    """Raise a ConfigError if some BatchNorm would get a single value per channel in training.

    That is so of one image per device whose last feature maps are one pixel; there is no variance
    to divide by. Also if the batch does not divide, see `TrainConfig.per_device_batch_size`; that
    is all that is checked of a library's network.
    """
    size, per_device = train.recipe.global_batch_size, train.per_device_batch_size(num_processes)
    if train.model.library:
        return
    input_size = train.model.input_size(image_size)
    least = min(
        _positions(layer, input_size)
        for layer in _layers(train.model)
        if layer.halvings is not None
    )
    require(
        per_device * least > 1,
        "batch-size",
        size,
        "is one image per device and micro-batch, whose last feature map is one pixel, which "
        f"BatchNorm cannot normalise; give {2 * size} or more",
    )


def param_count(config: ModelConfig) -> int:
    """Trainable parameters of the network."""
    return sum(layer.weights + layer.other_parameters for layer in _layers(config))


def _multiply_adds_by_layer(config: ModelConfig, image_size: tuple[int, int]) -> list[int]:
    """Those of one image, from the first convolution to the classifier."""
    input_size = config.input_size(image_size)
    return [layer.weights * _positions(layer, input_size) for layer in _layers(config)]


def multiply_adds(config: ModelConfig, image_size: tuple[int, int]) -> int:
    """Multiply-adds of convolutions and linear layers in the forward pass of one image.

    `image_size` is (height, width) in pixels. Positions in the padding count, as is usual.
    """
    return sum(_multiply_adds_by_layer(config, image_size))


def forward_flops(config: ModelConfig, image_size: tuple[int, int]) -> int:
    """FLOPs of the forward pass of one image: two for each of its `multiply_adds`."""
    return 2 * multiply_adds(config, image_size)


def train_flops(config: ModelConfig, image_size: tuple[int, int]) -> int:
    """FLOPs of the forward and the backward pass of one image, counted as `forward_flops` does.

    Going back, every layer takes two products as large as its forward one: the gradients of its
    weights and of its input. The first convolution needs none for its input, the image.
    """
    first, *others = _multiply_adds_by_layer(config, image_size)
    return 2 * (2 * first + 3 * sum(others))
