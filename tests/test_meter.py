import pytest
import torch

from cifar.meter import Meter

CPU = torch.device("cpu")


def logits(*predicted: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()


def test_sums_by_hand() -> None:
    meter = Meter(CPU)
    meter.add(torch.tensor(2.0), logits(0, 1, 2), torch.tensor([0, 1, 1]), 0)
    meter.add(torch.tensor(4.0), logits(2), torch.tensor([2]), 1)
    metrics = meter.train_metrics()
    assert metrics.samples == 4
    assert metrics.loss == pytest.approx((3 * 2.0 + 4.0) / 4)
    assert metrics.top1 == 3 / 4
    meter.reset()
    assert meter.train_metrics().samples == 0


def test_soft_targets_count_their_likeliest_class() -> None:
    meter = Meter(CPU)
    meter.add(torch.tensor(1.0), logits(0, 1), torch.tensor([[0.7, 0.3, 0], [0.6, 0.4, 0]]), 0)
    assert meter.train_metrics().top1 == 0.5


def test_counts_are_exact_whatever_the_dtype_of_the_loss() -> None:
    meter = Meter(CPU)
    meter.add(
        torch.tensor(1.0, dtype=torch.bfloat16),
        torch.zeros(257, 3),
        torch.zeros(257, dtype=torch.int64),
        0,
    )
    assert meter.train_metrics().samples == 257


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_kept(bad: float) -> None:
    meter = Meter(CPU)
    for step, loss in enumerate((1.0, 2.0, bad, 1.0, bad)):
        assert meter.health(0).bad_step is None or step > 2
        meter.add(torch.tensor(loss), logits(0), torch.tensor([0]), step)
    assert meter.health(0).bad_step == 2


def test_any_number_of_steps_between_readings_gives_the_same_sums() -> None:
    often, seldom = Meter(CPU), Meter(CPU)
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0))
    for step, loss in enumerate(losses):
        for meter in (often, seldom):
            meter.add(loss, logits(step % 3, 0), torch.tensor([0, 0]), step)
        if step % 7 == 0:
            often.health(0)
    assert often.train_metrics() == seldom.train_metrics()
    assert seldom.train_metrics().samples == 400
    assert seldom.train_metrics().loss == pytest.approx(losses.mean().item())
    assert seldom.train_metrics().top1 == pytest.approx((200 + 67) / 400)


def test_a_bad_step_before_a_new_epoch_is_not_forgotten() -> None:
    meter = Meter(CPU)
    meter.add(torch.tensor(float("nan")), logits(0), torch.tensor([0]), 3)
    meter.reset()
    assert meter.health(0).bad_step == 3
    assert meter.train_metrics().samples == 0


def test_the_longest_row_of_skipped_steps_and_their_number() -> None:
    meter = Meter(CPU)
    for skipped in (True, False, True, True, True, False, True):
        meter.add_skip(torch.tensor(skipped))
    assert meter.health(0).skipped_in_a_row == 3
    assert meter.skipped_steps == 5


def test_health_passes_the_signal_on() -> None:
    assert Meter(CPU).health(15).signal == 15


def test_a_saved_meter_goes_on_where_it_stopped() -> None:
    first, second = Meter(CPU), Meter(CPU)
    first.add(torch.tensor(2.0), logits(0, 1), torch.tensor([0, 0]), 0)
    for skipped in (True, True):
        first.add_skip(torch.tensor(skipped))
    second.load(first.state(), first=True)
    second.add_skip(torch.tensor(True))
    assert second.train_metrics() == first.train_metrics()
    assert second.health(0).skipped_in_a_row == 3


def test_a_row_of_skipped_steps_that_has_ended_is_not_taken_up() -> None:
    first, second = Meter(CPU), Meter(CPU)
    for skipped in (True, True, True, False, True):
        first.add_skip(torch.tensor(skipped))
    second.load(first.state(), first=True)
    assert second.health(0).skipped_in_a_row == 1
    assert second.skipped_steps == 4


def test_restored_sums_go_to_the_first_process_alone() -> None:
    saved = Meter(CPU)
    saved.add(torch.tensor(2.0), logits(0), torch.tensor([0]), 0)
    other = Meter(CPU)
    other.load(saved.state(), first=False)
    assert other.train_metrics().samples == 0
