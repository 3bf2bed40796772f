import numpy as np
import pytest
import torch
from conftest import make_dataset
from torch import Tensor

from cifar.data.dataset import Split
from cifar.data.loader import Batch, DeviceImages, Normalization, Place, eval_batches
from cifar.evaluation import evaluate

CPU = torch.device("cpu")


def score(scores: Tensor, targets: Tensor, batch_size: int = 3):
    """Evaluate a forward function that looks its logits up by the first pixel."""
    indices = torch.arange(len(targets)).view(-1, 1, 1, 1).float()
    batches = [
        Batch(indices[samples], targets[samples], samples)
        for samples in torch.arange(len(targets)).split(batch_size)
    ]
    return evaluate(
        lambda images: scores[images[:, 0, 0, 0].long()],
        batches,
        num_classes=scores.shape[1],
        device=CPU,
    )


def test_by_hand_with_a_ragged_last_batch() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 5.0], [9.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    targets = torch.tensor([0, 1, 0, 2])
    result = score(scores, targets)
    losses = [
        -np.log(np.exp(row)[target] / np.exp(row).sum())
        for row, target in zip(scores.double().numpy(), targets.tolist())
    ]
    assert result.samples == 4
    assert result.top1 == 3 / 4
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.confusion == ((2, 0, 0), (0, 0, 1), (0, 0, 1))
    assert result.per_class == (1.0, 0.0, 1.0)


def test_top5_of_seven_classes() -> None:
    ranking = torch.arange(7.0, 0.0, -1.0).expand(7, 7)
    result = score(ranking, torch.arange(7))
    assert result.top5 == pytest.approx(5 / 7)
    assert result.top1 == pytest.approx(1 / 7)


def test_with_fewer_than_five_classes_top5_is_everything() -> None:
    assert score(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])).top5 == 1.0


def test_a_class_without_samples_has_no_accuracy() -> None:
    assert score(torch.eye(3)[:2], torch.tensor([0, 1])).per_class == (1.0, 1.0, None)


def test_half_precision_logits_are_scored_in_fp32() -> None:
    scores = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(64) % 10
    assert score(scores, targets).loss == score(scores.float(), targets).loss


@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_shares_of_all_processes_add_up_to_the_whole(count: int) -> None:
    split: Split = make_dataset(test=50).test
    images = DeviceImages(split, Normalization.of(split), CPU)
    project = torch.randn(3 * 16 * 16, 10, generator=torch.Generator().manual_seed(1))

    def confusion(place: Place) -> Tensor:
        batches = eval_batches(images, 7, place)
        result = evaluate(lambda x: x.flatten(1) @ project, batches, num_classes=10, device=CPU)
        return torch.tensor(result.confusion)

    total = torch.stack([confusion(Place(i, count)) for i in range(count)]).sum(0)
    assert torch.equal(total, confusion(Place()))
    assert int(total.sum()) == 50
