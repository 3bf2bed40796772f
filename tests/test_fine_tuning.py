"""Epochs for the classifier alone, and the rest's share of the learning rate."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_trainer import assert_equal, weights_of
from torch import Tensor, nn
from training import TINY_OPTIONS, finish, make_trainer, start, tiny_recipe

from cifar.checkpoint import load_weights
from cifar.config import ModelConfig
from cifar.fine_tuning import Backbone
from cifar.models import build_model
from cifar.optim import build_optimizer, lr_at, optimizer_tensors, set_lr
from cifar.roles import Roles
from cifar.trainer import Trainer
from cifar.training_state import load_state, set_aside, state_of

HEAD = ("fc.weight", "fc.bias")
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "decay": {"weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "muon": {"optimizer": "muon"},
    "average": {"ema_decay": 0.9},
    "sam": {"sam_rho": 0.1},
    "clipped": {"clip_norm": 0.1},
    "mixed": {"mixup": 0.5},
    "share": {"backbone_lr": 0.1},
}
recipes = pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES.keys())


def fine_tuner(fields: dict[str, Any] | None = None, **config: Any) -> Trainer:
    """One epoch of three steps for the classifier alone, then one for everything."""
    return make_trainer(tiny_recipe(frozen_epochs=1, **(fields or {})), **config)


def changed(trainer: Trainer, before: dict[str, Tensor]) -> set[str]:
    now = trainer.weights()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


@recipes
def test_only_the_head_changes_at_first_and_then_everything(fields: dict[str, Any]) -> None:
    check_phases(fine_tuner(fields))


@pytest.mark.parametrize("config", [{"accumulation_steps": 2}, {"precision": "bf16"}])
def test_so_it_is_in_parts_and_in_another_precision(config: dict[str, Any]) -> None:
    check_phases(fine_tuner(**config))


def check_phases(trainer: Trainer) -> None:
    before = weights_of(trainer)
    for step in range(3):
        trainer.train_step()
        assert changed(trainer, before) == set(HEAD)
        if step == 1:
            trainer.evaluate()  # which puts the norms into another mode
    without = [name for name, each in trainer.module.named_parameters() if each.grad is None]
    assert set(without) == {name for name, _ in trainer.module.named_parameters()} - set(HEAD)
    if trainer.average:
        averaged = trainer.average.weights
        assert all(torch.equal(averaged[name], before[name]) for name in before if name not in HEAD)
    trainer.train_step()
    assert changed(trainer, before) == set(before)


def test_the_frozen_phase_is_that_of_a_linear_model_by_hand() -> None:
    trainer = fine_tuner({"momentum": 0.0, "nesterov": False, "weight_decay": 0.0})
    body = copy.deepcopy(trainer.module)
    body.fc = nn.Identity()
    body.eval()
    weight, bias = (trainer.weights()[name].clone().requires_grad_() for name in HEAD)
    for step in range(3):
        (batch,) = trainer.loader.micro_batches(step)
        with torch.no_grad():
            features = body(batch.images)
        F.cross_entropy(features @ weight.T + bias, batch.targets).backward()
        with torch.no_grad():
            for each in (weight, bias):
                each.sub_(lr_at(step, 6, 3, trainer.config.recipe) * each.grad)
                each.grad = None
        trainer.train_step()
    torch.testing.assert_close(trainer.weights()["fc.weight"], weight.detach())
    torch.testing.assert_close(trainer.weights()["fc.bias"], bias.detach())


def test_nothing_is_recorded_for_a_backward_pass_below_the_head() -> None:
    trainer = fine_tuner()
    recorded = []
    for name, layer in trainer.module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(
                lambda _m, _i, out, name=name: recorded.append((name, out.requires_grad))
            )
    trainer.train_step()
    assert {name for name, needs in recorded if needs} == {"fc"}
    recorded.clear()
    trainer.step = 3
    trainer.train_step()
    assert all(needs for _, needs in recorded) and len(recorded) == 20


def test_without_frozen_epochs_nothing_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_config: ModelConfig) -> frozenset[str]:
        raise AssertionError

    monkeypatch.setattr("cifar.roles.head_names", never)
    make_trainer().train_step()


@recipes
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_state_of_either_phase_continues_bit_for_bit(fields: dict[str, Any], steps: int) -> None:
    straight, saved, resumed = (fine_tuner(fields) for _ in range(3))
    for _ in range(6):
        straight.train_step()
    for _ in range(steps):
        saved.train_step()
    tensors, counters = state_of(saved)
    stored = {
        group: {name: tensor.clone() for name, tensor in some.items()}
        for group, some in tensors.items()
    }
    load_state(resumed, stored, counters)
    for _ in range(6 - steps):
        resumed.train_step()
    assert_equal(resumed.weights(), straight.weights())
    assert_equal(resumed.eval_weights(), straight.eval_weights())
    assert_equal(optimizer_tensors(resumed.optimizer), optimizer_tensors(straight.optimizer))


def test_steps_that_are_undone_leave_the_phase_as_it_was() -> None:
    trainer, other = fine_tuner(), fine_tuner()
    with set_aside(trainer):
        for _ in range(4):
            trainer.train_step()
    for each in (trainer, other):
        for _ in range(6):
            each.train_step()
    assert_equal(trainer.weights(), other.weights())


def test_compiled_code_follows_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded by torch's compiler, and run eagerly."""
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr("cifar.accelerator.check_compiler", lambda _kind: None)
    eager, trainer = fine_tuner(), None
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    trainer = fine_tuner(compile=True)
    assert trainer.model is not trainer.module
    for _ in range(5):
        eager.train_step()
        trainer.train_step()
    torch.testing.assert_close(trainer.weights(), eager.weights())


