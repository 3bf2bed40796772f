"""What the tests of the engines run in every process: steps of several recipes, checkpoints, and
what the suite observes and measures."""

import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import make_dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from training import TINY, reset_accelerate, tiny_recipe

from bench.measure.inference import measure_inference
from bench.measure.outcome import measure_size
from bench.measure.subject import Subject
from bench.observe import Witness
from bench.protocol import Protocol
from cifar.checkpoint import read_folder, read_state, read_tensors, write_checkpoint
from cifar.config import RunConfig, TrainConfig
from cifar.data.loader import TrainBatch
from cifar.distributed import barrier, leave
from cifar.errors import TrainingError, UnsupportedError
from cifar.losses import cross_entropy
from cifar.process import run_to_end
from cifar.trainer import Trainer
from cifar.training_state import card_of, load_state, set_aside, state_of, tensor_groups

ON_GPU = torch.cuda.is_available()
PROCESSES = min(2, torch.cuda.device_count()) if ON_GPU else 2
STEPS = 4
KEPT = "averaged"
"""The recipe that a checkpoint is written of after these steps."""
RECIPES: dict[str, dict[str, Any]] = {
    KEPT: {"ema_decay": 0.5, "schedule": "one-cycle", "mixup": 0.4},
    "adamw": {"optimizer": "adamw", "lr": 3e-3, "clip_norm": 0.5, "decay_norm_and_bias": False},
    "sam": {"sam_rho": 0.01, "clip_norm": 0.5},
    "muon": {"optimizer": "muon", "backbone_lr": 0.5},
    "frozen": {"frozen_epochs": 1},
    "roles": {"head_lr": 0.25, "norm_bias_lr": 2.0, "train_norm_scale": False, "clip_norm": 0.5},
    "plain": {},
}
"""Three steps an epoch, so that the layers that were frozen are trained in the last step."""
HALF = ("bf16", "fp16") if ON_GPU else ("bf16",)
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in RECIPES if name != "plain"},
    **{name: ("plain", {"precision": name, "accumulation_steps": 2}) for name in HALF},
    "compiled": ("plain", {"compile": True}),
}
"""Recipes, and precisions with accumulation, by name."""
PROTOCOL = Protocol(
    inference_batch_sizes=(2,),
    inference_iterations=3,
    inference_warmup=0,
    min_timed_seconds=0.0,
    throughput_seconds=0.01,
)


def build(name: str, parts: int = 1, compute_loss: Any = None, **fields: Any) -> Trainer:
    """A trainer that takes its steps in so many parts of a batch on each process.

    On GPUs where there are any, which the tests that are no GPU's are not shown.
    """
    reset_accelerate()  # which has one precision for all trainers
    recipe = tiny_recipe(**RECIPES[name])
    parts *= fields.pop("accumulation_steps", 1)
    config = TrainConfig(model=TINY, recipe=recipe, accumulation_steps=parts, **fields)
    graphs = functools.partial(torch.compile, backend="eager")  # without a code generator
    with (
        mock.patch("torch.compile", graphs),
        mock.patch("cifar.accelerator.check_compiler"),
    ):
        return Trainer(config, RunConfig(cpu=not ON_GPU), make_dataset(), compute_loss=compute_loss)


def losses(trainer: Trainer, steps: int) -> Tensor:
    """The mean loss over all processes of each of the next steps."""
    found = []
    for _ in range(steps):
        trainer.meter.reset()
        trainer.train_step()
        found.append(trainer.meter.train_metrics().loss)
    return torch.tensor(found, dtype=torch.float64)


def everything(trainer: Trainer, found: Tensor) -> dict[str, Tensor]:
    """Losses, whole weights and the whole state of the optimiser."""
    groups = {
        "weights": trainer.eval_weights(),
        "state": trainer.engine.optimizer_tensors(trainer.optimizer),
    }
    return {"losses": found} | {
        f"{group}.{name}": tensor.detach().clone().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def save_state(folder: Path, trainer: Trainer) -> None:
    tensors, state = state_of(trainer)
    if trainer.is_main:
        write_checkpoint(folder, tensors, card_of(trainer), state)
    barrier()


def resumed(folder: Path, parts: int = 1) -> Trainer:
    trainer, files = build(KEPT, parts), read_folder(folder)
    state = read_state(files, folder)
    groups = tensor_groups(trainer, state)
    load_state(trainer, {each: read_tensors(files, each, folder) for each in groups}, state)
    return trainer


def steep(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """A loss that is finite, and whose gradient is not."""
    loss, logits = cross_entropy(0.0)(model, batch)
    return (loss - loss.detach()) * 1e30 * 1e30, logits


def observed(trainer: Trainer) -> dict[str, Any]:
    """What the suite sees of a trainer's step, and measures of its weights."""
    witness = Witness(trainer)
    witness.before_window()
    subject = Subject(trainer, PROTOCOL)
    taken = [*measure_size(subject), *measure_inference(subject)]
    return {
        **witness.effective(),
        **{each.name: each.value for each in taken},
        "statuses": sorted({each.status for each in taken}),
    }


def told_of_overflow() -> str:
    trainer = build("plain", compute_loss=steep)
    try:
        trainer.train_step()
    except TrainingError as error:
        return str(error)
    return "nothing"


def main(folder: Path, ours: Path) -> None:
    """Write to `ours` what every recipe learns, and what goes on from checkpoints."""
    found: dict[str, dict[str, Tensor]] = {}
    seen: dict[str, Any] = {}
    for name, (recipe, fields) in SUBJECTS.items():
        try:
            trainer = build(recipe, **fields)
        except UnsupportedError:
            continue
        found[name] = everything(trainer, losses(trainer, STEPS))
        if name == KEPT:
            with set_aside(trainer):
                losses(trainer, 1)
            found["aside"] = everything(trainer, found[name]["losses"])
            save_state(ours / "checkpoint", trainer)
            found["straight"] = everything(trainer, losses(trainer, 1))
        if name == "bf16":
            seen = observed(trainer)
    seen["overflow"] = told_of_overflow()
    if trainer.is_main:
        (ours / "seen.json").write_text(json.dumps(seen))
    for name, source in (("again", ours), ("other", folder)):
        trainer = resumed(source / "checkpoint")
        found[name] = everything(trainer, losses(trainer, 1))
    for name, tensors in found.items():
        save_file(tensors, ours / f"{name}-{trainer.place.index}.safetensors")
    del trainer
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    run_to_end(lambda: 0)
