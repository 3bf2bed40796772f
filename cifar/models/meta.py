"""What a network's shapes alone tell, on torch's meta device: its head, its FLOPs, what it takes.

No weights are allocated and nothing is calculated.
"""

import dataclasses

import torch
from torch import Tensor, nn

from cifar.config import ModelConfig
from cifar.errors import ConfigError
from cifar.models import build_model
from cifar.models.libraries import usual_size

_ONE_VALUE = "Expected more than 1 value per channel"
"""How torch begins to say that BatchNorm has nothing to normalise over."""


def build_on_meta(config: ModelConfig) -> nn.Module:
    """The network of a configuration on the meta device; raises as `build_model`."""
    try:
        with torch.device("meta"):
            return build_model(config)
    except NotImplementedError:  # it calculates with tensors while it is built, as RegNet does
        with torch.random.fork_rng(devices=[]):
            return build_model(config).to("meta")


def head_names(config: ModelConfig) -> frozenset[str]:
    """The tensors of the classifier: those whose shape depends on the number of classes."""
    other = dataclasses.replace(config, num_classes=3 if config.num_classes == 2 else 2)
    own, theirs = (build_on_meta(each).state_dict() for each in (config, other))
    return frozenset(name for name in own if own[name].shape != theirs[name].shape)


def check_images(config: ModelConfig, image_size: tuple[int, int], batch_size: int) -> None:
    """Raise a ConfigError if a library's network cannot train on batches of such images.

    `image_size` is (height, width) in pixels. Where the meta device lacks an operation nothing can
    be told.
    """
    module = build_on_meta(config)
    images = torch.empty(batch_size, config.in_channels, *image_size, device="meta")
    try:
        module(images)
    except NotImplementedError:
        return
    except (RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason.startswith(_ONE_VALUE):
            raise ConfigError(
                f"batch-size: {batch_size} per device and micro-batch: the last feature map is one "
                "pixel, which BatchNorm cannot normalise; give twice as many or more"
            ) from None
        height, width = config.input_size(image_size)
        raise ConfigError(
            f"resize: {config.resize}: {config.name} does not take images of {height} x {width} "
            f"pixels ({reason}); it was made for --resize {usual_size(config)}"
        ) from None


def counted_flops(config: ModelConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """FLOPs of one image forward, and forward and backward, of any network.

    Forward torch's counter tells, of convolutions, linear layers and attention. Going back each of
    their products takes two as large, but for the first layer, whose input needs no gradient: the
    counter itself multiplies what the weights of grouped convolutions take by the groups (2.15).
    """
    from torch.utils.flop_counter import FlopCounterMode

    module, first = build_on_meta(config).eval(), _FirstLayer()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(first.note)
    images = torch.empty(1, config.in_channels, *image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images)
    forward = counter.get_total_flops()
    return forward, 3 * forward - first.flops


class _FirstLayer:
    """A forward hook that notes the FLOPs of the layer that runs first."""

    def __init__(self) -> None:
        self.flops = 0

    def note(self, layer: nn.Conv2d | nn.Linear, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self.flops = self.flops or 2 * multiply_adds_of(layer, out)


def multiply_adds_of(layer: nn.Conv2d | nn.Linear, output: Tensor) -> int:
    """For one image: every output of a convolution or linear layer costs one row of weights."""
    return output[0].numel() * layer.weight[0].numel()
