"""Files of weights from anywhere: read without running what is in them, and put into a network."""

import hashlib
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from cifar.checkpoint import Tensors, difference
from cifar.errors import ConfigError

_HOLDERS = ("state_dict", "model")
"""Keys under which training programs keep the weights in a file with other things."""


def read_file(path: Path, sha256: str, shown: str) -> Tensors:
    """The tensors of a .safetensors, .pt or .pth file whose checksum begins with `sha256`.

    `shown` is what the user wrote for it.

    Raises:
        ConfigError: it cannot be read, its checksum is another one, or it holds no weights.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}); put it back, or give another file"
        raise ConfigError(f"pretrained: {shown!r}: {reason}") from None
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(sha256):
        raise ConfigError(
            f"pretrained: {shown!r}: the SHA-256 of {path} is {found}, must begin with {sha256}: "
            "damaged or another file; remove it, or give another one"
        )
    return _parsed(content, path.suffix, shown)


def _parsed(content: bytes, suffix: str, shown: str) -> Tensors:
    reason = ""
    found: Any = None
    try:
        if suffix == ".safetensors":
            found = load(content)
        else:
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of the formats' readers, whose kinds are not theirs to promise
        reason = f" ({(str(error).splitlines() or [type(error).__name__])[0]})"
    holder = next((name for name in _HOLDERS if isinstance(found, dict) and name in found), None)
    weights = found if holder is None else found[holder]
    if not isinstance(weights, dict) or not weights or not all(map(_is_named, weights.items())):
        raise ConfigError(
            f"pretrained: {shown!r}: holds no tensors by name{reason}; give a .safetensors file, "
            "or the state dict of a module as a .pt or .pth file"
        )
    return weights


def _is_named(item: tuple[object, object]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, Tensor)


def put_into(
    module: nn.Module,
    weights: Tensors,
    head: Collection[str],
    shown: str,
    *,
    new_head: bool = False,
) -> None:
    """Copy weights into a module; the tensors named in `head` stay new if any has another shape.

    With `new_head` they do so in any case.

    Raises:
        ConfigError: one of the others is missing, not the module's, or of another shape.
    """
    own = module.state_dict()
    is_new = new_head or any(
        name in weights and weights[name].shape != own[name].shape for name in head
    )
    taken = {name: each for name, each in weights.items() if not (is_new and name in head)}
    kept = {name: own[name] for name in head} if is_new else {}
    if told := difference(own, taken | kept):
        raise ConfigError(f"pretrained: {shown!r}: of another network: {told}; give its own ones")
    own.update(taken)  # which bears the versions of the module's parts as well
    module.load_state_dict(own)
