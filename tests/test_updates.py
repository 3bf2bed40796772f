"""SAM and clipping against steps made by hand."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import TINY, make_trainer, tiny_recipe

from cifar.trainer import Trainer
from cifar.updates import statistics_kept

RHO = 0.1
PLAIN = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "schedule": "constant"}


def loss_of(model: nn.Module, trainer: Trainer) -> Tensor:
    (batch,) = trainer.loader.micro_batches(0)
    return F.cross_entropy(model(batch.images), batch.targets)


def gradients(model: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, trainer).backward()
    return {name: each.grad.clone() for name, each in model.named_parameters()}


def test_sam_takes_the_gradient_up_the_slope() -> None:
    trainer = make_trainer(tiny_recipe(sam_rho=RHO, **PLAIN))
    model, above = copy.deepcopy(trainer.module), copy.deepcopy(trainer.module)
    here = gradients(model, trainer)
    norm = torch.sqrt(sum((each**2).sum() for each in here.values()))
    with torch.no_grad():
        for name, weight in above.named_parameters():
            weight.add_(RHO * here[name] / norm)
    there = gradients(above, trainer)
    trainer.train_step()
    for name, weight in trainer.module.named_parameters():
        before = model.get_parameter(name)
        torch.testing.assert_close(weight, before - 0.05 * there[name], rtol=1e-5, atol=1e-6)
    moved = sum((0.05 * (there[name] - here[name])).norm() for name in here)
    assert moved > 1e-3, "else it would be plain descent"


def test_sam_s_passes_drop_the_same_features() -> None:
    """Else it would climb the slope of one network and descend that of another."""
    trainer = make_trainer(
        tiny_recipe(sam_rho=RHO, **PLAIN), model=dataclasses.replace(TINY, dropout=0.5)
    )
    dropped: list[Tensor] = []
    trainer.module.fc.register_forward_pre_hook(lambda _, inputs: dropped.append(inputs[0] == 0))
    for _ in range(2):
        trainer.train_step()
    first, second, next_first, _ = dropped
    assert torch.equal(first, second)
    assert not torch.equal(first, next_first)


def test_sam_of_a_whole_batch_is_that_of_its_micro_batches() -> None:
    """Without BatchNorm, whose statistics are those of a micro-batch."""
    weights = []
    for parts in (1, 4):
        trainer = make_trainer(tiny_recipe(sam_rho=RHO, **PLAIN), accumulation_steps=parts)
        trainer.module.eval()
        trainer.train_step()
        weights.append(trainer.module.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


def test_sam_s_second_pass_leaves_the_statistics_and_the_metrics_alone() -> None:
    trainer, plain = (make_trainer(tiny_recipe(sam_rho=rho, **PLAIN)) for rho in (RHO, 0.0))
    for each in (trainer, plain):
        each.train_step()
    for name, buffer in trainer.module.named_buffers():
        assert torch.equal(buffer, plain.module.get_buffer(name)), name
    assert trainer.meter.train_metrics() == plain.meter.train_metrics()


def test_statistics_are_followed_again_afterwards() -> None:
    norm = nn.BatchNorm2d(2)
    images = torch.randn(4, 2, 3, 3) + 5
    with statistics_kept(norm):
        inside = norm(images)
    assert torch.equal(norm.running_mean, torch.zeros(2))
    assert torch.equal(norm(images), inside), "of the batch in both"
    assert norm.running_mean.abs().sum() > 0


def test_a_first_gradient_that_overflows_leaves_the_weights_where_they_were() -> None:
    """As in fp16: the second gradient is NaN then, for which a scaler skips the step."""
    trainer = make_trainer(tiny_recipe(sam_rho=RHO, **PLAIN))
    before = {name: each.clone() for name, each in trainer.weights().items()}
    passes = []

    def forward_backward() -> None:
        loss = loss_of(trainer.module, trainer)
        (loss * float("inf") if not passes else loss).backward()
        passes.append(loss.item())

    trainer.optimizer_step = lambda: None  # type: ignore[method-assign]
    trainer._update(trainer, forward_backward)
    assert len(passes) == 2
    assert torch.tensor(passes[1]).isnan()
    assert all(each.grad.isnan().any() for each in [trainer.module.fc.weight])
    for name, weight in trainer.module.named_parameters():
        assert torch.equal(weight, before[name]), name
    for name, buffer in trainer.module.named_buffers():
        assert buffer.isfinite().all(), name


def give_scaler(trainer: Trainer, scale: float) -> None:
    """Let a trainer on a CPU scale its loss, as one in fp16 on a GPU does."""
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize(
    "fields",
    [{"sam_rho": RHO}, {"clip_norm": 0.1}, {"sam_rho": RHO, "clip_norm": 0.1, "optimizer": "muon"}],
)
def test_a_scale_of_the_loss_changes_no_step(fields: dict[str, object]) -> None:
    plain, scaled = (make_trainer(tiny_recipe(**PLAIN, **fields)) for _ in range(2))
    give_scaler(scaled, 1024.0)
    for trainer in (plain, scaled):
        for _ in range(2):
            trainer.train_step()
    assert scaled.meter.skipped_steps == 0
    for name, weight in plain.module.named_parameters():
        other = scaled.module.get_parameter(name)
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("overflowing", [0, 1])
def test_sam_skips_a_step_whose_gradient_overflows_in_either_pass(
    overflowing: int, optimizer: str
) -> None:
    trainer = make_trainer(tiny_recipe(sam_rho=RHO, optimizer=optimizer))
    give_scaler(trainer, 1024.0)
    backward, passes = trainer.backward, itertools.count()
    trainer.backward = lambda loss: backward(loss * (1e38 if next(passes) == overflowing else 1))
    before = {name: each.clone() for name, each in trainer.weights().items()}
    trainer.train_step()
    assert next(passes) == 2
    for name, weight in trainer.module.named_parameters():
        assert torch.equal(weight, before[name]), name
    assert all(each.isfinite().all() for each in trainer.module.buffers())
    assert trainer.meter.skipped_steps == 1 and trainer.scaler.get_scale() == 512.0
    trainer.train_step()
    assert trainer.meter.skipped_steps == 1
    assert not torch.equal(trainer.module.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_a_long_gradient_is_shortened(limit: float) -> None:
    trainer = make_trainer(tiny_recipe(clip_norm=limit, **PLAIN))
    model = copy.deepcopy(trainer.module)
    here = gradients(model, trainer)
    norm = torch.sqrt(sum((each**2).sum() for each in here.values()))
    assert 1e-3 < norm < 1e3
    trainer.train_step()
    for name, weight in trainer.module.named_parameters():
        step = 0.05 * here[name] * min(1.0, limit / float(norm))
        torch.testing.assert_close(weight, model.get_parameter(name) - step, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sam_goes_with_any_optimiser(optimizer: str) -> None:
    results = []
    for rho in (RHO, 0.0):
        trainer = make_trainer(tiny_recipe(sam_rho=rho, optimizer=optimizer, lr=0.01))
        trainer.train_step()
        results.append(trainer.module.fc.weight.detach().clone())
    assert not torch.equal(*results)
    assert all(each.isfinite().all() for each in results)
