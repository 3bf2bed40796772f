"""What the tests of the engines run in every process: steps of several recipes, and checkpoints."""

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_dataset
from safetensors.torch import save_file
from torch import Tensor
from training import TINY, reset_accelerate, tiny_recipe

from cifar.checkpoint import read_folder, read_state, read_tensors, write_checkpoint
from cifar.config import RunConfig, TrainConfig
from cifar.distributed import barrier, leave
from cifar.errors import UnsupportedError
from cifar.trainer import Trainer
from cifar.training_state import card_of, load_state, state_of, tensor_groups

ON_GPU = torch.cuda.is_available()
PROCESSES = min(2, torch.cuda.device_count()) if ON_GPU else 2
STEPS = 4
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.5},
    "adamw": {"optimizer": "adamw", "lr": 0.003, "decay_norm_and_bias": False},
    "averaged": {"ema_decay": 0.5, "schedule": "one-cycle", "mixup": 0.4},
    "sam": {"sam_rho": 0.01},
    "muon": {"optimizer": "muon", "backbone_lr": 0.5},
    "frozen": {"frozen_epochs": 1},
}
"""Three steps an epoch, so that the layers that were frozen are trained in the last step."""
KEPT = "averaged"
"""The recipe that a checkpoint is written of after two steps."""


def build(name: str, parts: int = 1, **fields: Any) -> Trainer:
    """A trainer that takes its steps in so many parts of a batch on each process.

    On GPUs where there are any, which the tests that are no GPU's are not shown.
    """
    reset_accelerate()  # which has one precision for all trainers
    recipe = tiny_recipe(**RECIPES[name])
    config = TrainConfig(model=TINY, recipe=recipe, accumulation_steps=parts, **fields)
    return Trainer(config, RunConfig(cpu=not ON_GPU), make_dataset())


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


def main(folder: Path, ours: Path) -> None:
    """Write to `ours` what every recipe learns, and what goes on from checkpoints."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in RECIPES:
        try:
            trainer = build(name)
        except UnsupportedError:
            continue
        found[name] = everything(trainer, losses(trainer, STEPS))
    trainer = build("plain", precision="bf16")
    found["bf16"] = everything(trainer, losses(trainer, STEPS))
    trainer = build("plain", 2)
    found["parts"] = everything(trainer, losses(trainer, STEPS))
    trainer = build(KEPT)
    losses(trainer, 2)
    save_state(ours / "checkpoint", trainer)
    found["straight"] = everything(trainer, losses(trainer, 2))
    for name, source in (("again", ours), ("other", folder)):
        trainer = resumed(source / "checkpoint")
        found[name] = everything(trainer, losses(trainer, 2))
    for name, tensors in found.items():
        save_file(tensors, ours / f"{name}-{trainer.place.index}.safetensors")
    del trainer
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
