"""Checkpoints and final weights on disk: safetensors and JSON in folders that are whole or absent.

A folder is written under a temporary name, its files are synced and check-summed, then it is
renamed. A reader therefore sees a complete checkpoint or none, and a flipped bit is noticed.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cifar.config import TrainConfig, require
from cifar.data.loader import Normalization
from cifar.errors import CheckpointError, ConfigError
from cifar.files import PARTIAL, sweep, sync_folder
from cifar.meter import MeterState
from cifar.serialize import STRICT, from_json, to_json
from cifar.weights import CARD, MANIFEST, STEP_PREFIX, WEIGHTS, find_weights, list_checkpoints

Tensors = dict[str, Tensor]
T = TypeVar("T")

_STATE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """All that is needed to use weights: what they are, what they were trained on and how.

    `config` is resolved: it names the precision, and its model the classes and channels of the
    data. `averaged`: whether `model.safetensors` beside the card holds the moving average of the
    weights, as it does in `final` of a run with one; a checkpoint has that in `ema.safetensors`.
    """

    __pydantic_config__: ClassVar = STRICT

    config: TrainConfig
    averaged: bool
    dataset: str
    fingerprint: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    step: int
    samples_seen: int

    def __post_init__(self) -> None:
        require(self.config.precision is not None, "config.precision", None, "must be resolved")
        model = self.config.model
        few = f"must name {model.num_classes} classes"
        require(len(self.classes) == model.num_classes, "classes", len(self.classes), few)
        require(min(self.image_size) > 0, "image_size", self.image_size, "give 1 pixel or more")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            good = all(least < value < math.inf for value in values)
            remedy = f"give {model.in_channels} finite numbers above {least}"
            require(good and len(values) == model.in_channels, name, values, remedy)

    @property
    def normalization(self) -> Normalization:
        """What the network's input was normalised with."""
        return Normalization(mean=self.mean, std=self.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class BestEpoch:
    """The epoch, counted from 1, whose weights scored the highest top-1 on the held-out images."""

    __pydantic_config__: ClassVar = STRICT

    epoch: int
    top1: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """A checkpoint's `state.json`: what the rest of the run depends on beside the tensors.

    `epoch_seconds`: of the present epoch, spent in training so far. `best`: of the epochs that were
    evaluated before, where the recipe chooses one.
    """

    __pydantic_config__: ClassVar = STRICT

    format: Literal[1]
    step: int
    total_steps: int
    fingerprint: str
    meter: MeterState
    ema_updates: int
    scaler: dict[str, int | float] | None
    epoch_seconds: float
    best: BestEpoch | None = None


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder of files with a manifest of their SHA-256 sums: all of it or nothing.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    temporary = folder.with_name(f"{PARTIAL}{folder.name}")
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
    doomed = folder.with_name(f"{PARTIAL}old-{folder.name}")
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
        raise CheckpointError(
            f"checkpoint: {folder}: {error.filename} is missing; use another one"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint: {folder}: cannot be read: {error}; use another one"
        ) from None
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != sums[name]:
            raise CheckpointError(
                f"checkpoint: {folder / name}: does not match its checksum; use an older one"
            )
    return files


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensors], card: ModelCard, state: TrainState | None = None
) -> None:
    """Write groups of tensors (`model`, `optimizer`, ...), the card and what else is to go on."""
    files = {
        f"{group}.safetensors": save({k: v.detach().cpu().contiguous() for k, v in some.items()})
        for group, some in tensors.items()
    }
    files[CARD] = to_json(card, indent=2).encode()
    if state is not None:
        files[_STATE] = to_json(state, indent=2).encode()
    write_folder(folder, files)


def read_card(files: dict[str, bytes], where: Path) -> ModelCard:
    """What the weights are; raises CheckpointError as `read_state` does."""
    return _read_json(ModelCard, files, CARD, where)


def read_state(files: dict[str, bytes], where: Path) -> TrainState:
    """The trainer's counters; raises CheckpointError if absent or not of this version."""
    return _read_json(TrainState, files, _STATE, where)


def _read_json(cls: type[T], files: dict[str, bytes], name: str, where: Path) -> T:
    if name not in files:
        raise CheckpointError(f"checkpoint: {where}: has no {name}; use another one")
    try:
        return from_json(cls, files[name], source=name)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint: {where}: {error}") from None


def read_tensors(files: dict[str, bytes], group: str, where: Path) -> Tensors:
    """One group of tensors, in the order of their names; raises CheckpointError if it is absent or
    damaged.

    safetensors gives every process an order of its own, and what processes exchange has to be in
    one.
    """
    name = f"{group}.safetensors"
    if name not in files:
        raise CheckpointError(f"checkpoint: {where}: has no {name}; use another one")
    try:
        return dict(sorted(load(files[name]).items()))
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {where / name}: {error}; use another one") from None


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under a run's `checkpoints` folder."""
    return root / f"{STEP_PREFIX}{step:09d}"


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint's folder gives."""
    return int(_number(folder))


def _number(folder: Path) -> str:
    return folder.name.removeprefix(STEP_PREFIX)


def newest_whole(
    folders: Sequence[Path],
) -> tuple[tuple[Path, dict[str, bytes]] | None, list[str]]:
    """The last of these checkpoints that is whole, and its files; None if none is.

    And what is wrong with those after it, a line each.
    """
    faults: list[str] = []
    for folder in reversed(folders):
        try:
            files = read_folder(folder)
            for name in (_STATE, CARD, WEIGHTS):
                if name not in files:
                    raise CheckpointError(f"checkpoint: {folder}: has no {name}")
            return (folder, files), faults
        except CheckpointError as error:
            faults.append(str(error))
    return None, faults


def prune(newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep` - 1 checkpoints before it; delete what was left half written.

    Later ones, which a resumed run found damaged, stay until it writes them anew.
    """
    root = newest.parent
    past = [folder for folder in list_checkpoints(root) if folder.name <= newest.name]
    for old in past[:-keep]:
        remove_folder(old)
    sweep(root)


def load_weights(path: Path) -> tuple[ModelCard, Tensors]:
    """Read the weights that `path` means (see `cifar.weights`), and what they are.

    Raises:
        CheckpointError: nothing there, it is damaged, or its card is of another version.
    """
    file = find_weights(path)
    files = read_folder(file.parent)
    return read_card(files, file.parent), read_tensors(files, file.stem, file.parent)


def load_into(module: torch.nn.Module, weights: Tensors, where: str) -> None:
    """Copy weights into a module whose every tensor they must match.

    Raises:
        CheckpointError: they are of another model; names the first difference.
    """
    own = module.state_dict()
    check_same_shapes(own, weights, where)
    own.update(weights)  # which bears the versions of the module's parts as well
    module.load_state_dict(own)


def check_same_shapes(own: Tensors, weights: Tensors, where: str) -> None:
    """Raise a CheckpointError that names the first tensor that only one has or whose shape differs.

    `where` says in the message what is read.
    """
    if told := difference(own, weights):
        raise CheckpointError(
            f"checkpoint: {where}: weights of another model: {told}; use weights and configuration "
            "of one run"
        )


def difference(own: Tensors, weights: Tensors) -> str:
    """The first tensor that only one has or whose shape differs: `NAME is A, must be B`; or ""."""
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own or own[name].shape != weights[name].shape:
            have = list(weights[name].shape) if name in weights else "absent"
            need = list(own[name].shape) if name in own else "absent"
            return f"{name} is {have}, must be {need}"
    return ""
