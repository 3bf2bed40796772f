"""Mixing samples: the distribution of the shares, the masks, and the loss by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import make_trainer, tiny_recipe

from cifar.data.draws import EpochDraws, SampleDraws
from cifar.data.loader import TrainBatch
from cifar.data.mixing import CutMix, Mixer, Mixup, beta_quantiles
from cifar.errors import ConfigError
from cifar.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.99, 1.0, 4.0, 32.0, 1000.0])
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


def draws_of(count: int) -> SampleDraws:
    return EpochDraws(0, 0, count, CPU).of(torch.arange(count))


def test_mixup_has_one_share_per_sample() -> None:
    shares = Mixup(0.2)(draws_of(1000), 32, 32)
    assert shares.shape == (1000, 1, 1)
    assert len(shares.unique()) > 500
    assert shares.mean() == pytest.approx(0.5, abs=0.05)


def test_cutmix_pastes_one_rectangle() -> None:
    masks = CutMix(1.0)(draws_of(500), 12, 20)
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


def test_a_rectangle_of_cutmix_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yun et al.'s `rand_bbox`: a quarter of the pixels, centre at row 3 and column 19."""
    monkeypatch.setattr(
        EpochDraws,
        "integers",
        lambda self, name, high, **_: torch.tensor(
            [{"cutmix.share": high // 4, "cutmix.top": 3, "cutmix.left": 19}[name]]
        ),
    )
    (mask,) = CutMix(1.0)(EpochDraws(0, 0, 1, CPU).of(torch.tensor([0])), 12, 20)
    expected = torch.ones(12, 20)
    expected[0:6, 14:20] = 0  # 6 of 12 rows and 10 of 20 columns, of which 4 are beyond the edge
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_that_of_mixed_images_with_soft_targets(
    fields: dict[str, float], smoothing: float, accumulation: int
) -> None:
    """Partners are in the same micro-batch, or in another one."""
    mixing, plain = (
        make_trainer(
            tiny_recipe(label_smoothing=smoothing, **each), accumulation_steps=accumulation
        )
        for each in (fields, {})
    )
    masks = {"mixup": Mixup(0.4), "cutmix": CutMix(1.0)}

    def model(images: Tensor) -> Tensor:
        return images.mean(2)[:, 0, :10]

    pairs = zip(mixing.loader.micro_batches(0), plain.loader.micro_batches(0), strict=True)
    for batch, unmixed in pairs:
        partners = unmixed.load_partners()
        draws = EpochDraws(0, 0, len(plain.dataset.train), CPU).of(unmixed.samples)
        made = [masks[name](draws, 16, 16).expand(-1, 16, 16) for name in fields]
        second = draws.pick("mix", lambda epoch: epoch.integers("mix", 2))
        loss, logits = mixing.compute_loss(model, batch)
        losses = []
        for n in range(len(batch.images)):
            mask = made[int(second[n]) if len(made) == 2 else 0][n]
            image = mask * unmixed.images[n] + (1 - mask) * partners.images[n]
            torch.testing.assert_close(batch.images[n], image, rtol=1e-5, atol=1e-5)
            own, other = (F.one_hot(each.targets[n], 10).float() for each in (unmixed, partners))
            target = mask.mean() * own + (1 - mask.mean()) * other
            target = (1 - smoothing) * target + smoothing / 10
            losses.append(-(target * logits[n].log_softmax(0)).sum())
            greater = unmixed if mask.mean() >= 0.5 else partners
            assert batch.likeliest[n] == greater.targets[n]
        torch.testing.assert_close(loss, torch.stack(losses).mean())
        assert not torch.equal(batch.images, unmixed.images)


def test_a_perfect_model_s_top1_is_perfect_under_mixing() -> None:
    trainer = make_trainer(tiny_recipe(mixup=1.0))

    def compute_loss(_: object, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        logits = 9.0 * F.one_hot(batch.likeliest, 10).float()
        return logits.mean() * trainer.module.fc.weight.sum(), logits

    trainer.compute_loss = compute_loss
    trainer.train_step()
    assert trainer.meter.train_metrics().top1 == 1.0


def test_both_ways_are_used_about_equally() -> None:
    second = draws_of(90).pick("mix", lambda epoch: epoch.integers("mix", 2))
    assert 25 < second.sum() < 65


def test_a_partner_that_is_the_sample_itself_changes_nothing() -> None:
    """The middle of an odd batch."""
    mixing, plain = (
        make_trainer(tiny_recipe(global_batch_size=9, **fields)) for fields in ({"cutmix": 1.0}, {})
    )
    (batch,), (unmixed,) = (each.loader.micro_batches(0) for each in (mixing, plain))
    assert torch.equal(batch.images[4], unmixed.images[4])


def step_loading(trainer: Trainer) -> int:
    """How many images a step augments."""
    loaded: list[int] = []
    load = trainer.loader.load
    trainer.loader.load = lambda samples: (loaded.append(len(samples)), load(samples))[1]
    trainer.train_step()
    return sum(loaded)


def test_mixing_in_one_process_augments_no_image_twice() -> None:
    assert step_loading(make_trainer(tiny_recipe(mixup=0.4))) == 32
    assert step_loading(make_trainer(tiny_recipe(mixup=0.4, sam_rho=0.1))) == 32
    assert step_loading(make_trainer(tiny_recipe(mixup=0.4), accumulation_steps=2)) == 64


def test_a_mixer_of_one_way_uses_it_for_all() -> None:
    images, partners = torch.ones(50, 1, 2, 2), torch.zeros(50, 1, 2, 2)
    mixed, share = Mixer([Mixup(1.0)])(images, partners, draws_of(50))
    assert torch.equal(mixed, share.view(-1, 1, 1, 1).expand_as(mixed))
    assert len(share.unique()) > 40


@pytest.mark.parametrize("alpha", [1e-20, 1e-3, 1e7])
def test_a_share_that_means_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"mixup: .*: give 0, or 0\.01 to 1e"):
        tiny_recipe(mixup=alpha)
