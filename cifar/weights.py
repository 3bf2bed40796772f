"""Where trained weights lie on disk, and the sum that they are known by. No torch in here."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from cifar.errors import CheckpointError
from cifar.files import is_file, subfolders

MANIFEST = "manifest.json"
"""Beside the files of a checkpoint, whose sums it holds."""
STEP_PREFIX = "step-"
"""Of the names of a run's checkpoints."""
WEIGHTS = "model.safetensors"
CARD = "model.json"
"""Beside them: what they are, see `cifar.checkpoint.ModelCard`."""
AVERAGE = "ema.safetensors"


def list_checkpoints(root: Path, name: str = "checkpoint") -> list[Path]:
    """Finished checkpoints, oldest first.

    Raises:
        UserError: the folder cannot be read; calls what it is for `name`.
    """
    found = subfolders(root, name)
    return [root / each for each in found if re.fullmatch(f"{STEP_PREFIX}[0-9]{{9}}", each)]


def find_weights(path: Path, name: str = "checkpoint") -> Path:
    """The file of weights that `path` means; messages call what they are for `name`.

    A file is taken as named. Of a run its final weights are meant, or else its newest checkpoint;
    in a folder an average of the weights takes precedence over the weights.

    Raises:
        CheckpointError: nothing there, or a file that holds no weights.
        UserError: nobody can tell, for a folder may not be searched or a name is too long.
    """
    is_named = path.name in (AVERAGE, WEIGHTS)
    if path.suffix == ".safetensors" and not is_named and is_file(path, name):
        raise CheckpointError(f"{name}: {path}: no weights of a model; name {WEIGHTS} or {AVERAGE}")
    candidates = iter([path.parent]) if is_named else _folders_of_weights(path, name)
    found = next((each for each in candidates if is_file(each / MANIFEST, name)), None)
    if found is None:
        raise CheckpointError(
            f"{name}: {path}: no weights there; give a run, a checkpoint or {WEIGHTS} in one"
        )
    if is_named:
        return path
    return found / (AVERAGE if is_file(found / AVERAGE, name) else WEIGHTS)


def _folders_of_weights(path: Path, name: str) -> Iterator[Path]:
    yield path
    yield path / "final"
    yield from reversed(list_checkpoints(path / "checkpoints", name))


def sha256_of(file: Path, name: str) -> str:
    """The SHA-256 sum of a file of weights, 64 hexadecimal digits.

    Raises:
        CheckpointError: it cannot be read; calls what it is for `name`.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{name}: {file}: cannot be read ({error.strerror}); give other weights"
        ) from None
