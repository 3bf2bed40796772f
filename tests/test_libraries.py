"""torchvision's and timm's classifiers: names, heads, sizes, and what is told of them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as torchvision_models
from training import cifar, make_trainer, tiny_recipe

from bench.estimate import estimate_seconds
from bench.judge import UNOBSERVED, inference_mismatches
from bench.observe import InferenceWitness
from bench.protocol import Protocol
from bench.spec import Cell, Plan, Suite, expand
from bench.tuning import trial_protocol
from cifar.checkpoint import load_into
from cifar.config import ModelConfig, Recipe, TrainConfig
from cifar.errors import ConfigError, UnsupportedError
from cifar.models import build_model
from cifar.models.meta import build_on_meta, check_images, counted_flops, head_names
from cifar.models.summary import summarize_model
from cifar.train_options import read_train_options

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
FEATURES = {
    "alexnet": ("classifier.6", 4096),
    "convnext_tiny": ("classifier.2", 768),
    "densenet121": ("classifier", 1024),
    "efficientnet_b0": ("classifier.1", 1280),
    "googlenet": ("fc", 1024),
    "inception_v3": ("fc", 2048),
    "maxvit_t": ("classifier.5", 512),
    "mnasnet0_5": ("classifier.1", 1280),
    "mobilenet_v2": ("classifier.1", 1280),
    "mobilenet_v3_small": ("classifier.3", 1024),
    "regnet_y_400mf": ("fc", 440),
    "resnet18": ("fc", 512),
    "shufflenet_v2_x0_5": ("fc", 1024),
    "squeezenet1_1": ("classifier.1", 512),
    "swin_t": ("head", 768),
    "vgg11": ("classifier.6", 4096),
    "vit_b_32": ("heads.head", 768),
}
"""Of one member of every family: the classifier's name and its features."""
WITHOUT_EXTRA_HEADS = {"googlenet": 6_624_904, "inception_v3": 23_834_568}
"""Published with them, or not; Szegedy et al. count without."""


def of(name: str, **fields: Any) -> ModelConfig:
    return ModelConfig(name=name, **fields)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_family_is_tested() -> None:
    families = {
        torchvision_models.get_model_builder(name).__module__
        for name in torchvision_models.list_models(module=torchvision_models)
    }
    tested = {torchvision_models.get_model_builder(name).__module__ for name in FEATURES}
    assert tested == families


@pytest.mark.parametrize("name", FEATURES)
def test_the_head_has_the_classes_and_the_rest_is_the_library_s(name: str) -> None:
    layer, features = FEATURES[name]
    config = of(f"torchvision:{name}", num_classes=7)
    module = build_on_meta(config)
    own = module.state_dict()
    shape = (7, features, 1, 1) if name == "squeezenet1_1" else (7, features)
    assert tuple(own[f"{layer}.weight"].shape) == shape
    bias = set() if name == "maxvit_t" else {f"{layer}.bias"}
    assert head_names(config) == {f"{layer}.weight"} | bias
    published = torchvision_models.get_model_weights(name).DEFAULT.meta["num_params"]
    whole = build_on_meta(of(f"torchvision:{name}", num_classes=1000))
    assert count(whole) == WITHOUT_EXTRA_HEADS.get(name, published)
    assert count(whole) - count(module) == 993 * (features + len(bias))


@needs_timm
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet10t", {"fc.weight", "fc.bias"}),
        ("convnext_atto", {"head.fc.weight", "head.fc.bias"}),
        ("vit_tiny_patch16_224", {"head.weight", "head.bias"}),
        (
            "deit_tiny_distilled_patch16_224",
            {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"},
        ),
    ],
)
def test_the_heads_of_timm_s(name: str, head: set[str]) -> None:
    import timm

    assert head_names(of(f"timm:{name}")) == head
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=10, in_chans=1)
    own = build_on_meta(of(f"timm:{name}", in_channels=1))
    assert own.state_dict().keys() == theirs.state_dict().keys()
    assert count(own) == count(theirs)


def test_the_head_of_one_of_our_own() -> None:
    config = of("resnet20", width=4, num_classes=2)
    assert head_names(config) == {"fc.weight", "fc.bias"}


