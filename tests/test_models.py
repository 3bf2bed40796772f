"""The networks: sizes, shapes, names, layouts and what each option changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar import cost
from cifar.config import ModelConfig
from cifar.models import ResNet, build_model
from cifar.models.resnet import PaddingShortcut, SqueezeExcitation
from cifar.precision import allow_tf32

PARAM_COUNTS = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet101": 42_512_970,
    "resnet152": 58_156_618,
    "resnet9": 6_574_090,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}
SMALL = {
    "basic, projection": ModelConfig(name="resnet18", width=4),
    "bottleneck, projection": ModelConfig(name="resnet50", width=4),
    "basic, padding": ModelConfig(name="resnet20", width=4),
    "squeeze-excitation": ModelConfig(name="resnet20", width=4, squeeze_excitation=True),
    "pooled": ModelConfig(name="resnet9", width=4),
    "pooled, squeeze-excitation": ModelConfig(name="resnet9", width=4, squeeze_excitation=True),
    "bottleneck, squeeze-excitation": ModelConfig(
        name="resnet50", width=4, squeeze_excitation=True
    ),
}
small = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


def on_meta(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return build_model(config)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(config: ModelConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(config)


@pytest.mark.parametrize(("name", "expected"), PARAM_COUNTS.items())
def test_published_parameter_counts(name: str, expected: int) -> None:
    assert count(on_meta(ModelConfig(name=name))) == expected
    assert cost.param_count(ModelConfig(name=name)) == expected


@pytest.mark.parametrize(
    ("name", "reference"),
    [("resnet26-w35", 4_196_906), ("resnet34-w29", 4_348_082), ("resnet50-w29", 4_815_794)],
)
def test_widths_for_a_budget_of_five_million_parameters(name: str, reference: int) -> None:
    assert cost.param_count(ModelConfig(name=name)) == pytest.approx(reference, rel=0.01)


def test_resnet9_by_hand() -> None:
    model = build(ModelConfig(name="resnet9", width=4)).eval()
    state = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for tensor in state.values():  # else norms would do nothing
        if tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    images = torch.randn(2, 3, 32, 32)

    def layer(x: torch.Tensor, conv: str, norm: str) -> torch.Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], state.get(f"{conv}.bias"), padding=1)
        mean, var = (state[f"{norm}.running_{name}"].view(-1, 1, 1) for name in ("mean", "var"))
        scale, shift = (state[f"{norm}.{name}"].view(-1, 1, 1) for name in ("weight", "bias"))
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = layer(images, "conv1", "bn1")
    for stage in ("layer1", "layer2", "layer3"):
        x = F.max_pool2d(layer(x, f"{stage}.conv", f"{stage}.bn"), 2)
        if stage != "layer2":
            branch = layer(x, f"{stage}.branch.conv1", f"{stage}.branch.bn1")
            x = x + layer(branch, f"{stage}.branch.conv2", f"{stage}.branch.bn2")
    expected = x.amax((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@small
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 64), (1, 1)])
def test_any_image_size_gives_logits(config: ModelConfig, size: tuple[int, int]) -> None:
    logits = build(config).eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_classes_channels_and_width_of_one(name: str) -> None:
    config = ModelConfig(
        name=name, width=1, num_classes=100, in_channels=1, squeeze_excitation=True
    )
    assert build(config)(torch.randn(4, 1, 32, 32)).shape == (4, 100)


def test_width_scales_every_stage() -> None:
    state = build(ModelConfig(name="resnet18", width=12)).state_dict()
    assert [state[f"layer{stage}.1.conv2.weight"].shape[0] for stage in (1, 2, 3, 4)] == [
        12,
        24,
        48,
        96,
    ]


@small
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    model = build(config)
    F.cross_entropy(model(torch.randn(8, 3, 20, 20)), torch.arange(8)).backward()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not missing


@small
def test_in_place_operations_keep_the_gradient_right(config: ModelConfig) -> None:
    model = build(config).double().eval()
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (images,), fast_mode=True)


@small
def test_evaluation_is_deterministic_and_per_image(config: ModelConfig) -> None:
    model = build(config).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, model(images))
        torch.testing.assert_close(logits[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


@small
def test_forward_leaves_the_images_alone(config: ModelConfig) -> None:
    images = torch.randn(2, 3, 16, 16)
    before = images.clone()
    build(config)(images)
    assert torch.equal(images, before)


@small
def test_same_seed_same_weights(config: ModelConfig) -> None:
    first, same, other = (build(config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def layers_not_channels_last(model: nn.Module, images: torch.Tensor) -> list[str]:
    found = []
    for name, module in model.named_modules():

        def check(_module: nn.Module, _inputs: tuple, output: torch.Tensor, name=name) -> None:
            if output.dim() == 4 and not output.is_contiguous(memory_format=torch.channels_last):
                found.append(name)

        module.register_forward_hook(check)
    model(images)
    return found


@small
def test_channels_last_goes_through_every_layer(config: ModelConfig) -> None:
    model = build(config).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16)
    nhwc = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(nhwc), build(config)(images), rtol=1e-3, atol=1e-4)
    assert layers_not_channels_last(model, nhwc) == []
    contiguous = layers_not_channels_last(build(config), images)
    inner = {"layer1.branch.bn2"} if config.name == "resnet9" else {"layer1.0.bn2"}
    assert {"conv1", *inner, "layer3"} <= set(contiguous)


def test_padding_shortcut_by_hand() -> None:
    images = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(2, 3, 5, 4)
    expected = torch.zeros(2, 7, 3, 2)
    for n in range(2):
        for channel in range(3):
            for row in range(3):
                for column in range(2):
                    expected[n, channel, row, column] = images[n, channel, 2 * row, 2 * column]
    assert torch.equal(PaddingShortcut(3, 7, stride=2)(images), expected)


def test_squeeze_excitation_by_hand() -> None:
    torch.manual_seed(0)
    gate = SqueezeExcitation(6)
    images = torch.randn(2, 6, 3, 5)
    for n in range(2):
        means = images[n].mean((1, 2))
        hidden = (gate.fc1.weight @ means + gate.fc1.bias).clamp(min=0)
        scale = 1 / (1 + (-(gate.fc2.weight @ hidden + gate.fc2.bias)).exp())
        torch.testing.assert_close(gate(images)[n], images[n] * scale.reshape(6, 1, 1))


@pytest.mark.parametrize(("channels", "hidden"), [(1, 4), (64, 4), (80, 5), (2048, 128)])
def test_squeeze_excitation_reduces_by_16_to_no_less_than_4(channels: int, hidden: int) -> None:
    assert SqueezeExcitation(channels).fc1.out_features == hidden


def test_basic_block_by_hand() -> None:
    block = build(ModelConfig(name="resnet18", width=4)).eval().layer2[0]
    x = torch.randn(2, 4, 7, 9)
    branch = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    branch = block.bn2(F.conv2d(branch, block.conv2.weight, padding=1))
    shortcut = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(branch + shortcut))


def test_bottleneck_by_hand() -> None:
    block = build(ModelConfig(name="resnet50", width=4)).eval().layer2[0]
    x = torch.randn(2, 16, 7, 9)
    branch = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    branch = F.relu(block.bn2(F.conv2d(branch, block.conv2.weight, stride=2, padding=1)))
    branch = block.bn3(F.conv2d(branch, block.conv3.weight))
    shortcut = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(branch + shortcut))


def test_dropout_drops_features_in_training_only() -> None:
    model = build(ModelConfig(name="resnet20", width=4, dropout=0.5))
    images = torch.randn(8, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    plain = build(ModelConfig(name="resnet20", width=4))
    assert not any(isinstance(module, nn.Dropout) for module in plain.modules())
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_squeeze_excitation_is_at_the_end_of_every_branch() -> None:
    model = build(ModelConfig(name="resnet50", width=4, squeeze_excitation=True))
    gates = [
        name for name, module in model.named_modules() if isinstance(module, SqueezeExcitation)
    ]
    assert gates == [
        f"layer{stage + 1}.{block}.se" for stage, n in enumerate((3, 4, 6, 3)) for block in range(n)
    ]
    assert model.layer1[0].se.fc1.in_features == 16


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_state_dict_is_named_and_shaped_as_torchvision_s(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, num_classes=10).state_dict()
    ours = on_meta(ModelConfig(name=name)).state_dict()
    assert list(ours) == list(theirs)
    different = [key for key in ours if ours[key].shape != theirs[key].shape]
    assert different == ["conv1.weight"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits_are_torchvision_s_behind_a_cifar_stem(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    ours = build(ModelConfig(name=name)).eval()
    theirs = torchvision.models.get_model(name, num_classes=10).eval()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 9, 14)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_padding_shortcuts_leave_no_trace_in_the_state_dict() -> None:
    state = on_meta(ModelConfig(name="resnet20")).state_dict()
    assert not [name for name in state if "downsample" in name]
    assert {name.split(".")[0] for name in state} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "fc",
    }


def test_initial_weights() -> None:
    model = build(ModelConfig(name="resnet18"))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_compiles_into_one_graph(name: str) -> None:
    model = build(ModelConfig(name=name, width=2, squeeze_excitation=True)).eval()
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.gpu
@small
def test_gpu_agrees_with_cpu(config: ModelConfig) -> None:
    allow_tf32(False)
    model = build(config).eval()
    images = torch.randn(4, 3, 33, 47)
    with torch.no_grad():
        expected = model(images)
        actual = model.cuda()(images.cuda().contiguous(memory_format=torch.channels_last)).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_build_model_returns_a_resnet() -> None:
    assert isinstance(on_meta(ModelConfig()), ResNet)
