import math
from typing import Any

import pytest
import torch
from torch import nn
from training import ROOT, finish, start

from cifar.config import Recipe
from cifar.errors import ConfigError
from cifar.muon import orthogonalized
from cifar.optim import (
    WeightAverage,
    build_optimizer,
    eager,
    lr_at,
    parameter_groups,
    schedule_momentum,
    set_lr,
)
from cifar.roles import Roles


def rates(total: int, steps_per_epoch: int, **fields: object) -> list[float]:
    recipe = Recipe(**{"lr": 1.0, "epochs": 10, **fields})
    return [lr_at(step, total, steps_per_epoch, recipe) for step in range(total)]


def test_cosine_by_hand() -> None:
    expected = [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]
    assert rates(4, 2, schedule="cosine") == pytest.approx(expected)


def test_cosine_with_a_warmup_of_half_an_epoch_by_hand() -> None:
    expected = [0.5, 1.0, 1.0, 0.75, 0.25]
    assert rates(5, 4, schedule="cosine", warmup_epochs=0.5) == pytest.approx(expected)


def test_constant_with_warmup_by_hand() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(6, 4, schedule="constant", warmup_epochs=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("total", [2, 10, 37, 1000])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_one_cycle_is_pytorch_s(total: int, optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, schedule="one-cycle", lr=0.3, momentum=0.95)
    module = net()
    mine = build_optimizer(module, recipe)
    theirs = build_optimizer(module, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.3, total_steps=total)
    for step in range(total):
        schedule_momentum(mine, step, total, recipe)
        (group,), (expected,) = mine.param_groups, theirs.param_groups
        assert lr_at(step, total, 5, recipe) == pytest.approx(expected["lr"])
        for name in ("betas", "momentum"):
            assert group.get(name, ()) == pytest.approx(expected.get(name, ()))
        theirs.step()
        schedule.step() if step + 1 < total else None


def test_one_cycle_leaves_the_momentum_of_muon_s_convolutions() -> None:
    recipe = Recipe(optimizer="muon", schedule="one-cycle", momentum=0.9, muon_momentum=0.6)
    optimizer = build_optimizer(net(), recipe)
    schedule_momentum(optimizer, 299, 1000, recipe)
    momenta = {
        group["relative_step"] is None: group["momentum"] for group in optimizer.param_groups
    }
    assert momenta == {False: 0.6, True: pytest.approx(0.8)}


def test_a_momentum_that_one_cycle_would_bring_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"momentum: 0\.1: one-cycle lowers it by 0\.1"):
        Recipe(schedule="one-cycle", momentum=0.1)


def test_triangle_rises_for_a_tenth_of_the_steps_then_falls_in_a_line() -> None:
    found = rates(20, 5, schedule="triangle")
    assert found == pytest.approx([1 / 2, 1.0, *(1 - step / 18 for step in range(18))])


def test_linear_with_warmup_by_hand() -> None:
    found = rates(6, 4, schedule="linear", warmup_epochs=0.5)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_step_divides_by_ten_after_a_half_and_three_quarters() -> None:
    assert rates(8, 4, schedule="step") == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    found = rates(6, 4, schedule="step", warmup_epochs=0.5)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.1, 0.01])


@pytest.mark.parametrize(
    "schedule", ["cosine", "linear", "step", "one-cycle", "triangle", "constant"]
)
@pytest.mark.parametrize("total", [1, 2, 3, 1000])
def test_every_learning_rate_is_positive_and_at_most_the_highest(schedule: str, total: int) -> None:
    found = rates(total, total, schedule=schedule)
    assert all(0 < lr <= 1 for lr in found)
    assert max(found) == 1.0 or total < 4


