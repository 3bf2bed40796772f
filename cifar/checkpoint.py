"""Checkpoints and final weights on disk: safetensors and JSON in folders that are whole or absent.

A folder is written under a temporary name, its files are synced and check-summed, then it is
renamed. A reader therefore sees a complete checkpoint or none, and a flipped bit is noticed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cifar.config import ModelConfig
from cifar.data.loader import Normalization
from cifar.errors import CheckpointError
from cifar.files import sync_folder
from cifar.serialize import STRICT, from_json, to_json

Tensors = dict[str, Tensor]

MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """All that is needed to use weights: what they are, what they were trained on and how."""

    __pydantic_config__: ClassVar = STRICT

    model: ModelConfig
    dataset: str
    fingerprint: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    channels_last: bool
    recipe: str
    step: int
    samples_seen: int

    @property
    def normalization(self) -> Normalization:
        """What the network's input was normalised with."""
        return Normalization(mean=self.mean, std=self.std)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files with a manifest of their SHA-256 sums: all of it or nothing.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    temporary = folder.with_name(f"{_TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    try:
        temporary.mkdir(parents=True)
        for name, content in {**files, MANIFEST: json.dumps(sums, indent=2).encode()}.items():
            with (temporary / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(temporary)
        if folder.exists():
            remove_folder(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Take a folder out of sight before its files go, so that it is never seen incomplete."""
    doomed = folder.with_name(f"{_TEMPORARY}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder written by `write_folder`, their checksums verified.

    Raises:
        CheckpointError: no such folder, a file missing or changed.
    """
    try:
        sums = dict(json.loads((folder / MANIFEST).read_bytes()))
        files = {name: (folder / Path(name).name).read_bytes() for name in sums}
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint: {folder}: {error.filename} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {folder}: cannot be read: {error}") from None
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != sums[name]:
            raise CheckpointError(
                f"checkpoint: {folder / name}: does not match its checksum; use an older one"
            )
    return files


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensors], card: ModelCard, state: dict[str, Any]
) -> None:
    """Write groups of tensors (`model`, `optimizer`, ...), the card and the trainer's counters."""
    files = {
        f"{group}.safetensors": save({k: v.detach().cpu().contiguous() for k, v in some.items()})
        for group, some in tensors.items()
    }
    files["model.json"] = to_json(card, indent=2).encode()
    files["state.json"] = json.dumps(state, indent=2, allow_nan=False).encode()
    write_folder(folder, files)


def read_tensors(files: dict[str, bytes], group: str, where: Path) -> Tensors:
    """One group of tensors; raises CheckpointError if it is absent or damaged."""
    name = f"{group}.safetensors"
    if name not in files:
        raise CheckpointError(f"checkpoint: {where}: has no {name}")
    try:
        return load(files[name])
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {where / name}: {error}") from None


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under a run's `checkpoints` folder."""
    return root / f"{_PREFIX}{step:09d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint's folder gives."""
    return int(folder.name.removeprefix(_PREFIX))


def newest_whole(
    folders: Sequence[Path], warn: Callable[[str], None]
) -> tuple[Path, dict[str, bytes]] | None:
    """The last of these checkpoints that is whole, and its files; None if none is.

    What is wrong with those after it is told to `warn`.
    """
    for folder in reversed(folders):
        try:
            return folder, read_folder(folder)
        except CheckpointError as error:
            warn(f"warning: {error}")
    return None


def prune(newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep` - 1 checkpoints before it; delete what was left half written.

    Later ones, which a resumed run found damaged, stay until it writes them anew.
    """
    root = newest.parent
    past = [folder for folder in list_checkpoints(root) if folder.name <= newest.name]
    for old in past[:-keep]:
        remove_folder(old)
    for left_over in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left_over, ignore_errors=True)


def load_weights(path: Path) -> tuple[ModelCard, Tensors]:
    """Read the weights to evaluate, and what they are, from a run or a checkpoint.

    `path` is a run (its final weights, or else its newest checkpoint), a checkpoint folder or the
    `model.safetensors` in one. An average of the weights takes precedence over the weights.

    Raises:
        CheckpointError: nothing there, or it is damaged.
    """
    folder = path.parent if path.name == "model.safetensors" else path
    candidates = [folder, folder / "final", *reversed(list_checkpoints(folder / "checkpoints"))]
    found = next((each for each in candidates if (each / MANIFEST).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"checkpoint: {path}: no weights there; give a run, a checkpoint or model.safetensors"
        )
    files = read_folder(found)
    if "model.json" not in files:
        raise CheckpointError(f"checkpoint: {found}: has no model.json")
    card = from_json(ModelCard, files["model.json"], source=str(found / "model.json"))
    return card, read_tensors(files, "ema" if "ema.safetensors" in files else "model", found)


def load_into(module: torch.nn.Module, weights: Tensors, where: str) -> None:
    """Copy weights into a module whose every tensor they must match.

    Raises:
        CheckpointError: they are of another model; names the first difference.
    """
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own or own[name].shape != weights[name].shape:
            have = list(weights[name].shape) if name in weights else "absent"
            need = list(own[name].shape) if name in own else "absent"
            raise CheckpointError(
                f"checkpoint: {where}: weights of another model: {name} is {have}, must be {need}"
            )
    module.load_state_dict(weights)