def test_a_share_of_the_learning_rate_by_hand() -> None:
    recipe = tiny_recipe(
        backbone_lr=0.25, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant"
    )
    trainer = make_trainer(recipe)
    model = copy.deepcopy(trainer.module)
    (batch,) = trainer.loader.micro_batches(0)
    F.cross_entropy(model(batch.images), batch.targets).backward()
    trainer.train_step()
    for name, weight in trainer.module.named_parameters():
        before = model.get_parameter(name)
        rate = 0.05 if name in HEAD else 0.0125
        torch.testing.assert_close(weight, before - rate * before.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_every_parameter_is_in_one_group_with_its_share(optimizer: str) -> None:
    module = build_model(ModelConfig(name="resnet20", width=4))
    recipe = tiny_recipe(backbone_lr=0.25, optimizer=optimizer, decay_norm_and_bias=False)
    made = build_optimizer(module, recipe, Roles(head=HEAD))
    set_lr(made, 0.8)
    rates = {p: group["lr"] for group in made.param_groups for p in group["params"]}
    assert len(rates) == len(list(module.parameters()))
    assert sum(len(group["params"]) for group in made.param_groups) == len(rates)
    for name, parameter in module.named_parameters():
        assert rates[parameter] == (0.8 if name in HEAD else 0.2)
    decays = {p: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decays[module.fc.weight] == 5e-4 and decays[module.fc.bias] == 0


def test_what_never_needed_a_gradient_needs_none_afterwards() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    backbone = Backbone(module, {"2.weight", "2.bias"})
    backbone.freeze(True)
    assert [each.weight.requires_grad for each in module] == [False, False, True]
    backbone.freeze(False)
    assert [each.weight.requires_grad for each in module] == [False, True, True]


FOLLOWED = """
import sys
import torch
from cifar.commands import main
from cifar.distributed import gather
from cifar.trainer import Trainer
original = Trainer.train_step
def train_step(self):
    original(self)
    sums = [float(each.double().sum()) for each in self.module.parameters()]
    first, second = gather(sums, self.device)
    moved = [float((each.grad is not None) and each.grad.abs().sum() > 0)
             for each in self.module.parameters()]
    if self.is_main:
        print("step", self.step, first == second, int(sum(moved)), flush=True)
Trainer.train_step = train_step
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_stay_together_in_both_phases(npz: Path, tmp_path: Path) -> None:
    """And the classifier alone learns as in one: no statistics of a batch come between."""
    (tmp_path / "followed.py").write_text(FOLLOWED)
    words = ("train", "--cpu", *TINY_OPTIONS, "--data", f"npz:{npz}", "--precision", "bf16")
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                    tmp_path / "followed.py", *words, "--frozen-epochs", 1, "--output-dir",
                    tmp_path / "two", environment={"CIFAR_RESTARTED": "1"})  # fmt: skip
    code, out, err = finish(process)
    assert code == 0, err
    told = [line.split()[1:] for line in out.splitlines() if line.startswith("step ")]
    assert told == [
        *([str(step), "True", "2"] for step in (1, 2, 3)),
        *([str(step), "True", "59"] for step in (4, 5, 6)),
    ]
    weights = []
    for processes in (1, 2):
        folder = tmp_path / f"of-{processes}"
        process = start("torch.distributed.run", "--standalone", "--nproc_per_node", processes,
                        "-m", "cifar", "train", "--cpu", *TINY_OPTIONS, "--data", f"npz:{npz}",
                        "--epochs", 1, "--frozen-epochs", 1, "--output-dir", folder)  # fmt: skip
        code, _, err = finish(process)
        assert code == 0, err
        weights.append(load_weights(folder)[1])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