@pytest.mark.parametrize(
    "fields", [{"schedule": "one-cycle"}, {"schedule": "triangle"}, {"epochs": 1}]
)
def test_a_warmup_that_would_be_ignored_or_never_end_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"warmup-epochs: 2\.0"):
        Recipe(**{"schedule": "cosine", "warmup_epochs": 2.0, **fields})


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_norms_and_biases_decay_or_do_not_as_the_recipe_says() -> None:
    module = net()
    (everything,) = parameter_groups(module, Recipe(weight_decay=0.1))
    assert len(everything["params"]) == 5 and everything["weight_decay"] == 0.1
    decayed, bare = parameter_groups(module, Recipe(weight_decay=0.1, decay_norm_and_bias=False))
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3), (2, 4)]
    assert [p.shape for p in bare["params"]] == [(4,), (4,), (2,)]
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_parameters_with_a_role_learn_faster_and_decay_no_faster_by_hand(optimizer: str) -> None:
    """Two steps at gradients of 1 from ones, the second at half of the rate."""

    def by_hand(rate: float, decay: float) -> float:
        weight, velocity = 1.0, 0.0
        for lr in (0.1 * rate, 0.05 * rate):
            velocity = 0.5 * velocity + 1.0 + decay * weight
            weight -= lr * velocity
        return weight

    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 1))
    rules = {"backbone_lr": 0.5, "head_lr": 0.25, "norm_bias_lr": 4.0}
    recipe = Recipe(optimizer=optimizer, lr=0.1, momentum=0.5, nesterov=False, weight_decay=0.2,
                    **rules)  # fmt: skip
    optimizer_ = build_optimizer(
        module, recipe, Roles(head={"2.weight", "2.bias"}, norm_biases={"1.bias"})
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.ones_like(parameter)
    for lr in (0.1, 0.05):
        set_lr(optimizer_, lr)
        optimizer_.step()
    found = {name: parameter.item() for name, parameter in module.named_parameters()}
    plain, head = by_hand(0.5, 0.2), by_hand(0.25, 0.8)
    assert found == pytest.approx(
        {
            "0.weight": plain,
            "0.bias": plain,
            "1.weight": plain,
            "1.bias": by_hand(2.0, 0.05),
            "2.weight": head,
            "2.bias": head,
        }
    )


def test_frozen_parameters_are_left_out() -> None:
    module = net()
    module[0].requires_grad_(False)
    (group,) = parameter_groups(module, Recipe())
    assert len(group["params"]) == 4


def stepped(recipe: Recipe, gradients: list[float], start: float = 1.0) -> float:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(start)
    optimizer = build_optimizer(module, recipe)
    for gradient in gradients:
        module.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    return float(module.weight.detach())


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_by_hand(nesterov: bool) -> None:
    weight, velocity = 1.0, 0.0
    for gradient in (0.5, -0.25, 1.0):
        decayed = gradient + 0.01 * weight
        velocity = 0.9 * velocity + decayed
        weight -= 0.1 * (decayed + 0.9 * velocity if nesterov else velocity)
    recipe = Recipe(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    assert stepped(recipe, [0.5, -0.25, 1.0]) == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_by_hand(name: str) -> None:
    """Adam's decay is part of the gradient, AdamW's shrinks the weight."""
    weight, first, second = 1.0, 0.0, 0.0
    for step, raw in enumerate((0.5, -0.25, 1.0), start=1):
        gradient = raw + 0.1 * weight if name == "adam" else raw
        if name == "adamw":
            weight *= 1 - 0.01 * 0.1
        first, second = 0.8 * first + 0.2 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, root = first / (1 - 0.8**step), math.sqrt(second / (1 - 0.999**step))
        weight -= 0.01 * mean / (root + 1e-8)
    recipe = Recipe(optimizer=name, lr=0.01, momentum=0.8, weight_decay=0.1)
    assert stepped(recipe, [0.5, -0.25, 1.0]) == pytest.approx(weight, rel=1e-6)


def test_the_average_by_hand_with_its_warmup() -> None:
    weights = {"weight": torch.tensor([1.0]), "steps": torch.tensor(0)}
    average = WeightAverage(weights, decay=0.2)
    expected = 1.0
    for update, value in enumerate((3.0, -1.0, 5.0), start=1):
        weights["weight"].fill_(value)
        weights["steps"] += 10
        average.update()
        decay = min(0.2, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert (1 + 1) / (10 + 1) < 0.2 < (1 + 2) / (10 + 2), "both sides of the warm-up are covered"
    assert float(average.weights["weight"]) == pytest.approx(expected)
    assert int(average.weights["steps"]) == 30


def test_the_average_is_a_copy() -> None:
    weights = {"weight": torch.ones(2)}
    average = WeightAverage(weights, decay=0.9)
    weights["weight"].zero_()
    assert torch.equal(average.weights["weight"], torch.ones(2))


def test_an_overflow_in_the_first_fp16_step_leaves_the_momentum_clean() -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    module = torch.nn.Module()
    module.weight = weight
    optimizer = build_optimizer(module, Recipe(lr=0.1, weight_decay=0.0))
    weight.grad = torch.full((5,), torch.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.zeros(5))
    assert torch.equal(weight, torch.ones(5))


def muon_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 40, 3, bias=False), nn.Linear(40, 2),
    )  # fmt: skip


MUON = {"optimizer": "muon", "lr": 0.2, "muon_step": 0.05, "muon_momentum": 0.5}


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_singular_vectors_stay_and_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((4, 9), (9, 4)):
        u, _ = torch.linalg.qr(torch.randn(2, rows, 4, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(2, columns, 4, generator=generator))
        values = torch.tensor([3.0, 2.0, 0.6, 0.3])
        found = orthogonalized(100 * u @ torch.diag(values) @ v.mT)
        core = u.mT @ found @ v
        assert torch.allclose(u @ core @ v.mT, found, atol=1e-5)
        assert torch.allclose(core - torch.diag_embed(core.diagonal(dim1=1, dim2=2)),
                              torch.zeros(4, 4), atol=1e-5)  # fmt: skip
        assert (core.diagonal(dim1=1, dim2=2) - 1).abs().max() < 0.5
    assert torch.equal(orthogonalized(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def quintics(value: float) -> float:
    """What becomes of a singular value."""
    for _ in range(4):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def test_a_matrix_of_one_row_becomes_a_direction() -> None:
    """Its only singular value is its length: 1 after the division."""
    value = quintics(1.0)
    found = orthogonalized(torch.tensor([[[3.0, 4.0]]]))
    assert found.flatten().tolist() == pytest.approx([0.6 * value, 0.8 * value], rel=1e-4)


def test_muon_turns_a_convolution_by_the_relative_step_and_keeps_its_length() -> None:
    module = muon_net()
    optimizer = build_optimizer(module, Recipe(**MUON))
    for seed, lr in enumerate((0.2, 0.1)):  # the schedule's highest rate, then half of it
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = [each.detach().clone() for each in module.parameters() if each.ndim == 4]
        give_gradients(module, seed)
        optimizer.step()
        after = [each.detach() for each in module.parameters() if each.ndim == 4]
        for old, new in zip(before, after, strict=True):
            assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-5)
            cosine = float((old * new).sum() / old.norm() / new.norm())
            # At a right angle the step's tangent is the relative step; random ones are nearly so.
            assert math.tan(math.acos(cosine)) == pytest.approx(0.05 * lr / 0.2, rel=0.1)


def test_muon_by_hand_on_one_direction() -> None:
    """A matrix of one row steps along its momentum, whatever the length of that."""
    module = nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))
    optimizer = build_optimizer(module, Recipe(**MUON))
    velocity, weight = torch.zeros(2), torch.tensor([2.0, 0.0])
    for gradient in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
        velocity = 0.5 * velocity + gradient
        direction = gradient + 0.5 * velocity
        moved = weight - 0.05 * 2.0 * direction / direction.norm()
        weight = 2.0 * moved / moved.norm()
        module.weight.grad = gradient.view(1, 2, 1, 1)
        optimizer.step()
    assert module.weight.detach().flatten().tolist() == pytest.approx(weight.tolist(), rel=1e-4)


def test_muon_by_hand_on_two_directions() -> None:
    """Of a gradient four times as long in one of them the step is about as long in both."""
    module = nn.Conv2d(2, 2, 1, bias=False)
    weight = torch.tensor([[1.0, 2.0], [0.0, -2.0]])  # of length 3
    with torch.no_grad():
        module.weight.copy_(weight.view(2, 2, 1, 1))
    module.weight.grad = torch.tensor([[0.4, 0.0], [0.0, 0.1]]).view(2, 2, 1, 1)
    build_optimizer(module, Recipe(**MUON)).step()
    one, other = (quintics(value / math.sqrt(17)) for value in (4.0, 1.0))
    assert 0.5 < one / other < 2
    step = torch.tensor([[one, 0.0], [0.0, other]]) * 0.05 * 3 / math.hypot(one, other)
    moved = weight - step
    expected = 3 * moved / moved.norm()
    torch.testing.assert_close(module.weight.detach().view(2, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decays", [True, False])
def test_muon_is_sgd_for_all_but_convolutions(decays: bool) -> None:
    fields = {"weight_decay": 0.1, "decay_norm_and_bias": decays}
    found = {}
    for optimizer in ("muon", "sgd"):
        module = muon_net()
        built = build_optimizer(module, Recipe(**{**MUON, **fields, "optimizer": optimizer}))
        for seed in range(3):
            give_gradients(module, seed)
            built.step()
        found[optimizer] = {n: p.detach() for n, p in module.named_parameters() if p.ndim != 4}
    assert len(found["sgd"]) == 4
    for name, expected in found["sgd"].items():
        assert torch.allclose(found["muon"][name], expected, rtol=1e-5, atol=1e-6), name


def test_muon_does_not_depend_on_the_layout_and_leaves_what_has_no_gradient() -> None:
    plain, nhwc = muon_net(), muon_net().to(memory_format=torch.channels_last)
    frozen = plain[1].weight.detach().clone()
    for module in (plain, nhwc):
        optimizer = build_optimizer(module, Recipe(**MUON))
        for seed in range(2):
            give_gradients(module, seed)
            module[1].weight.grad = None
            optimizer.step()
    assert torch.equal(plain[1].weight, frozen)
    for one, other in zip(plain.parameters(), nhwc.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert nhwc[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {}),
    ],
)
def test_an_eager_optimizer_steps_as_torch_s_own(cls: type, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(4, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for module, made in ((ours, eager(cls)), (theirs, cls)):
        optimizer = made(module.parameters(), lr=0.1, fused=True, **options)
        for step in range(4):
            optimizer.zero_grad()
            (module(torch.full((2, 4), step + 1.0)) ** 2).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        assert isinstance(optimizer, cls)
        assert all(parameter.grad is not None for parameter in module.parameters())
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)


LIGHT = """
import sys
from training import make_trainer, tiny_recipe
from cifar.training_state import load_state, state_of
for optimizer in ("sgd", "adam", "adamw", "muon"):
    trainer = make_trainer(tiny_recipe(optimizer=optimizer, ema_decay=0.9))
    trainer.train_step()
    trainer.check()
    trainer.evaluate()
    load_state(trainer, *state_of(trainer))
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()))
"""


def test_eager_training_does_not_wait_for_the_compiler_to_be_imported() -> None:
    here = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert finish(start("-c", LIGHT, module=False, environment=here))[:2] == (0, "[]\n")
