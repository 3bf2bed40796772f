import pytest

from cifar.config import Pretrained, Recipe
from cifar.cost import param_count
from cifar.errors import ConfigError
from cifar.recipes import RECIPES, get_recipe
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


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_bears_its_name_and_tells_its_source(name: str) -> None:
    recipe = get_recipe(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    assert "http" in (RECIPES[name].__doc__ or "") and "Cost:" in (RECIPES[name].__doc__ or "")


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"recipe: 'fast': choose one of .*default"):
        get_recipe("fast")
