import pytest

from cifar.config import Recipe
from cifar.errors import ConfigError
from cifar.recipes import RECIPES, get_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_bears_its_name_and_tells_its_source(name: str) -> None:
    recipe = get_recipe(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    assert "http" in (RECIPES[name].__doc__ or "") and "Cost:" in (RECIPES[name].__doc__ or "")


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"recipe: 'fast': choose one of .*default"):
        get_recipe("fast")
