"""What only a CUDA device can show. `-m gpu` runs them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset
from training import TINY, cifar, make_trainer, metrics

from cifar.config import RunConfig
from cifar.errors import TrainingError
from cifar.trainer import Trainer

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
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    floating = [t for t in trainer.weights().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert trainer.evaluate().samples == 50


def test_the_first_loss_on_a_gpu_is_that_on_a_cpu() -> None:
    gpu = trained(1)
    cpu = make_trainer()
    cpu.train_step()
    on_gpu, on_cpu = gpu.meter.train_metrics(), cpu.meter.train_metrics()
    assert on_gpu.samples == on_cpu.samples
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)


def test_the_gpu_reads_its_counters_at_intervals() -> None:
    assert make_trainer(run=GPU).check_every == 20


def test_a_step_never_waits_for_the_gpu() -> None:
    trainer = trained(2, precision="bf16" if supports("bf16") else "fp32")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step()  # the third step of the first epoch
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    tensors, counters = trainer.state()
    stored = {group: {k: v.cpu().clone() for k, v in some.items()} for group, some in
              tensors.items()}  # fmt: skip
    other = make_trainer(run=GPU, precision="fp16")
    other.load_state(stored, counters)
    other.train_step()
    assert float(other.scaler.get_scale()) == 128.0
    assert all(tensor.device.type == "cuda" for tensor in other.weights().values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_is_resumed_on_the_gpu(tmp_path: Path, optimizer: str) -> None:
    data = make_dataset()
    arrays = {
        "train_images": data.train.images, "train_labels": data.train.labels,
        "test_images": data.test.images, "test_labels": data.test.labels,
    }  # fmt: skip
    np.savez(tmp_path / "toy.npz", **arrays)
    run = tmp_path / "run"
    assert cifar("train", "--model", TINY.label, "--data", f"npz:{tmp_path / 'toy.npz'}", "-b", 32,
                 "--epochs", 2, "--lr", "0.01", "--optimizer", optimizer, "--ema-decay", "0.9",
                 "--channels-last", "--output-dir", run) == 0  # fmt: skip
    before = metrics(run)
    assert cifar("train", "--resume", run) == 0
    assert metrics(run) == before and len(before) == 2


@pytest.mark.slow
def test_a_compiled_model_trains_on_the_gpu() -> None:
    compiled, eager = trained(compile=True), trained()
    assert compiled.check() == 0
    torch.testing.assert_close(compiled.weights(), eager.weights(), rtol=1e-2, atol=1e-2)
