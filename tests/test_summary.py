"""The layer table, held against torch's own counters and against measured receptive fields."""

import csv
import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cifar import cost
from cifar.architectures import ARCHITECTURES
from cifar.config import ModelConfig
from cifar.errors import ConfigError
from cifar.models import build_model
from cifar.models.summary import print_summary, render_summary, summarize_model

QUICK = [name for name in ARCHITECTURES if name != "resnet1202"]
OPTIONS = [{}, {"width": 24, "squeeze_excitation": True}]


def counted_by_torch(config: ModelConfig, image_size: tuple[int, int]) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_model(config).eval()(torch.empty(1, config.in_channels, *image_size))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (33, 50)])
def test_multiply_adds_are_torch_s(name: str, options: dict, size: tuple[int, int]) -> None:
    config = ModelConfig(name=name, **options)
    expected = counted_by_torch(config, size)
    assert summarize_model(config, size).multiply_adds == expected
    assert cost.multiply_adds(config, size) == expected


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("options", OPTIONS)
def test_arithmetic_agrees_with_the_summary(name: str, options: dict) -> None:
    config = ModelConfig(name=name, num_classes=100, in_channels=1, **options)
    summary = summarize_model(config, (17, 40))
    assert summary.multiply_adds == cost.multiply_adds(config, (17, 40))
    assert summary.param_count == cost.param_count(config)


def test_arithmetic_agrees_for_1202_layers() -> None:
    config = ModelConfig(name="resnet1202")
    summary = summarize_model(config)
    assert summary.multiply_adds == cost.multiply_adds(config, (32, 32))
    assert summary.param_count == cost.param_count(config)


def test_known_costs() -> None:
    assert cost.multiply_adds(ModelConfig(name="resnet18"), (32, 32)) == 555_422_720
    assert cost.multiply_adds(ModelConfig(name="resnet20"), (32, 32)) == 40_551_040


@pytest.mark.parametrize("name", ["resnet50", "resnet20"])
def test_layers_add_up_to_the_totals(name: str) -> None:
    summary = summarize_model(ModelConfig(name=name, squeeze_excitation=True, dropout=0.1))
    assert sum(layer.parameters for layer in summary.layers) == summary.param_count
    assert sum(layer.multiply_adds for layer in summary.layers) == summary.multiply_adds
    assert summary.trainable_bytes == 4 * summary.param_count


def test_one_row_by_hand() -> None:
    layers = {layer.name: layer for layer in summarize_model(ModelConfig(), (20, 30)).layers}
    row = layers["layer2.0.conv1"]
    assert row.kind == "conv 3x3 /2"
    assert row.output_shape == (128, 10, 15)
    assert row.receptive_field == 3 + 4 * 2 + 2  # stem, four convolutions of stage 1, this one
    assert row.parameters == 64 * 128 * 9
    assert row.multiply_adds == 64 * 128 * 9 * 10 * 15


def test_rows_are_in_the_order_of_execution() -> None:
    names = [layer.name for layer in summarize_model(ModelConfig(name="resnet18")).layers]
    block = ["conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1"]
    start = names.index("layer3.0.conv1")
    assert names[start : start + 6] == [f"layer3.0.{part}" for part in block]
    assert names[-2:] == ["avgpool", "fc"]


