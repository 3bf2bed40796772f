"""The arithmetic of FLOPs, held against torch's counter in both directions."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar.config import ModelConfig
from cifar.cost import forward_flops, train_flops
from cifar.models import build_model

MODELS = [
    ModelConfig(name="resnet20"),
    ModelConfig(name="resnet20", width=5, squeeze_excitation=True, in_channels=1),
    ModelConfig(name="resnet18", width=16),
    ModelConfig(name="resnet18", width=16, squeeze_excitation=True, num_classes=100),
    ModelConfig(name="resnet50"),
    ModelConfig(name="resnet9"),
    ModelConfig(name="resnet9", width=5, squeeze_excitation=True, num_classes=100),
    ModelConfig(name="resnet50", width=24, squeeze_excitation=True),
]
"""Both blocks, both kinds of shortcut, with and without squeeze-excitation."""


def counted_by_torch(config: ModelConfig, size: tuple[int, int], batch: int) -> tuple[int, int]:
    """FLOPs of a forward pass, and of a forward and a backward pass, over a batch."""
    with torch.device("meta"):
        model, images = build_model(config), torch.empty(batch, config.in_channels, *size)
        targets = torch.empty(batch, dtype=torch.int64)
        with FlopCounterMode(display=False) as forward:
            logits = model(images)
        with FlopCounterMode(display=False) as backward:
            torch.nn.functional.cross_entropy(logits, targets).backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    return forward.get_total_flops(), both


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.label)
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (8, 8)])
def test_flops_are_torch_s(config: ModelConfig, size: tuple[int, int]) -> None:
    forward, train = counted_by_torch(config, size, batch=2)
    assert 2 * forward_flops(config, size) == forward
    assert 2 * train_flops(config, size) == train


def test_flops_of_resnet18_are_the_known_ones() -> None:
    """0.555 GMAC; the stem's 3 * 64 * 9 weights at 32 * 32 positions need no input gradient."""
    config = ModelConfig(name="resnet18")
    assert forward_flops(config, (32, 32)) == 2 * 555_422_720
    assert train_flops(config, (32, 32)) == 6 * 555_422_720 - 2 * 3 * 64 * 9 * 32 * 32