def test_what_calculates_while_it_is_built_draws_nothing_from_the_generator() -> None:
    """RegNet cannot be built on the meta device."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    head_names(of("torchvision:regnet_y_400mf"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": "keras:resnet50"}, r"model: 'keras:resnet50': write torchvision:NAME or timm:NA"),
        ({"name": "torchvision:"}, r"model: 'torchvision:': write torchvision:NAME or timm:NAME"),
        ({"name": "torchvision:resnet18.a1"}, r"model: 'torchvision:resnet18\.a1': write torchv"),
        ({"name": "timm:hf_hub:x/y"}, r"model: 'timm:hf_hub:x/y': write torchvision:NAME or timm"),
        ({"name": "torchvision:resnet18-w32"}, r"width: 32: is for this program's own architect"),
        (
            {"name": "timm:resnet18", "squeeze_excitation": True},
            r"squeeze-excitation: True: is for this program's own architectures, not for timm:r",
        ),
        (
            {"name": "torchvision:resnet18", "in_channels": 1},
            r"model: 'torchvision:resnet18': takes images of 3 channels, not 1; take one of timm",
        ),
        ({"name": "resnet18", "resize": 0}, r"resize: 0: give 1 to 65536"),
        ({"name": "resnet18-r64", "resize": 32}, r"resize: 32: resnet18-r64 already has a resize"),
    ],
)
def test_what_cannot_be_meant_is_refused_without_the_library(
    fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        ModelConfig(**fields)


def test_a_suffix_is_a_size() -> None:
    config = of("resnet18-w16-r64")
    assert (config.name, config.width, config.resize) == ("resnet18", 16, 64)
    assert config == of("resnet18", width=16, resize=64) == of(config.label)
    library = of("timm:resnet18.a1_in1k-r224")
    assert (library.library, library.library_name) == ("timm", "resnet18.a1_in1k")
    assert library.label == "timm:resnet18.a1_in1k-r224" and library.resize == 224


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torchvision:resnot18", r"model: 'torchvision:resnot18': .* nearest: resnet18, resnet"),
        ("torchvision:fcn_resnet50", r"torchvision has no such classifier"),
        pytest.param(
            "timm:resnet18d9", r"timm has no such classifier; nearest: resnet18d", marks=needs_timm
        ),
        pytest.param(
            "timm:resnet18.a9_in1k", r"has no such weights; resnet18 has a1_in1k", marks=needs_timm
        ),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_on_meta(of(name))


def test_a_library_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = r"model: 'timm:resnet18': timm is not installed; install it \(pip install"
    with pytest.raises(UnsupportedError, match=told):
        build_model(of("timm:resnet18"))
    with pytest.raises(UnsupportedError, match=told):
        read_train_options(["--model", "timm:resnet18"])


@pytest.mark.parametrize(
    ("name", "size", "batch", "told"),
    [
        ("torchvision:vit_b_32", 32, 2, r"resize: None: .* of 32 x 32 pixels \(.*\); it .* 224"),
        (
            "torchvision:vit_b_32-r200",
            32,
            2,
            r"model: .*: torchvision does not build it so \(Input sh",
        ),
        ("torchvision:alexnet", 16, 2, r"resize: None: torchvision:alexnet does not take images o"),
        (
            "torchvision:resnet18",
            32,
            1,
            r"batch-size: 1 per device and .*: the last feature map is",
        ),
    ],
)
def test_images_that_a_network_does_not_take_are_refused(
    name: str, size: int, batch: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_images(of(name), (size, size), batch)


@pytest.mark.parametrize("name", ["vit_b_32-r224", "vit_b_32-r64", "resnet18-r64", "maxvit_t-r224"])
def test_images_that_a_network_does_take(name: str) -> None:
    check_images(of(f"torchvision:{name}"), (32, 32), 2)


def small(resize: int | None, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(of("resnet20", width=4, resize=resize, **fields))


@pytest.mark.parametrize("side", [24, 7])
@pytest.mark.parametrize("channels_last", [False, True])
def test_resizing_is_torch_s_and_of_no_name(side: int, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=layout)
    resizing, plain = small(side).eval(), small(None).eval()
    assert resizing.state_dict().keys() == plain.state_dict().keys()
    seen: list[Tensor] = []
    resizing.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    resized = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    assert torch.equal(resizing(images), plain(resized))
    assert seen[0].is_contiguous(memory_format=layout)


def test_resizing_by_hand() -> None:
    """Pixels lie in the middle of their squares: a quarter and three quarters of the way."""
    seen: list[Tensor] = []
    module = small(4, in_channels=1).eval()
    module.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]]))
    rows = torch.tensor([0.0, 2.0, 6.0, 8.0])[:, None] + torch.tensor([0.0, 1.0, 3.0, 4.0])
    torch.testing.assert_close(seen[0][0, 0], rows)


def test_resizing_under_autocast_keeps_the_images_and_goes_on_in_bf16() -> None:
    seen: list[torch.dtype] = []
    module = small(24)
    module.layer1[0].conv1.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    module.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.rand(2, 3, 16, 16))
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", ["resnet20-w4", "torchvision:resnet18"])
def test_resizing_and_dropout_compile_into_one_graph_and_can_be_exported(name: str) -> None:
    module = build_model(of(name, resize=32, dropout=0.5)).eval()
    images = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), module(images))
        exported = torch.export.export(module, (images,)).module()
        torch.testing.assert_close(exported(images), module(images))


def test_dropout_drops_features_of_the_classifier_in_training_alone() -> None:
    module = build_model(of("torchvision:resnet18", dropout=0.4))
    pooled: list[Tensor] = []
    seen: list[Tensor] = []
    module.avgpool.register_forward_hook(lambda _m, _i, output: pooled.append(output.flatten(1)))
    original = module.fc.forward
    module.fc.forward = lambda features: seen.append(features) or original(features)
    images = torch.rand(8, 3, 32, 32)
    module(images)
    module.eval()(images)
    dropped = (seen[0] == 0)[pooled[0] != 0].float().mean().item()
    assert dropped == pytest.approx(0.4, abs=0.06)  # of some 2,600 features: 0.01 of deviation
    assert torch.equal(seen[1], pooled[1])


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, [0.5, 0.5]), (0.3, [0.3, 0.3])])
def test_dropout_of_a_classifier_that_has_its_own(dropout: float, expected: list[float]) -> None:
    module = build_on_meta(of("torchvision:vgg11", dropout=dropout))
    assert [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)] == expected


@needs_timm
def test_dropout_is_timm_s_own() -> None:
    assert build_on_meta(of("timm:resnet10t", dropout=0.3)).drop_rate == 0.3


def counted_by_torch(config: ModelConfig, side: int) -> tuple[int, int]:
    """FLOPs of one of two images, forward, and forward and backward."""
    module = build_on_meta(config)
    images = torch.empty(2, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = module(images)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward // 2, counter.get_total_flops() // 2


def test_flops_without_groups_are_those_of_torch_s_counter() -> None:
    config = of("torchvision:resnet18")
    assert counted_flops(config, (40, 40)) == counted_by_torch(config, 40)
    resized = of("torchvision:resnet18-r40")
    assert counted_flops(resized, (16, 16)) == counted_by_torch(config, 40)


def test_flops_of_a_depthwise_convolution_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 x 3 of one channel each: 9 x 4 multiply-adds at 64 places, behind 3 x 4 of 1 x 1."""

    def build(_config: ModelConfig) -> nn.Module:
        layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        return nn.Sequential(*layers, nn.Flatten())

    monkeypatch.setattr("cifar.models.meta.build_model", build)
    first, second = 2 * 12 * 64, 2 * 36 * 64
    assert counted_flops(of("torchvision:resnet18"), (8, 8)) == (
        first + second,
        2 * first + 3 * second,
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:mobilenet_v3_small", 32),
        ("torchvision:vit_b_32-r224", 32),
        ("torchvision:swin_t", 32),
        pytest.param("timm:convnext_atto", 32, marks=needs_timm),
    ],
)
def test_the_rows_of_a_summary_hold_all_parameters(name: str, size: int) -> None:
    summary = summarize_model(of(name), (size, size))
    assert sum(layer.parameters for layer in summary.layers) == summary.param_count
    assert summary.param_count == count(build_on_meta(of(name)))
    assert 2 * summary.multiply_adds == counted_by_torch(of(name), size)[0]
    assert {row["receptive_field"] for row in summary.to_rows()} == {"-"}


