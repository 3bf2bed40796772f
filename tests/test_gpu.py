"""What only a CUDA device can show. `-m gpu` runs them."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training import (
    TINY_OPTIONS,
    after_step,
    cifar,
    complaints,
    finish,
    kill,
    make_trainer,
    metrics,
    never_waiting,
    rescaled,
    save_weights,
    start,
    taught_by,
    tiny_recipe,
)

from cifar.checkpoint import load_weights
from cifar.config import AUGMENTATIONS, ModelConfig, RunConfig
from cifar.errors import TrainingError
from cifar.models import build_model
from cifar.recipes import get_recipe
from cifar.trainer import Trainer
from cifar.training_state import load_state, state_of

pytestmark = pytest.mark.gpu

GPU = RunConfig()


def trained(steps: int = 4, **config: object) -> Trainer:
    trainer = make_trainer(run=GPU, **config)
    for _ in range(steps):
        trainer.train_step()
    return trainer


def supports(precision: str) -> bool:
    return torch.cuda.get_device_capability() >= (8, 0) or precision not in ("bf16", "tf32")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_trains_in_its_own_format(precision: str, channels_last: bool) -> None:
    if not supports(precision):
        pytest.skip(f"this GPU has no {precision}")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    trainer = trained(0, precision=precision, channels_last=channels_last)
    seen = []
    trainer.module.layer2[0].conv2.register_forward_hook(lambda _m, _i, out: seen.append(out))
    for _ in range(3):
        trainer.train_step()
    assert trainer.check() == 0
    assert trainer.device.type == "cuda"
    assert {out.dtype for out in seen} == {dtypes.get(precision, torch.float32)}
    nhwc = seen[0].is_contiguous(memory_format=torch.channels_last)
    assert nhwc == channels_last
    floating = [t for t in trainer.weights().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert trainer.evaluate().samples == 50


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_products_of_fp32_are_rounded_to_tf32_if_asked_for_and_not_otherwise(
    precision: str,
) -> None:
    """TF32's 10 bits of mantissa make 1 of 1 + 2**-12; fp32 keeps it, and the sums are exact."""
    if not supports(precision):
        pytest.skip(f"this GPU has no {precision}")
    trained(0, precision=precision)
    number, ones = 1 + 2**-12, torch.ones(1024, 1024, device="cuda")
    products = (number * ones) @ ones / 1024
    images = torch.full((64, 64, 32, 32), number, device="cuda")
    convolved = F.conv2d(images, torch.ones(64, 64, 3, 3, device="cuda")) / (64 * 9)
    expected = 1.0 if precision == "tf32" else number
    for found in (products, convolved):
        assert (found - expected).abs().max() < 2**-15


def test_the_first_loss_on_a_gpu_is_that_on_a_cpu() -> None:
    gpu = trained(1)
    cpu = make_trainer()
    cpu.train_step()
    on_gpu, on_cpu = gpu.meter.train_metrics(), cpu.meter.train_metrics()
    assert on_gpu.samples == on_cpu.samples
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resizing_network_is_fine_tuned_in_fp16(compiled: bool) -> None:
    trainer = trained(
        0,
        recipe=tiny_recipe(frozen_epochs=1, epochs=4),
        model=ModelConfig(name="resnet20", width=4, resize=24),
        precision="fp16",
        channels_last=True,
        compile=compiled,
    )
    before = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    body = [name for name in before if not name.startswith("fc.")]
    for steps, expected in ((3, True), (9, False)):
        for _ in range(steps):
            trainer.train_step()
        now = trainer.weights()
        assert {torch.equal(now[name], before[name]) for name in body} == {expected}
    assert trainer.check() == 0


def test_resizing_on_a_gpu_is_that_on_a_cpu() -> None:
    module = build_model(ModelConfig(name="resnet20", width=4, resize=24)).eval()
    images = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    seen = []
    module.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(images)
    module.cuda()(images.cuda())
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seen[1].cpu(), seen[0], rtol=1e-4, atol=1e-5)


def test_the_gpu_reads_its_counters_at_intervals() -> None:
    assert make_trainer(run=GPU).check_every == 20


