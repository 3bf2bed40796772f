"""Starting a network from weights that were trained before, and what they expect of its images."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from cifar.config import ModelConfig, require
from cifar.models.libraries import Statistics, published_weights, statistics
from cifar.models.meta import head_names
from cifar.models.weights import put_into, read_file


def start_from_pretrained(
    module: nn.Module, config: ModelConfig, classes: Sequence[str] = ()
) -> None:
    """Give a fresh network the weights that its configuration names, if it names any.

    The classifier keeps its own where it has other classes than theirs: as many as a run's, but
    of other names, too, where both are known.

    Raises:
        ConfigError: they cannot be fetched or read, or are of another network.
    """
    chosen = config.pretrained
    if chosen is None:
        return
    if chosen.sha256 is None:
        weights = published_weights(config)
    else:
        require(chosen.path is not None, "pretrained", chosen.identity, "has no path; name it anew")
        weights = read_file(Path(chosen.path or ""), chosen.sha256, str(chosen))
    known = bool(classes and chosen.classes)
    others = known and tuple(classes) != chosen.classes
    put_into(module, weights, head_names(config), str(chosen), new_head=others)


def expected_statistics(config: ModelConfig) -> Statistics | None:
    """The mean and deviation by channel that pretrained weights saw; None if nobody knows of any.

    Of a run's weights those of its images, else those of the library's published ones.

    Raises:
        ConfigError: they are of other channels than the images.
    """
    chosen = config.pretrained
    if chosen is None:
        return None
    if chosen.mean is not None and chosen.std is not None:
        found = chosen.mean, chosen.std
    elif config.library:
        found = statistics(config)
    else:
        return None
    count = len(found[0])
    remedy = f"are of images of {count} channels, these have {config.in_channels}; give others"
    require(count == config.in_channels, "pretrained", str(chosen), remedy)
    return found
