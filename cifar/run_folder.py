"""A training run on disk: `config.json`, `metrics.jsonl`, `checkpoints/` and `final/`."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cifar.config import OPTION_NAMES, RunConfig, TrainConfig, check_same_teacher, require
from cifar.errors import CheckpointError, CifarError, ConfigError
from cifar.files import LOCK, locked, made, sweep, user_path, write_atomic
from cifar.serialize import STRICT, contents, from_json, to_dict, to_json

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

    While entered no other process can train there. If the run ends before it starts to train, the
    folder is removed again with those made around it, unless it was there before.

    Raises:
        ConfigError: the folder holds something already, or cannot be written.
    """
    if asked is not None:
        choices = iter([user_path(asked, "output-dir")])
    else:
        choices = _names(name_of(config))
    with contextlib.ExitStack() as stack:
        yield _first_free(choices, stack)


def name_of(config: TrainConfig) -> str:
    """What a folder is called that is made now: model, images and time."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    model = config.model.label.replace(":", "-")  # which copying programs take for a machine
    return f"{model}-{config.data.source}-{moment}"


def _names(name: str) -> Iterator[Path]:
    """Several, because two runs may start in the same second."""
    yield Path("runs", "train", name)
    for number in itertools.count(2):
        yield Path("runs", "train", f"{name}-{number}")


def _first_free(choices: Iterator[Path], stack: contextlib.ExitStack) -> Path:
    """Take the first folder that holds nothing, until `stack` is closed."""
    folder = Path()
    for folder in choices:
        try:
            stack.enter_context(_taken(folder))
            return folder
        except (FileExistsError, BlockingIOError):
            continue  # it holds something, or another run has just started there
        except OSError as error:
            raise ConfigError(
                f"output-dir: '{folder}': cannot be written ({error.strerror}); choose another"
            ) from None
    raise ConfigError(
        f"output-dir: '{folder}': no empty folder; choose another, or if it is a run with "
        "checkpoints continue with --resume"
    )


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Make and lock a folder; what this has made goes again if no run has started there.

    Raises:
        FileExistsError: it is a file or holds something.
        BlockingIOError: another process has locked it.
        OSError: it cannot be written.
    """
    with made(folder):
        _check_empty(folder)
        with locked(folder):
            _check_empty(folder)  # another run may have come and gone until now
            try:
                yield
            finally:
                forget(folder)


def forget(folder: Path) -> None:
    """Leave nothing of a run that never began in the folder that this process has locked."""
    with contextlib.suppress(OSError):
        if not (folder / CONFIG).exists():
            (folder / LOCK).unlink()


def _check_empty(folder: Path) -> None:
    """Raise a FileExistsError if a folder holds more than the lock of a run that never started."""
    if any(path.name != LOCK for path in folder.iterdir()):
        raise FileExistsError(folder)


@contextlib.contextmanager
def resumed(folder: Path) -> Iterator[None]:
    """While entered no other process can train in the folder of a run.

    Raises:
        CheckpointError: one does.
        ConfigError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            sweep(folder)
        except BlockingIOError:
            raise in_use(folder) from None
        except OSError as error:
            raise ConfigError(
                f"resume: '{folder}': cannot be written ({error.strerror}); copy the run to a "
                "folder that can"
            ) from None
        yield


def in_use(folder: Path) -> CheckpointError:
    """What to raise where another process has locked a run's folder."""
    return CheckpointError(
        f"resume: '{folder}': another process is training there; wait for it or stop it"
    )


def read_config(folder: Path) -> StoredConfig:
    """The configuration a run was started with.

    Raises:
        CheckpointError: `folder` is no run, or cannot be read.
        ConfigError: its configuration is damaged, or of another version.
    """
    try:
        text = (folder / CONFIG).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"resume: '{folder}': no run there (it has no {CONFIG}); give the folder of a run, "
            "which every machine of a job must see"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"resume: '{folder}': cannot be read ({error.strerror}); give another run"
        ) from None
    return from_json(StoredConfig, text, source=str(folder / CONFIG))


def write_config(folder: Path, train: TrainConfig, run: RunConfig) -> None:
    """Note the configuration of a run, with the precision that was resolved."""
    replace_file(folder / CONFIG, to_json(StoredConfig(train=train, run=run), indent=2) + "\n")


def check_same(stored: StoredConfig, train: TrainConfig, run: RunConfig, folder: Path) -> None:
    """Raise a UserError that names the first option that the run in a folder cannot change.

    Its teacher must be found as well, with the same weights. The folder may have another name than
    it had, or be written in another way.
    """
    asked = run.output_dir
    if asked not in (None, stored.run.output_dir):
        same = user_path(str(asked), "output-dir").resolve() == folder.resolve()
        remedy = f"the run to resume is in {str(folder)!r}; leave it out, or start a new run"
        require(same, "output-dir", asked, remedy)
    check_same_teacher(train.distillation.teacher, stored.train.distillation.teacher)
    compared = [
        (options_of(each, contents), options_of(each, to_dict)) for each in (stored.train, train)
    ]
    (before, all_before), (now, all_now) = compared
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{name}: {all_now[name]!r}: the run to resume has {all_before[name]!r}; "
                "leave it out, or start a new run"
            )


def options_of(
    train: TrainConfig, fields: Callable[[TrainConfig], dict[str, Any]]
) -> dict[str, Any]:
    """What must not differ of these fields, by the options' names; files may have moved."""
    weights = train.model.pretrained
    alone = dataclasses.replace(train, model=dataclasses.replace(train.model, pretrained=None))
    flat = _flat({**fields(alone), "data": train.data.source})
    options = {
        OPTION_NAMES.get(name, OPTION_NAMES.get(last := name.rpartition(".")[2], last)): value
        for name, value in flat.items()
    }
    options |= {"recipe": train.recipe.name, "pretrained": weights and weights.identity}
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
        raise _unwritable(path, error) from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines so far, one per epoch; a torn last line is left out.

    Raises:
        CheckpointError: another line is damaged, or the file cannot be read.
    """
    path = folder / METRICS
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise CheckpointError(
            f"resume: {path}: cannot be read ({error.strerror}); make it readable"
        ) from None
    whole = content[: content.rfind(b"\n") + 1]
    return [
        _metrics_line(line, f"{path}: line {number}")
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1)
    ]


def _metrics_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise CheckpointError(f"{where}: not the metrics of an epoch; correct it or take it out")
    return found


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop the lines after `step`, whose epochs will be trained again."""
    if not (folder / METRICS).exists():
        return
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
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> CifarError:
    return CifarError(
        f"{path}: cannot be written: {error.strerror}; make room, then continue with --resume"
    )