@pytest.mark.parametrize(
    ("name", "precision", "fields"),
    [
        ("default", "fp32", {}),
        ("sgd", "fp16", {}),
        ("sgd", "bf16", {}),
        *(("sgd", "fp32", {"augment": (name,)}) for name in AUGMENTATIONS),
        ("sgd", "fp32", {"mixup": 0.2, "cutmix": 1.0}),
        ("sgd", "fp32", {"schedule": "one-cycle"}),
        ("sgd", "fp32", {"sam_rho": 0.1}),
    ],
)
def test_a_step_never_waits_for_the_gpu(
    name: str, precision: str, fields: dict[str, object]
) -> None:
    if not supports(precision):
        pytest.skip(f"this GPU has no {precision}")
    recipe = dataclasses.replace(get_recipe(name), global_batch_size=32, epochs=9, **fields)
    trainer = make_trainer(run=GPU, recipe=recipe, precision=precision)
    for _ in range(2):
        trainer.train_step()
    with never_waiting():
        for _ in range(trainer.loader.steps_per_epoch):  # into the next epoch
            trainer.train_step()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_teacher_answers_on_the_gpu_without_waiting(tmp_path: Path, precision: str) -> None:
    if not supports(precision):
        pytest.skip(f"this GPU has no {precision}")
    teacher = save_weights(tmp_path / "teacher", trained(1))
    trainer = trained(
        2, precision=precision, channels_last=True, distillation=taught_by(teacher), data=rescaled()
    )
    parameters = [*trainer.teacher.network.module.parameters()]
    assert {each.device.type for each in parameters} == {"cuda"}
    with never_waiting():
        trainer.train_step()
    assert trainer.check() == 0


def test_fp16_scales_the_loss_and_counts_skipped_steps() -> None:
    """The first scale is far too large for one step at least, or is halved by hand."""
    trainer = trained(1, precision="fp16")
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    skipped = trainer.meter.skipped_steps
    trainer.scaler._scale.fill_(torch.finfo(torch.float32).max)
    trainer.train_step()
    assert trainer.meter.skipped_steps == skipped + 1
    for name, parameter in trainer.module.named_parameters():
        assert torch.equal(parameter, before[name]), "a skipped step changes no weight"


def test_fp16_stops_after_too_many_skipped_steps() -> None:
    trainer = make_trainer(run=RunConfig(max_skipped_steps=3), precision="fp16")
    trainer.train_step()
    for _ in range(3):
        trainer.scaler._scale.fill_(torch.finfo(torch.float32).max)
        trainer.train_step()
    with pytest.raises(TrainingError, match=r"fp16: \d steps in a row"):
        trainer.check()


def test_the_loss_scale_is_part_of_the_state() -> None:
    trainer = trained(2, precision="fp16")
    trainer.scaler._scale.fill_(128.0)
    tensors, counters = state_of(trainer)
    stored = {group: {k: v.cpu().clone() for k, v in some.items()} for group, some in
              tensors.items()}  # fmt: skip
    other = make_trainer(run=GPU, precision="fp16")
    load_state(other, stored, counters)
    other.train_step()
    assert float(other.scaler.get_scale()) == 128.0
    assert all(tensor.device.type == "cuda" for tensor in other.weights().values())


def final_weights(run: Path) -> torch.Tensor:
    _, weights = load_weights(run)
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_run_is_resumed_on_the_gpu(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """To a tolerance that a lost state of the optimiser or of the average exceeds many times."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = ("train", "--data", f"npz:{npz}", *TINY_OPTIONS, "--lr", "0.01", "--optimizer",
               optimizer, "--ema-decay", "0.9", "--channels-last", "--output-dir")  # fmt: skip
    assert cifar(*options, tmp_path / "straight") == 0
    with after_step(2, kill(signal.SIGTERM)):
        assert cifar(*options, tmp_path / "stopped") == 143
    assert cifar("train", "--resume", tmp_path / "stopped") == 0
    straight, resumed = (final_weights(tmp_path / name) for name in ("straight", "stopped"))
    assert (resumed - straight).norm() < 1e-4 * straight.norm()
    lines = [metrics(tmp_path / name) for name in ("straight", "stopped")]
    for one, other in zip(*lines, strict=True):
        assert (one["step"], one["samples_seen"]) == (other["step"], other["samples_seen"])
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


STOPPED = """
import os, signal, sys
from cifar.commands import main
from cifar.trainer import Trainer
original = Trainer.train_step
def train_step(self):
    original(self)
    if self.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
Trainer.train_step = train_step
sys.exit(main())
"""


def test_a_process_group_of_nccl_is_left_when_a_signal_stops_the_run(
    npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node", 1)
    process = start(*launch, tmp_path / "stopped.py", "train", "--data", f"npz:{npz}",
                    *TINY_OPTIONS, "--output-dir", tmp_path / "run",
                    environment={"CIFAR_RESTARTED": "1"})  # fmt: skip
    code, _, err = finish(process)
    assert code != 0 and "destroy_process_group" not in err
    (line,) = complaints(err)
    assert line.startswith("cifar: stopped by signal 15 after step 2;")
    code, _, err = finish(start(*launch, "-m", "cifar", "train", "--resume", tmp_path / "run"))
    assert code == 0 and "destroy_process_group" not in err, err
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 6]


@pytest.mark.slow
def test_a_compiled_model_trains_on_the_gpu() -> None:
    compiled, eager = trained(compile=True), trained()
    assert compiled.check() == 0
    torch.testing.assert_close(compiled.weights(), eager.weights(), rtol=1e-2, atol=1e-2)
