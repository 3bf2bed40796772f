"""A training run on disk: `config.json`, `metrics.jsonl`, `checkpoints/` and `final/`."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cifar.config import RunConfig, TrainConfig
from cifar.errors import CheckpointError, CifarError, ConfigError, UserError
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
def created(folder: Path) -> Iterator[Path]:
    """The folder of a new run; it is removed again if bad input ends the run before it starts."""
    create(folder)
    try:
        yield folder
    except UserError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


def default_folder(config: TrainConfig) -> Path:
    """runs/train/<model>-<data>-<UTC time>."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Path("runs", "train", f"{config.model.label}-{config.data.source}-{moment}")


def create(folder: Path) -> Path:
    """Make the folder of a new run.

    Raises:
        ConfigError: it holds something already, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(
                f"output-dir: '{folder}': not empty; choose another, or continue it with --resume"
            )
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output-dir: '{folder}': cannot be written ({error.strerror}); choose another"
        ) from None
    return folder


def read_config(folder: Path) -> StoredConfig:
    """The configuration a run was started with; raises CheckpointError if `folder` is no run."""
    try:
        text = (folder / CONFIG).read_bytes()
    except OSError:
        raise CheckpointError(
            f"resume: '{folder}': no run there (it has no {CONFIG}); give the folder of a run"
        ) from None
    return from_json(StoredConfig, text, source=str(folder / CONFIG))


def write_config(folder: Path, train: TrainConfig, run: RunConfig) -> None:
    """Note the configuration of a run, with the precision that was resolved."""
    replace_file(folder / CONFIG, to_json(StoredConfig(train=train, run=run), indent=2) + "\n")


def check_same(stored: TrainConfig, asked: TrainConfig) -> None:
    """Raise a ConfigError that names the first option that differs from the run's."""
    before, now = _flat(contents(stored)), _flat(contents(asked))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{name.split('.')[-1]}: {now.get(name, 'default')!r}: the run to resume has "
                f"{before.get(name, 'the default')!r}; leave it out, or start a new run"
            )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(
            _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
        )
    return flat


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add one epoch's line."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
    """Put a new file in the place of an old one, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CifarError(f"{path}: cannot be written: {error.strerror}") from None
