"""A training run on disk: `config.json`, `metrics.jsonl`, `checkpoints/` and `final/`."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cifar.config import OPTION_NAMES, RunConfig, TrainConfig
from cifar.errors import CheckpointError, CifarError, ConfigError
from cifar.files import write_atomic
from cifar.serialize import STRICT, contents, from_json, to_json

CONFIG = "config.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredConfig:
    """What `config.json` holds."""

    __pydantic_config__: ClassVar = STRICT

    train: TrainConfig
    run: RunConfig


@contextlib.contextmanager
def created(config: TrainConfig, asked: str | None) -> Iterator[Path]:
    """The folder of a new run, the one asked for or else runs/train/<model>-<data>-<UTC time>.

    It is removed again if the run ends before it starts to train.

    Raises:
        ConfigError: the folder holds something already, or cannot be written.
    """
    if asked is not None:
        folder = create(Path(asked))
    else:
        moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder = _first_free(f"{config.model.label}-{config.data.source}-{moment}")
    try:
        yield folder
    finally:
        claim = folder / CONFIG
        if claim.exists() and claim.stat().st_size == 0:
            claim.unlink()
            folder.rmdir()


def _first_free(name: str) -> Path:
    """Two runs may start in the same second."""
    for number in itertools.count(1):
        folder = Path("runs", "train", name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            with contextlib.suppress(FolderTakenError):
                return create(folder)
    raise AssertionError("unreachable")


class FolderTakenError(ConfigError):
    """The folder of a new run holds something already."""


def create(folder: Path) -> Path:
    """Make the folder of a new run and claim it with an empty `config.json`.

    Raises:
        FolderTakenError: it holds something already.
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
        if not taken:
            (folder / CONFIG).touch(exist_ok=False)
    except FileExistsError:
        taken = True
    except OSError as error:
        raise ConfigError(
            f"output-dir: '{folder}': cannot be written ({error.strerror}); choose another"
        ) from None
    if taken:
        raise FolderTakenError(
            f"output-dir: '{folder}': no empty folder; choose another, continue with --resume, or "
            "delete it if its run never started (an empty config.json)"
        )
    return folder


def read_config(folder: Path) -> StoredConfig:
    """The configuration a run was started with; raises CheckpointError if `folder` is no run."""
    try:
        text = (folder / CONFIG).read_bytes()
    except OSError:
        raise CheckpointError(
            f"resume: '{folder}': no run there (it has no {CONFIG}); give the folder of a run"
        ) from None
    if not text:
        raise CheckpointError(
            f"resume: '{folder}': its run was ended before it started; delete it and start anew"
        )
    return from_json(StoredConfig, text, source=str(folder / CONFIG))


def write_config(folder: Path, train: TrainConfig, run: RunConfig) -> None:
    """Note the configuration of a run, with the precision that was resolved."""
    replace_file(folder / CONFIG, to_json(StoredConfig(train=train, run=run), indent=2) + "\n")


def check_same(stored: StoredConfig, train: TrainConfig, run: RunConfig) -> None:
    """Raise a ConfigError that names the first option that a resumed run cannot change."""
    before, now = _options(stored.train, stored.run), _options(train, run)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{name}: {now.get(name, 'default')!r}: the run to resume has "
                f"{before.get(name, 'default')!r}; leave it out, or start a new run"
            )


def _options(train: TrainConfig, run: RunConfig) -> dict[str, Any]:
    """What must not change, by the options' names; CIFAR itself may have moved."""
    flat = _flat({**contents(train), "data": str(dataclasses.replace(train.data, root=None))})
    options = {
        OPTION_NAMES.get(name, OPTION_NAMES.get(last := name.rpartition(".")[2], last)): value
        for name, value in flat.items()
    }
    options |= {"recipe": train.recipe.name, "output-dir": run.output_dir}
    return {name.replace("_", "-"): value for name, value in options.items()}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(
            _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
        )
    return flat


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add one epoch's line."""
    path = folder / METRICS
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CifarError(f"{path}: cannot be written: {error.strerror}") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines so far, one per epoch; a torn last line is left out."""
    path = folder / METRICS
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the lines after `step`, whose epochs will be trained again."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    replace_file(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def replace_file(path: Path, text: str) -> None:
    """Put a new file in the place of an old one, whole or not at all.

    Raises:
        CifarError: it cannot be written.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise CifarError(f"{path}: cannot be written: {error.strerror}") from None
