"""Rules of their own for the classifier and for BatchNorms."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import make_trainer, tiny_recipe

from cifar.config import ModelConfig, Recipe
from cifar.data.loader import TrainBatch
from cifar.errors import ConfigError, UnsupportedError
from cifar.roles import Roles, assign_roles
from cifar.trainer import Trainer

TINY = ModelConfig(name="resnet9", width=4)


def trained(steps: int, compute_loss: Any = None, **fields: Any) -> tuple[Trainer, list[float]]:
    """A trainer after so many steps, and their losses."""
    recipe = tiny_recipe(**{"momentum": 0.9, "weight_decay": 0.01, **fields})
    own = {"compute_loss": compute_loss}
    trainer = make_trainer(recipe, model=TINY, trainer=own)
    losses = []
    for _ in range(steps):
        trainer.meter.reset()
        trainer.train_step()
        losses.append(trainer.meter.train_metrics().loss)
    return trainer, losses


def a_sixteenth(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    logits = model(batch.images) / 16
    return F.cross_entropy(logits, batch.targets), logits


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_head_with_its_own_rate_learns_as_if_its_answers_were_scaled(optimizer: str) -> None:
    """Bit for bit, for a power of two: what Page's network has instead."""
    scaled, expected = trained(4, a_sixteenth, optimizer=optimizer)
    own, found = trained(4, optimizer=optimizer, head_lr=1 / 256)
    assert found == expected
    weights = scaled.weights()
    for name, tensor in own.weights().items():
        factor = 1 / 16 if name.startswith("fc.") else 1
        assert torch.equal(tensor, factor * weights[name]), name
    assert trained(4, optimizer=optimizer)[1] != expected


@pytest.mark.parametrize("fields", [{"optimizer": "adamw", "lr": 0.01}, {"optimizer": "muon"},
                                    {"sam_rho": 0.5}, {"frozen_epochs": 1}])  # fmt: skip
def test_norms_whose_weights_are_not_trained_keep_them(fields: dict[str, Any]) -> None:
    """Also while SAM looks around."""
    seen: list[Tensor] = []

    def watched(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        seen.append(trainer.module.get_parameter("bn1.weight").detach().clone())
        logits = model(batch.images)
        return F.cross_entropy(logits, batch.targets), logits

    trainer = make_trainer(
        tiny_recipe(train_norm_scale=False, **fields),
        model=TINY,
        trainer={"compute_loss": watched},
    )
    for _ in range(5):
        trainer.train_step()
    assert all(torch.equal(each, torch.ones(4)) for each in seen)
    weights = trainer.weights()
    assert torch.equal(weights["layer1.branch.bn2.weight"], torch.ones(8))
    assert not torch.equal(weights["bn1.bias"], torch.zeros(4))


def test_only_the_rules_that_there_are_ask_for_the_head() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    assert assign_roles(module, TINY, Recipe()) == Roles(
        head=frozenset(), norm_biases=frozenset({"1.bias"})
    )
    named = assign_roles(nn.ModuleDict({"fc": nn.Linear(1, 1)}), TINY, Recipe(head_lr=4.0))
    assert named.head == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm_bias_lr": 8.0}, "norm-bias-lr: 8.0: resnet9 has no BatchNorm; leave it out"),
        ({"train_norm_scale": False}, "train-norm-scale: False: resnet9 has no BatchNorm"),
    ],
)
def test_a_network_without_norms_has_no_rule_for_them(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        assign_roles(nn.Linear(2, 2), TINY, Recipe(**fields))


@pytest.mark.parametrize("name", ["head_lr", "norm_bias_lr"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_multiple_that_is_none_is_refused(name: str, value: float) -> None:
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{option}: {value}: give a positive number"):
        Recipe(**{name: value})
