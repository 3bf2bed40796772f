"""Which parameters of a network a recipe trains otherwise than the rest, or not at all."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar.config import ModelConfig, Recipe, option_name
from cifar.errors import UnsupportedError
from cifar.models.meta import head_names


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Names of parameters that may have rules of their own.

    `head`: the classifier's, empty where the recipe trains it as the rest; `norm_biases`: those of
    BatchNorms.
    """

    head: Collection[str] = ()
    norm_biases: Collection[str] = ()


def assign_roles(module: nn.Module, config: ModelConfig, recipe: Recipe) -> Roles:
    """What of a fresh network is whose; BatchNorm's weights are frozen where they stay as they are.

    The first weights of a classifier with a learning rate of its own are multiplied by the root of
    its multiple: all is then as if its answers were, see `Recipe.head_lr`.

    Raises:
        UnsupportedError: the recipe has a rule for BatchNorms and the network has none.
    """
    norms = {name: each for name, each in module.named_modules() if _is_trained_norm(each)}
    for field, neutral in (("norm_bias_lr", 1.0), ("train_norm_scale", True)):
        value = getattr(recipe, field)
        if value != neutral and not norms:
            raise UnsupportedError(
                f"{option_name(field)}: {value}: {config.name} has no BatchNorm; leave it out"
            )
    if not recipe.train_norm_scale:
        for norm in norms.values():
            norm.get_parameter("weight").requires_grad_(False)
    head = head_names(config) if _tells_head_apart(config, recipe) else frozenset()
    if recipe.head_lr != 1:
        with torch.no_grad():
            for name in head:
                module.get_parameter(name).mul_(recipe.head_lr**0.5)
    return Roles(head=head, norm_biases=frozenset(f"{name}.bias" for name in norms))


def _is_trained_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.affine


def _tells_head_apart(config: ModelConfig, recipe: Recipe) -> bool:
    """Whether the classifier is trained otherwise; ours is linear, which Muon leaves alone."""
    convolution = recipe.optimizer == "muon" and bool(config.library)
    return recipe.frozen_epochs > 0 or recipe.backbone_lr != 1 or recipe.head_lr != 1 or convolution
