"""Saved weights as a network that infers on a device."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar.checkpoint import ModelCard, Tensors, load_into, load_weights
from cifar.config import PRECISIONS
from cifar.emulation import emulate_if_needed
from cifar.models import build_model
from cifar.precision import allow_tf32, check_supported
from cifar.weights import find_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Saved weights that are ready to infer on a device, in a precision."""

    file: Path
    card: ModelCard
    precision: str
    module: nn.Module
    device: torch.device

    def logits(self, images: Tensor) -> Tensor:
        """Of normalised images `[B, C, H, W]` on the device: `[B, K]`, under autocast as due."""
        name = PRECISIONS[self.precision].autocast
        dtype = getattr(torch, name) if name else torch.float32
        with torch.autocast(self.device.type, dtype, enabled=name is not None):
            logits: Tensor = self.module(images)
        return logits


def load_network(
    path: Path, *, precision: str | None, device: torch.device, channels_last: bool | None = None
) -> Network:
    """The network of a checkpoint, in the precision and layout it was trained in where None.

    Raises:
        CheckpointError: no weights there, or damaged.
        UnsupportedError: the device cannot run the precision.
    """
    file = find_weights(path)
    card, weights = load_weights(file)
    name = precision or card.config.precision
    assert name is not None, "a card's is resolved"
    check_supported(name, device)
    allow_tf32(PRECISIONS[name].tf32)
    nhwc = card.config.channels_last if channels_last is None else channels_last
    module = _module(card, weights, str(file), channels_last=nhwc).to(device)
    emulate_if_needed(module, name, device)
    return Network(file=file, card=card, precision=name, module=module, device=device)


def _module(card: ModelCard, weights: Tensors, source: str, *, channels_last: bool) -> nn.Module:
    module = build_model(card.config.model).eval()
    load_into(module, weights, source)
    return module.to(memory_format=torch.channels_last) if channels_last else module


def few(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    """Three class names for a message of one line: the first, or those where `others` differ."""
    pairs = enumerate(zip(classes, others, strict=False))
    start = next((number for number, (one, other) in pairs if one != other), 0)
    start = start if start > 2 else 0
    some = classes[start : start + 3]
    whole = f", ... {len(classes)} in all" if len(some) < len(classes) else ""
    return "..., " * bool(start) + ", ".join(some) + whole