def measured_field(
    config: ModelConfig, layer: str, size: int, weight: float = 1.0
) -> tuple[int, int]:
    """Rows and columns of input pixels that move one central output of `layer`."""
    model = build_model(config).double().eval()
    for stage in model.modules():
        if isinstance(getattr(stage, "pool", None), nn.MaxPool2d):
            stage.pool = nn.AvgPool2d(2, ceil_mode=True)  # moved by all that it sees
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(weight)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    model.get_submodule(layer).register_forward_hook(keep)
    images = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    model(images)
    feature = outputs[0][0, 0]
    feature[feature.shape[0] // 2, feature.shape[1] // 2].backward()
    assert images.grad is not None
    touched = images.grad[0].sum(0) != 0
    return int(touched.any(1).sum()), int(touched.any(0).sum())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer1.1.bn2"),
        ("resnet18", "layer2.0.conv1"),
        ("resnet18", "layer3.0.downsample.1"),
        ("resnet18", "layer4.1.bn2"),
        ("resnet50", "layer2.0.conv1"),
        ("resnet50", "layer2.0.conv2"),
        ("resnet50", "layer3.0.downsample.0"),
        ("resnet50", "layer4.2.bn3"),
        ("resnet20", "layer1.2.conv2"),
        ("resnet20", "layer2.0.downsample"),
        ("resnet20", "layer3.0.conv1"),
        ("resnet20", "layer3.2.bn2"),
        ("resnet32", "layer3.4.bn2"),
        ("resnet9", "layer1.pool"),
        ("resnet9", "layer1.branch.bn2"),
        ("resnet9", "layer2.conv"),
        ("resnet9", "layer3.branch.bn2"),
    ],
)
def test_receptive_field_is_the_measured_one(name: str, layer: str) -> None:
    config = ModelConfig(name=name, width=1)
    rows = {row.name: row for row in summarize_model(config).layers}
    size = 192
    expected = rows[layer].receptive_field
    assert expected is not None
    assert expected < size - 16
    assert measured_field(config, layer, size) == (expected, expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_pooled_layers_see_the_whole_image(name: str) -> None:
    rows = {row.name: row.receptive_field for row in summarize_model(ModelConfig(name=name)).layers}
    assert rows["avgpool"] is None
    assert rows["fc"] is None
    assert [layer for layer, field in rows.items() if field is None] == ["avgpool", "fc"]


def test_squeeze_excitation_sees_the_whole_image() -> None:
    config = ModelConfig(name="resnet20", width=1, squeeze_excitation=True)
    rows = {row.name: row.receptive_field for row in summarize_model(config).layers}
    assert rows["layer1.0.bn2"] == 7
    assert rows["layer1.1.conv1"] is None
    assert measured_field(config, "layer1.0.bn2", 40) == (7, 7)
    # Weights of 1 would saturate the gates.
    assert measured_field(config, "layer1.1.conv1", 40, weight=0.1) == (40, 40)


def test_rows_go_into_a_csv() -> None:
    summary = summarize_model(ModelConfig(name="resnet20"))
    rows = summary.to_rows()
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    read = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert len(read) == len(summary.layers)
    assert read[0] == {
        "name": "conv1",
        "kind": "conv 3x3",
        "output_shape": "16x32x32",
        "receptive_field": "3",
        "parameters": "432",
        "multiply_adds": "442368",
    }
    assert read[-1]["receptive_field"] == "all"


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet152", "resnet110"])
def test_table_fits_80_columns_untruncated(name: str) -> None:
    text = io.StringIO()
    summary = summarize_model(ModelConfig(name=name))
    Console(file=text, width=80).print(render_summary(summary))
    lines = text.getvalue().splitlines()
    assert "…" not in text.getvalue()
    assert max(map(len, lines)) <= 80
    assert all(
        sum(line.split()[:1] == [layer.name] for line in lines) == 1 for layer in summary.layers
    )
    total = next(line for line in lines if line.startswith("Total"))
    assert total.split() == ["Total", f"{summary.param_count:,}", f"{summary.multiply_adds:,}"]


def test_print_summary(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(ModelConfig(name="resnet18", num_classes=100), (64, 48))
    printed = capsys.readouterr().out
    assert "resnet18 on 3x64x48" in printed
    assert "11,220,132" in printed
    assert "42.80 MiB" in printed


@pytest.mark.parametrize("size", [(0, 32), (32, -1)])
def test_impossible_image_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"image-size: \(.*\): give 1 pixel or more"):
        summarize_model(ModelConfig(), size)


def test_nothing_is_allocated() -> None:
    # Terabytes of weights and activations: only their table fits.
    summary = summarize_model(ModelConfig(name="resnet152", width=8192), (4096, 4096))
    assert summary.trainable_bytes > 10**12