def test_a_summary_tells_of_a_layer_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar("summary", "torchvision:squeezenet1_1", "--resize", 64) == 0
    printed = capsys.readouterr().out
    assert "torchvision:squeezenet1_1-r64 on 3x32x32" in printed
    first = next(line for line in printed.splitlines() if line.startswith("features.0 "))
    # (64 - 3) / 2 + 1 = 31 places each way; 64 x 3 x 9 weights and 64 biases
    assert first.split()[1:] == ["conv", "3x3", "/2", "64x31x31", "-", "1,792", "1,660,608"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("summary", "torchvision:resnot18"), "no such classifier; nearest: resnet18"),
        (("summary", "torchvision:vit_b_32"), "does not take images of 32 x 32 pixels"),
        (("summary", "resnet18", "--resize", "0"), "resize: 0: give 1 to 65536"),
        (("train", "--model", "tv:resnet18"), "write torchvision:NAME or timm:NAME"),
        (("train", "--pretrained", "no.pth"), "pretrained: 'no.pth': no such file; write imagenet"),
        (("train", "--frozen-epochs", "11"), "frozen-epochs: 11: give 0 to the number of epochs"),
        (("train", "--backbone-lr", "0"), "backbone-lr: 0.0: give 0 < share <= 1"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cifar(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: ") and told in line


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:squeezenet1_1",
        "torchvision:mobilenet_v3_small",
        pytest.param("timm:resnet10t", marks=needs_timm),
        pytest.param("timm:resnetblur18", marks=needs_timm),  # has filters outside of its state
    ],
)
def test_a_network_of_a_library_trains(name: str) -> None:
    trainer = make_trainer(
        tiny_recipe(global_batch_size=8), model=of(name, resize=32), data=make_dataset(16, 8)
    )
    before = {key: value.clone() for key, value in trainer.weights().items()}
    trainer.train_step()
    moved = [key for key, value in trainer.weights().items() if not torch.equal(value, before[key])]
    assert set(head_names(trainer.model_config)) <= set(moved)
    assert trainer.evaluate().samples == 8


