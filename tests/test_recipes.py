from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import make_dataset, save_npz
from safetensors.torch import save_file
from test_report import PICTURES, TABLES
from training import cifar

from cifar.config import Pretrained, Recipe
from cifar.cost import param_count
from cifar.errors import ConfigError
from cifar.recipes import RECIPES, from_scratch, get_config, get_recipe
from cifar.run_folder import read_config
from cifar.train_options import read_train_options


def parameters(*words: str) -> int:
    return param_count(read_train_options(list(words)).train.model)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ((), 11_173_962),
        (("--recipe", "resnet18-jitter"), 11_173_962),
        (("--recipe", "resnet9-one-cycle"), 6_574_090),
        (("--recipe", "resnet9-one-cycle", "--model", "resnet20"), 269_722),
    ],
)
def test_a_recipe_brings_its_model_unless_another_is_named(
    words: tuple[str, ...], count: int
) -> None:
    assert parameters(*words) == count


@pytest.mark.parametrize(
    ("recipe", "published"),
    [("resnet50-small", 4_815_794), ("resnet34-small", 4_348_082), ("resnet26-small", 4_196_906)],
)
def test_the_small_nets_have_within_a_hundredth_the_published_parameters(
    recipe: str, published: int
) -> None:
    assert parameters("--recipe", recipe) == pytest.approx(published, rel=0.01)


def test_our_small_net_keeps_to_the_budget_of_five_million_parameters() -> None:
    assert parameters("--recipe", "resnet34-muon-small") == 4_999_163


def test_a_model_s_width_does_not_stay_behind_when_another_is_named() -> None:
    words = ["--recipe", "resnet50-small"]
    assert read_train_options(words).train.model.label == "resnet50-w29-d0.2"
    other = read_train_options([*words, "--model", "resnet34-w29"]).train
    assert other.model.label == "resnet34-w29-d0.2"
    assert read_train_options([*words, "--model", "resnet18"]).train.model.width is None
    assert other.recipe.epochs == 300


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("torchvision:resnet18", "torchvision:resnet18-r224-d0.2-pretrained"),
        ("timm:resnet18.a1_in1k-r160", "timm:resnet18.a1_in1k-r160-d0.2-pretrained"),
        ("resnet20", "resnet20-d0.2"),
    ],
)
def test_another_library_s_network_is_fine_tuned_from_its_default_weights(
    model: str, label: str
) -> None:
    words = ["--recipe", "resnet50-finetune"]
    own = read_train_options(words).train.model
    assert own.label == "torchvision:resnet50-r224-d0.2-pretrained"
    assert own.pretrained == Pretrained(name="IMAGENET1K_V1")
    pytest.importorskip(model.partition(":")[0]) if ":" in model else None
    other = read_train_options([*words, "--model", model]).train.model
    assert other.label == label
    assert other.pretrained == (Pretrained(name="imagenet") if ":" in model else None)


SMALL: dict[str, Any] = {
    "optimizer": "sgd", "nesterov": True, "momentum": 0.9, "lr": 0.1, "weight_decay": 5e-4,
    "global_batch_size": 64, "schedule": "cosine", "warmup_epochs": 0.0, "label_smoothing": 0.1,
    "augment": ("crop", "flip"), "crop_padding": 4, "dropout": 0.2,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "resnet18-jitter": {
        "label": "resnet18", "precision": "bf16", "label_smoothing": 0.1, "schedule": "cosine",
        "augment": ("crop", "flip", "color-jitter", "rotate"), "crop_padding": 4,
        "crop_fill": "black", "rotate_degrees": 15.0,
    },
    "resnet50-small": {**SMALL, "label": "resnet50-w29-d0.2", "epochs": 300},
    "resnet34-small": {**SMALL, "label": "resnet34-w29-d0.2", "epochs": 200},
    "resnet26-small": {**SMALL, "label": "resnet26-w35-d0.2", "epochs": 100},
    "resnet9-one-cycle": {
        "label": "resnet9", "optimizer": "adam", "global_batch_size": 512, "epochs": 24,
        "schedule": "one-cycle", "momentum": 0.95, "augment": ("crop", "flip"), "crop_padding": 4,
        "label_smoothing": 0.0,
    },
    "resnet50-finetune": {
        "label": "torchvision:resnet50-r224-d0.2-pretrained", "optimizer": "sgd",
        "schedule": "step", "augment": ("crop", "flip"), "pretrained": "IMAGENET1K_V1",
    },
}  # fmt: skip
"""What is published of the projects, and what theirs must have been where it is not."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_what_its_project_published(name: str) -> None:
    config = get_config(name)
    has = {
        **asdict(config.recipe),
        "label": config.model.label,
        "dropout": config.model.dropout,
        "precision": config.precision,
        "pretrained": config.model.pretrained and config.model.pretrained.name,
    }
    assert {field: has[field] for field in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_from_one_command_with_all_of_its_outputs(
    name: str, tmp_path: Path
) -> None:
    """On a few small images; what is fine-tuned from weights in a file of its own."""
    words: list[object] = []
    if (model := get_config(name).model).pretrained:
        torchvision = pytest.importorskip("torchvision")
        weights = tmp_path / "weights.safetensors"
        save_file(torchvision.models.resnet50().state_dict(), weights)
        words = ["--model", "torchvision:resnet50-r64", "--pretrained", weights]
        assert model.label.startswith("torchvision:resnet50")
    data = save_npz(tmp_path / "images.npz", make_dataset(train=64, test=20, size=32))
    run = tmp_path / "run"
    assert (
        cifar("train", "--cpu", "--recipe", name, *words, "--data", f"npz:{data}", "-b", 32,
              "--epochs", 1, "--limit-train", 64, "--output-dir", run) == 0
    )  # fmt: skip
    assert {path.name for path in (run / "report").iterdir()} == PICTURES | TABLES
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "final"}
    assert read_config(run).train.recipe.name == name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "resnet20"), "resnet20-d0.2 starts from random ones"),
        (("--model", "torchvision:resnet18"), ""),
        ((), ""),
    ],
)
def test_a_recipe_for_pretrained_weights_says_where_there_are_none(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = read_train_options(["--recipe", "resnet50-finetune", *words]).train
    note = f"recipe: 'resnet50-finetune': is for pretrained weights, and {told}" if told else ""
    assert from_scratch(train) == note
    assert capsys.readouterr().err == (f"note: {note}\n" if note else "")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_bears_its_name_and_tells_its_source(name: str) -> None:
    recipe = get_recipe(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    assert "http" in (RECIPES[name].__doc__ or "") and "Cost:" in (RECIPES[name].__doc__ or "")


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"recipe: 'fast': choose one of .*default"):
        get_recipe("fast")
