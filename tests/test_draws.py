import numpy as np
import pytest
import torch

from cifar.data.draws import EpochDraws, hash_samples

CPU = torch.device("cpu")


def _lowbias32(x: int) -> int:
    mask = 0xFFFFFFFF
    x ^= x >> 16
    x = (x * 0x7FEB352D) & mask
    x ^= x >> 15
    x = (x * 0x846CA68B) & mask
    return x ^ (x >> 16)


def test_the_hash_is_lowbias32_in_unbounded_integers() -> None:
    import hashlib

    key = hashlib.sha256(b"7/3/flip").digest()
    first, second = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
    expected = [_lowbias32(_lowbias32(i ^ first) ^ second) for i in range(1000)]
    assert hash_samples(7, 3, "flip", 1000, CPU).tolist() == expected


def test_pinned_values_so_that_old_runs_can_be_repeated() -> None:
    assert EpochDraws(0, 0, 8, CPU).order().tolist() == PINNED_ORDER


PINNED_ORDER = [3, 4, 6, 5, 7, 0, 2, 1]


@pytest.mark.parametrize("high", [2, 9, 10])
def test_integers_are_uniform(high: int) -> None:
    draws = EpochDraws(1, 2, 90_000, CPU)
    counts = np.bincount(draws.integers("x", high).numpy(), minlength=high)
    expected = 90_000 / high
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == high
    assert chi_square < high + 5 * (2 * high) ** 0.5


def test_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    orders = [EpochDraws(s, e, 500, CPU).order().tolist() for s, e in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert sorted(order) == list(range(500))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_draws_of_different_names_are_unrelated() -> None:
    draws = EpochDraws(0, 0, 20_000, CPU)
    pair = torch.stack([draws.integers(name, 2**20) for name in ("crop.top", "crop.left")])
    assert abs(torch.corrcoef(pair.double())[0, 1].item()) < 0.03


def test_samples_pick_their_share_of_what_is_made_once_for_the_epoch() -> None:
    epoch, made = EpochDraws(3, 1, 50, CPU), []

    def doubled(draws: EpochDraws) -> torch.Tensor:
        made.append(draws.epoch)
        return 2 * draws.integers("x", 1000)

    for samples in ([4, 0, 49], [7]):
        picked = epoch.of(torch.tensor(samples)).pick("doubled", doubled)
        assert picked.tolist() == [2 * epoch.integers("x", 1000)[i].item() for i in samples]
    assert made == [1]


@pytest.mark.gpu
def test_gpu_draws_equal_cpu_draws() -> None:
    cuda = torch.device("cuda")
    for name in ("order", "flip"):
        on_gpu = hash_samples(3, 4, name, 50_000, cuda).cpu()
        assert torch.equal(on_gpu, hash_samples(3, 4, name, 50_000, CPU))
    assert torch.equal(
        EpochDraws(3, 4, 50_000, cuda).order().cpu(), EpochDraws(3, 4, 50_000, CPU).order()
    )