@needs_timm
def test_timm_s_take_images_of_one_channel() -> None:
    trainer = make_trainer(
        tiny_recipe(global_batch_size=8),
        model=of("timm:resnet10t", resize=32),
        data=make_dataset(16, 8, channels=1),
    )
    assert trainer.module.conv1[0].weight.shape[1] == 1
    trainer.train_step()


def test_a_classifier_that_is_a_convolution_takes_a_plain_step_beside_muon_s() -> None:
    trainer = make_trainer(
        tiny_recipe(optimizer="muon", global_batch_size=8),
        model=of("torchvision:squeezenet1_1", resize=32),
        data=make_dataset(16, 8),
    )
    names = {id(parameter): name for name, parameter in trainer.module.named_parameters()}
    groups = trainer.optimizer.param_groups
    by_muon = [group["params"] for group in groups if group["relative_step"] is not None]
    convolutions = {names[id(parameter)] for group in by_muon for parameter in group}
    assert "classifier.1.weight" in names.values()
    assert "features.0.weight" in convolutions and "classifier.1.weight" not in convolutions


def test_a_step_draws_the_same_features_whenever_it_is_taken() -> None:
    """SqueezeNet has dropout of its own, which the configuration does not tell."""
    losses = []
    for _ in range(2):
        trainer = make_trainer(
            tiny_recipe(global_batch_size=8),
            model=of("torchvision:squeezenet1_1", resize=32),
            data=make_dataset(16, 8),
        )
        torch.rand(len(losses) + 1)
        trainer.train_step()
        losses.append(trainer.meter.train_metrics().loss)
    assert losses[0] == losses[1]


