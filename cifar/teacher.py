"""A trained network that another one learns from: its answers to what the student sees."""

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from cifar.checkpoint import ModelCard
from cifar.config import ModelConfig, TrainConfig, check_teacher
from cifar.data.dataset import Dataset
from cifar.data.loader import Normalization
from cifar.errors import CheckpointError, ConfigError
from cifar.models.meta import check_images
from cifar.network import Network, few, load_network

EVENT = "cifar.teacher"
"""What a profile calls a teacher's part of a step, which is not the student's."""


class TeacherNetwork:
    """A network that answers images as a student sees them: in eval mode, without gradients.

    Where it was trained with another mean or deviation than the student, they are normalised anew.
    """

    def __init__(self, network: Network, seen: Normalization) -> None:
        """`seen` is the student's normalisation."""
        self.network = network
        own = network.card.normalization
        self._change = None if own == seen else _change(seen, own, network.device)

    @property
    def model_config(self) -> ModelConfig:
        """What network it is."""
        return self.network.card.config.model

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` float32 of images `[B, C, H, W]`, whatever they are mixed of."""
        with record_function(EVENT):
            if self._change is not None:
                scale, shift = self._change
                images = torch.addcmul(shift, images, scale)
            return self.network.logits(images).float()


def _change(seen: Normalization, own: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift `[1, C, 1, 1]` float32 from images normalised by `seen` to those by `own`.

    Of a pixel p the one is (p - m) / s, the other (p - n) / t = (p - m) / s * s / t + (m - n) / t.
    Mixing before or after makes no difference, for its shares sum to 1.
    """
    (seen_mean, seen_std), (own_mean, own_std) = (
        [torch.tensor(values, dtype=torch.float64) for values in (each.mean, each.std)]
        for each in (seen, own)
    )
    pair = seen_std / own_std, (seen_mean - own_mean) / own_std
    scale, shift = (each.float().view(1, -1, 1, 1).to(device) for each in pair)
    return scale, shift


def load_teacher(
    config: TrainConfig, dataset: Dataset, seen: Normalization, device: torch.device
) -> TeacherNetwork | None:
    """The teacher of a configuration whose precision is resolved, ready to see its images.

    Raises:
        UserError: it is missing or damaged, not the one it was, or knows other classes or channels.
    """
    teacher = config.distillation.teacher
    if teacher is None:
        return None
    check_teacher(teacher)
    try:
        network = load_network(
            Path(teacher.path),
            precision=config.precision,
            device=device,
            channels_last=config.channels_last,
        )
    except CheckpointError as error:
        raise CheckpointError(re.sub(r"\Acheckpoint: ", "teacher: ", str(error))) from None
    _check_suits(network.card, dataset, teacher.path)
    return TeacherNetwork(network, seen)


def _check_suits(card: ModelCard, dataset: Dataset, path: str) -> None:
    """Raise a CheckpointError if a teacher's answers are not to the student's question."""
    remedy = f"give one that was trained on images such as those of {dataset.name}"
    own, asked = card.classes, dataset.classes
    if own != asked:
        raise CheckpointError(
            f"teacher: {path}: its classes ({few(own, asked)}) are not those of {dataset.name} "
            f"({few(asked, own)}); {remedy}"
        )
    model, (channels, height, width) = card.config.model, dataset.train.images.shape[1:]
    sees = model.in_channels
    if sees != channels:
        raise CheckpointError(
            f"teacher: {path}: sees {sees} channels, {dataset.name} has {channels}; {remedy}"
        )
    if model.library:  # this program's own take images of any size
        try:
            check_images(model, (height, width), batch_size=2)
        except ConfigError as error:
            raise CheckpointError(f"teacher: {path}: {error}") from None
