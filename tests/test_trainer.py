import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset
from torch import Tensor, nn
from torch._inductor import config as inductor
from training import TINY, make_trainer, mixup, tiny_recipe

from cifar.compilation import compiled
from cifar.config import ModelConfig, RunConfig
from cifar.data.loader import TrainBatch
from cifar.errors import CheckpointError, ConfigError, TrainingError
from cifar.losses import cross_entropy
from cifar.models import build_model
from cifar.optim import lr_at, optimizer_tensors
from cifar.pulse import PULSE
from cifar.trainer import Trainer
from cifar.training_state import load_state, state_of


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.weights().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_equals_a_bare_loop(channels_last: bool, smoothing: float) -> None:
    recipe = tiny_recipe(label_smoothing=smoothing, weight_decay=1e-3)
    trainer = make_trainer(recipe, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    torch.manual_seed(0)
    bare = build_model(TINY).to(memory_format=layout)
    optimizer = torch.optim.SGD(
        bare.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True
    )
    losses = []
    for step in range(4):
        trainer.loader.set_epoch(step // 3)
        (batch,) = trainer.loader.micro_batches(step % 3)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, 6, 3, recipe)
        optimizer.zero_grad()
        loss = F.cross_entropy(bare(batch.images), batch.targets, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        trainer.meter.reset()
        trainer.train_step()
        assert trainer.meter.train_metrics().loss == losses[-1]
    assert_equal(trainer.weights(), bare.state_dict())
    assert losses[0] != losses[-1]


def test_label_smoothing_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    batch = TrainBatch(logits, torch.tensor([0]), torch.tensor([0]), lambda: batch)
    loss, _ = cross_entropy(0.3)(lambda _: logits, batch)
    logs = logits.log_softmax(1)[0]
    assert loss.item() == pytest.approx(float(-(0.8 * logs[0] + 0.1 * logs[1] + 0.1 * logs[2])))


class Plain(nn.Module):
    """A net whose samples do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def plain_trainer(monkeypatch: pytest.MonkeyPatch, **config: Any) -> Trainer:
    monkeypatch.setattr("cifar.trainer.build_model", lambda _: Plain())
    return make_trainer(**config)


def test_accumulated_gradients_equal_those_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = plain_trainer(monkeypatch)
    parts = plain_trainer(monkeypatch, accumulation_steps=4)
    calls = []
    parts.module.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    for trainer in (whole, parts):
        for _ in range(4):
            trainer.train_step()
    assert calls == [8] * 16
    for name, tensor in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], tensor)
    one, four = whole.meter.train_metrics(), parts.meter.train_metrics()
    assert one.samples == four.samples == 128
    assert four.loss == pytest.approx(one.loss) and four.top1 == one.top1


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError, match=r"batch-size: 32: .*nearest that does: 30 or 35"):
        make_trainer(accumulation_steps=5)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch-size: 97: larger than the 96"):
        make_trainer(tiny_recipe(global_batch_size=97))


def test_the_last_incomplete_batch_is_dropped_and_samples_are_counted() -> None:
    trainer = make_trainer(tiny_recipe(global_batch_size=40))
    assert trainer.total_steps == 2 * 2
    trainer.train_step()
    assert trainer.samples_seen == 40


@pytest.mark.parametrize(("samples", "steps"), [(0, 0), (31, 0), (64, 2), (1000, 31)])
def test_a_budget_of_samples_gives_whole_steps(samples: int, steps: int) -> None:
    assert make_trainer(trainer={"train_samples": samples}).total_steps == steps


def test_an_update_may_compute_the_loss_twice() -> None:
    """Sharpness-aware minimisation, https://arxiv.org/abs/2010.01412, against the same by hand."""
    radius = 0.05

    def climb(parameters: list[nn.Parameter]) -> list[Tensor]:
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        return [radius * p.grad / norm for p in parameters]

    def sharpness_aware(trainer: Trainer, forward_backward: Any) -> None:
        parameters = list(trainer.module.parameters())
        trainer.optimizer.zero_grad()
        forward_backward()
        with torch.no_grad():
            ascent = climb(parameters)
            torch._foreach_add_(parameters, ascent)
        trainer.optimizer.zero_grad()
        forward_backward()
        with torch.no_grad():
            torch._foreach_sub_(parameters, ascent)
        trainer.optimizer_step()

    trainer = make_trainer(trainer={"update": sharpness_aware})
    torch.manual_seed(0)
    bare = build_model(TINY)
    optimizer = torch.optim.SGD(
        bare.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    (batch,) = trainer.loader.micro_batches(0)
    first = F.cross_entropy(bare(batch.images), batch.targets)
    first.backward()
    parameters = list(bare.parameters())
    with torch.no_grad():
        ascent = climb(parameters)
        torch._foreach_add_(parameters, ascent)
    optimizer.zero_grad()
    F.cross_entropy(bare(batch.images), batch.targets).backward()
    with torch.no_grad():
        torch._foreach_sub_(parameters, ascent)
    optimizer.step()

    trainer.train_step()
    assert_equal(trainer.weights(), bare.state_dict())
    counted = trainer.meter.train_metrics()
    assert (counted.samples, counted.loss) == (32, first.item())


def test_a_loss_may_mix_a_batch_with_partners_and_soft_labels() -> None:
    """In micro-batches, and in the second epoch as in the first."""
    losses = []

    def noted(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        loss, logits = mixup(model, batch)
        losses.append(loss.item())
        return loss, logits

    trainer = make_trainer(accumulation_steps=2, trainer={"compute_loss": noted})
    for step in range(4):
        trainer.loader.set_epoch(step // 3)
        whole = trainer.loader.load(trainer.loader.samples(step % 3).flatten())
        expected = []
        for rows, others in ((slice(0, 16), slice(16, 32)), (slice(16, 32), slice(0, 16))):
            partners, labels = whole.images[others].flip(0), whole.targets[others].flip(0)
            logits = copy.deepcopy(trainer.module)(whole.images[rows].lerp(partners, 0.3))
            logs, each = logits.log_softmax(1), torch.arange(16)
            kept, mixed = logs[each, whole.targets[rows]], logs[each, labels]
            expected.append(-(0.7 * kept + 0.3 * mixed).mean().item())
        trainer.meter.reset()
        trainer.train_step()
        assert losses[-2:] == pytest.approx(expected)
        counted = trainer.meter.train_metrics()
        assert counted.samples == 32 and counted.loss == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_inner_convolutions_run_in_the_precision_and_weights_stay_fp32(
    precision: str, dtype: torch.dtype
) -> None:
    trainer = make_trainer(precision=precision)
    seen = []
    trainer.module.layer2[0].conv2.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    trainer.train_step()
    trainer.evaluate()
    assert set(seen) == {dtype} and len(seen) == 2
    floating = [t for t in trainer.weights().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert {p.grad.dtype for p in trainer.module.parameters()} == {torch.float32}


def test_channels_last_reaches_an_inner_convolution_and_its_weights() -> None:
    trainer = make_trainer(channels_last=True)
    seen = []
    conv = trainer.module.layer3[0].conv2
    conv.register_forward_hook(lambda _m, _i, out: seen.append(out))
    trainer.train_step()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_seed_decides_the_weights() -> None:
    same, again, other = make_trainer(seed=1), make_trainer(seed=1), make_trainer(seed=2)
    assert_equal(same.weights(), again.weights())
    assert not torch.equal(same.weights()["conv1.weight"], other.weights()["conv1.weight"])


def test_the_data_decide_classes_and_channels() -> None:
    trainer = make_trainer(data=make_dataset(classes=3, channels=1))
    assert (trainer.model_config.num_classes, trainer.model_config.in_channels) == (3, 1)
    trainer.train_step()
    result = trainer.evaluate()
    assert result.top5 == 1.0 and len(result.confusion) == 3


def test_evaluation_changes_neither_weights_nor_mode() -> None:
    trainer = make_trainer()
    trainer.train_step()
    before = weights_of(trainer)
    first = trainer.evaluate()
    assert trainer.evaluate() == first and first.samples == 50
    assert_equal(trainer.weights(), before)
    assert trainer.module.training and trainer.module.layer1[0].bn1.training


def test_evaluation_uses_the_averaged_weights() -> None:
    trainer = make_trainer(tiny_recipe(ema_decay=0.9))
    for _ in range(4):
        trainer.train_step()
    averaged = trainer.evaluate()
    assert trainer.eval_weights() is trainer.average.weights
    plain = make_trainer()
    plain.module.load_state_dict(trainer.weights())
    assert plain.evaluate() != averaged
    plain.module.load_state_dict(trainer.average.weights)
    assert plain.evaluate() == averaged


def test_the_average_follows_the_training_by_hand() -> None:
    trainer = make_trainer(tiny_recipe(ema_decay=0.9))
    expected = weights_of(trainer)
    for update in (1, 2, 3):
        trainer.train_step()
        decay = min(0.9, (1 + update) / (10 + update))
        for name, value in trainer.weights().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    torch.testing.assert_close(trainer.average.weights, expected)
    assert trainer.average.weights["bn1.running_mean"].abs().sum() > 0
    assert int(trainer.average.weights["bn1.num_batches_tracked"]) == 3


def poison(trainer: Trainer, step: int) -> None:
    """Put an infinity into every image of one step."""
    load, position = trainer.loader.micro_batches, step % trainer.loader.steps_per_epoch

    def poisoned(at: int):
        for batch in load(at):
            if at == position:
                batch.images[:, 0, 0, 0] = torch.inf
            yield batch

    trainer.loader.micro_batches = poisoned


def test_a_loss_that_is_not_finite_is_reported_with_its_step_however_late() -> None:
    trainer = make_trainer()
    poison(trainer, 1)
    trainer.train_step()
    assert trainer.check() == 0
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(TrainingError, match="not finite in step 2:"):
        trainer.check()


def test_weights_that_are_not_finite_are_not_worth_saving() -> None:
    trainer = make_trainer()
    trainer.train_step()
    state_of(trainer)
    with torch.no_grad():
        trainer.module.fc.bias[3] = torch.nan
    with pytest.raises(TrainingError, match=r"weights: fc\.bias is not finite after step 1"):
        state_of(trainer)


def test_skipped_steps_in_a_row_stop_the_run() -> None:
    trainer = make_trainer(run=RunConfig(cpu=True, max_skipped_steps=3))
    for _ in range(2):
        trainer.meter.add_skip(torch.tensor(True))
    assert trainer.check(signal=10) == 10
    trainer.meter.add_skip(torch.tensor(True))
    with pytest.raises(TrainingError, match="fp16: 3 steps in a row"):
        trainer.check()


@pytest.mark.parametrize(
    "fields",
    [
        {"recipe": tiny_recipe(ema_decay=0.9), "channels_last": True},
        {"recipe": tiny_recipe(optimizer="adamw", lr=1e-3), "accumulation_steps": 2},
        {"recipe": tiny_recipe(optimizer="muon"), "channels_last": True},
        {"recipe": tiny_recipe(), "model": ModelConfig(name="resnet20", width=4, dropout=0.5)},
        {"recipe": tiny_recipe(), "precision": "bf16"},
    ],
)
def test_a_saved_state_continues_bit_for_bit(fields: dict[str, Any]) -> None:
    straight, saved, resumed = (make_trainer(**fields) for _ in range(3))
    for _ in range(5):
        straight.train_step()
    for _ in range(2):
        saved.train_step()
    tensors, counters = state_of(saved)
    stored = {
        group: {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in
                some.items()}
        for group, some in tensors.items()
    }  # fmt: skip
    for _ in range(2):
        saved.train_step()
    load_state(resumed, stored, counters)
    for _ in range(3):
        resumed.train_step()
    assert_equal(resumed.weights(), straight.weights())
    assert_equal(resumed.eval_weights(), straight.eval_weights())
    assert_equal(optimizer_tensors(resumed.optimizer), optimizer_tensors(straight.optimizer))
    assert resumed.meter.state() == straight.meter.state()
    assert resumed.evaluate() == straight.evaluate()


def test_a_state_of_other_data_or_another_length_is_refused() -> None:
    trainer = make_trainer()
    trainer.train_step()
    tensors, counters = state_of(trainer)
    with pytest.raises(CheckpointError, match="data: toy: not the images"):
        load_state(make_trainer(data=make_dataset(train=97)), tensors, counters)
    with pytest.raises(CheckpointError, match=r"steps: 9: .* has 6"):
        load_state(make_trainer(tiny_recipe(epochs=3)), tensors, counters)


def test_a_state_of_another_model_is_refused_by_the_first_difference() -> None:
    trainer = make_trainer()
    trainer.train_step()
    tensors, counters = state_of(trainer)
    with pytest.raises(CheckpointError, match=r"another model: bn1\.bias is \[4\], must be \[8\]"):
        load_state(make_trainer(model=ModelConfig(name="resnet20", width=8)), tensors, counters)


def test_dropout_draws_anew_in_every_step() -> None:
    trainer = make_trainer(model=ModelConfig(name="resnet20", width=4, dropout=0.5))
    masks = []
    trainer.module.fc.register_forward_hook(lambda _m, inputs, _o: masks.append(inputs[0] == 0))
    for _ in range(2):
        trainer.train_step()
    assert not torch.equal(masks[0], masks[1])


def test_a_small_net_learns_the_toy_images() -> None:
    trainer = make_trainer(tiny_recipe(epochs=12, global_batch_size=16, augment=(), lr=0.1))
    while trainer.step < trainer.total_steps:
        trainer.train_step()
    assert trainer.evaluate().top1 > 0.3, "chance is 0.1"


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_eager_one_and_its_weights_keep_their_names() -> None:
    eager, compiled = make_trainer(), make_trainer(compile=True)
    for _ in range(2):
        eager.train_step()
        compiled.train_step()
    assert compiled.model is not compiled.module
    assert eager.weights().keys() == compiled.weights().keys()
    torch.testing.assert_close(compiled.weights(), eager.weights(), rtol=1e-3, atol=1e-4)
    assert compiled.evaluate().loss == pytest.approx(eager.evaluate().loss, rel=1e-2)


def test_compiling_is_announced_in_the_first_step_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`bench` takes an eager step on a GPU before; the watchdog waits longer for what is said."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: nn.Sequential(model))
    trainer = make_trainer(compile=True)
    announced: list[str] = []
    trainer.module.register_forward_pre_hook(lambda *_: announced.append(PULSE.announced))
    model, trainer.model = trainer.model, trainer.wrapped
    trainer.train_step()
    trainer.model = model
    for _ in range(2):
        trainer.train_step()
    assert announced == ["", "compiling", ""]


@pytest.mark.parametrize(("named", "found"), [(None, "ATEN"), ("TRITON", "TRITON")])
def test_only_the_libraries_convolutions_are_tried_unless_others_are_named(
    named: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS"
    monkeypatch.delenv(variable, raising=False)
    if named:
        monkeypatch.setenv(variable, named)
    module, told = nn.Linear(1, 1), []
    monkeypatch.setattr(torch, "compile", lambda *words, **named: told.append((words, named)))
    with inductor.patch(max_autotune_conv_backends="TRITON"):
        compiled(module, "max-autotune", fullgraph=True)
        assert inductor.max_autotune_conv_backends == found
    assert told == [((module,), {"mode": "max-autotune", "fullgraph": True})]