def test_a_run_of_a_library_s_network_is_evaluated_like_any_other(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ("--model", "torchvision:squeezenet1_1-r32", "-b", 32, "--epochs", 1, "--lr", 0.01)
    assert cifar("train", "--cpu", "--data", f"npz:{npz}", "--output-dir", run, *words) == 0
    trained = capsys.readouterr().out
    assert "torchvision:squeezenet1_1-r32 on " in trained
    assert (run / "report" / "layers.csv").read_text().startswith("name,kind,output_shape,")
    assert cifar("evaluate", run, "--cpu") == 0
    top1 = trained.splitlines()[-1].split()[1]
    assert f"top-1 {top1}" in capsys.readouterr().out


def test_a_network_whose_parts_have_versions_takes_its_own_weights() -> None:
    """MNASNet makes a stem of its first version of itself for weights that tell none."""
    config = of("torchvision:mnasnet0_5")
    weights = {name: tensor.clone() for name, tensor in build_model(config).state_dict().items()}
    module = build_model(config)
    load_into(module, weights, "here")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


def observed(module: nn.Module, *, channels_last: bool) -> dict[str, Any]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = module.eval().to(memory_format=layout)
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=layout)
    with torch.inference_mode():
        witness = InferenceWitness(module, compiled=False)
        return witness.observe(lambda: module(images))


def told_of(name: str, seen: dict[str, Any], **fields: Any) -> list[str]:
    config = TrainConfig(model=of(name), precision="fp32", **fields)
    return inference_mismatches(config, seen, seen, compiled=False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny"])
def test_depthwise_convolutions_do_not_hide_the_layout(name: str, channels_last: bool) -> None:
    seen = observed(build_model(of(f"torchvision:{name}")), channels_last=channels_last)
    assert seen["weight_channels_last"] is channels_last
    assert told_of(f"torchvision:{name}", seen, channels_last=channels_last) == []
    other = told_of(f"torchvision:{name}", seen, channels_last=not channels_last)
    assert len(other) == 1 and other[0].startswith("weight_channels_last: ")


def test_a_network_without_convolutions_is_observed_in_a_linear_layer() -> None:
    layers = nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 10)
    seen = observed(nn.Sequential(*layers), channels_last=False)
    assert (seen["input_dtype"], seen["weight_dtype"]) == ("float32", "float32")
    assert seen["input_channels_last"] == UNOBSERVED
    assert told_of("timm:mixer", seen) == []
    with torch.autocast("cpu", torch.bfloat16):
        seen = observed(nn.Sequential(*layers), channels_last=False)
    assert (seen["input_dtype"], seen["weight_dtype"]) == ("bfloat16", "bfloat16")
    assert told_of("timm:mixer", seen) == [
        "autocast: bfloat16 where off was asked",
        "input_dtype: bfloat16 where float32 was asked",
        "weight_dtype: bfloat16 where float32 was asked",
    ]


def cell(name: str, **recipe: Any) -> Cell:
    return Cell(train=TrainConfig(model=of(name), recipe=Recipe(**recipe), precision="fp32"))


def test_a_cell_is_known_by_its_library_and_its_size_and_can_be_estimated() -> None:
    small, large = cell("torchvision:resnet50-r112"), cell("torchvision:resnet50-r224")
    assert large.label == "torchvision:resnet50-r224 fp32 b128"
    assert large.slug == "torchvision-resnet50-r224-fp32-b128"
    protocol = Protocol(train_samples=100_000, inference_batch_sizes=())
    seconds = [estimate_seconds(each, protocol, host="nowhere") for each in (small, large)]
    assert seconds[1] - 10 == pytest.approx(4 * (seconds[0] - 10))


def test_a_cell_has_steps_of_one_kind() -> None:
    frozen = cell("resnet18", frozen_epochs=1)

    def suite(protocol: Protocol) -> Suite:
        return Suite(name="s", description="", plans=(Plan(protocol=protocol, cells=(frozen,)),))

    with pytest.raises(ConfigError, match="frozen-epochs: 1: its steps cost less than the later"):
        expand(suite(Protocol()))
    assert expand(suite(trial_protocol())), "nothing of a search's trial is timed"
