"""bf16 on a CPU without kernels for it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.compilers import check_compiler
from cifar.config import ModelConfig
from cifar.emulation import emulate_bf16, emulate_if_needed
from cifar.errors import UnsupportedError
from cifar.models import build_model

CPU = torch.device("cpu")
NOISE = 2.0**-12
"""Less than half of what tells the bf16 numbers 1 and 1 + 2^-7 apart, so rounding removes it."""


def integers(*shape: int) -> Tensor:
    """1, 2 or 3, and too little more for bf16 to hold."""
    return torch.randint(1, 4, shape).float() + NOISE


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 2, 5, 5)), (nn.Linear(6, 4), (2, 6))],
    ids=["convolution", "linear"],
)
def test_operands_are_rounded_and_sums_exact(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = integers(*parameter.shape)
    exact = copy.deepcopy(layer).double()
    for parameter in exact.parameters():
        parameter.data -= NOISE
    images = integers(*shape)
    emulate_bf16(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double(), exact(images.double() - NOISE))  # whole numbers below 256


class Doubled(nn.Conv2d):
    """Computes with other weights than it holds, as timm's standardised convolutions do."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, 2 * self.weight)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    layer = Doubled(1, 1, 1, bias=False)
    layer.weight.data.fill_(3.0)
    emulate_bf16(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 1, 1, 1)).item() == 6.0


@pytest.mark.slow
def test_compiled_code_rounds_as_well() -> None:
    try:
        check_compiler("cpu")
    except UnsupportedError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32))
    emulate_bf16(module)
    features = torch.randn(16, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.compile(module)(features), module(features))


def test_gradients_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1 + NOISE)
    features = torch.full((257, 1), 1 + NOISE, requires_grad=True)
    emulate_bf16(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(features).float().sum().backward()
    assert layer.weight.grad is not None and features.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.item() == 256  # of 257 x 1, which needs 9 bits, bf16 has 8
    assert torch.equal(features.grad, torch.ones(257, 1))


def step(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the last convolution's weight."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(images)
        loss = F.cross_entropy(logits.float(), torch.arange(len(images)) % 10)
    convolution = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)][-1]
    (gradient,) = torch.autograd.grad(loss, convolution.weight)
    return logits, gradient


def test_a_network_is_as_close_to_its_own_bf16_as_rounding_allows() -> None:
    torch.manual_seed(0)
    module = build_model(ModelConfig(name="resnet20", width=4))
    images = torch.randn(8, 3, 8, 8)
    emulated = copy.deepcopy(module)
    emulate_bf16(emulated)
    for found, own in zip(step(emulated, images), step(module, images), strict=True):
        assert found.dtype == own.dtype
        assert (found - own).float().norm() < 0.1 * own.float().norm()


def test_without_autocast_nothing_is_rounded() -> None:
    torch.manual_seed(0)
    module = build_model(ModelConfig(name="resnet20", width=4)).eval()
    images = torch.randn(2, 3, 8, 8)
    emulated = copy.deepcopy(module)
    emulate_bf16(emulated)
    assert torch.equal(emulated(images), module(images))


def test_a_copy_computes_with_its_own_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    emulate_bf16(layer)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    assert not other(torch.ones(1, 4)).any()
    assert layer(torch.ones(1, 4)).any()


@pytest.mark.parametrize(
    ("precision", "kernels", "emulated"),
    [("bf16", False, True), ("bf16", True, False), ("fp32", False, False), (None, False, False)],
)
def test_only_where_kernels_are_missing(
    precision: str | None, kernels: bool, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: kernels)
    layer = nn.Linear(1, 1)
    assert emulate_if_needed(layer, precision, CPU) == emulated
    assert ("forward" in vars(layer)) == emulated
