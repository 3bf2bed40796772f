"""Mixing samples: the distribution of the shares, the masks, and the loss by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset
from torch import Tensor
from training import make_trainer, tiny_recipe

from cifar.data.draws import EpochDraws
from cifar.losses import CutMix, Mixup, beta_quantiles, mixed_cross_entropy

CPU = torch.device("cpu")


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_shares_have_the_moments_of_a_beta_distribution(alpha: float) -> None:
    shares = beta_quantiles(alpha, 4096)
    assert np.all(np.diff(shares) >= 0)
    assert shares[0] >= 0 and shares[-1] <= 1
    assert shares.mean() == pytest.approx(0.5)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.01)


def test_a_beta_of_one_is_uniform() -> None:
    assert beta_quantiles(1.0, 10) == pytest.approx((np.arange(10) + 0.5) / 10, abs=1e-6)


def test_a_beta_of_two_by_hand() -> None:
    """Its distribution function is 3 x**2 - 2 x**3."""
    x = beta_quantiles(2.0, 100)
    assert 3 * x**2 - 2 * x**3 == pytest.approx((np.arange(100) + 0.5) / 100, abs=1e-6)


def test_mixup_has_one_share_per_sample() -> None:
    draws = EpochDraws(0, 0, 1000, CPU).of(torch.arange(1000))
    shares = Mixup(0.2)(draws, 32, 32)
    assert shares.shape == (1000, 1, 1)
    assert len(shares.unique()) > 500
    assert shares.mean() == pytest.approx(0.5, abs=0.05)


def test_cutmix_pastes_one_rectangle() -> None:
    draws = EpochDraws(0, 0, 500, CPU).of(torch.arange(500))
    masks = CutMix(1.0)(draws, 12, 20)
    assert masks.shape == (500, 12, 20)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    for mask in masks:
        rows, columns = (mask == 0).any(1), (mask == 0).any(0)
        assert torch.equal(mask == 0, rows[:, None] & columns), "a rectangle"
        for line in (rows, columns):
            edges = torch.diff(line.int(), prepend=torch.tensor([0]), append=torch.tensor([0]))
            assert edges.abs().sum() in (0, 2), "in one piece"
    covered = 1 - masks.mean((1, 2))
    assert 0.2 < covered.mean() < 0.5, "half of it, less what lies beyond the edge"


@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_mixed_images_with_soft_targets(
    fields: dict[str, float], smoothing: float
) -> None:
    trainer = make_trainer(tiny_recipe(label_smoothing=smoothing, **fields))
    (batch,) = trainer.loader.micro_batches(0)
    partners = batch.load_partners()
    seen: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean(2)[:, 0, :10]

    loss, logits = trainer.compute_loss(model, batch)
    masks = {"mixup": Mixup(0.4), "cutmix": CutMix(1.0)}
    made = [masks[name](batch.draws, 16, 16).expand(-1, 16, 16) for name in fields]
    second = batch.draws.pick("mix", lambda epoch: epoch.integers("mix", 2))
    losses = []
    for n in range(len(batch.images)):
        mask = made[int(second[n]) if len(made) == 2 else 0][n]
        image = mask * batch.images[n] + (1 - mask) * partners.images[n]
        torch.testing.assert_close(seen[0][n], image, rtol=1e-5, atol=1e-5)
        own, other = (F.one_hot(each.targets[n], 10).float() for each in (batch, partners))
        target = mask.mean() * own + (1 - mask.mean()) * other
        target = (1 - smoothing) * target + smoothing / 10
        losses.append(-(target * logits[n].log_softmax(0)).sum())
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert not torch.equal(seen[0], batch.images)


def test_both_ways_are_used_about_equally() -> None:
    trainer = make_trainer(
        tiny_recipe(mixup=0.4, cutmix=1.0, global_batch_size=90), data=make_dataset(train=90)
    )
    (batch,) = trainer.loader.micro_batches(0)
    second = batch.draws.pick("mix", lambda epoch: epoch.integers("mix", 2))
    assert 25 < second.sum() < 65


def test_a_partner_that_is_the_sample_itself_changes_nothing() -> None:
    """The middle of an odd batch."""
    trainer = make_trainer(tiny_recipe(global_batch_size=9))
    (batch,) = trainer.loader.micro_batches(0)
    seen: list[Tensor] = []
    mixed_cross_entropy([CutMix(1.0)], 0.0)(
        lambda images: seen.append(images) or images.flatten(1)[:, :10], batch
    )
    assert torch.equal(seen[0][4], batch.images[4])
