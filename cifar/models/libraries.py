"""The classifiers of torchvision and timm: networks, published weights and what these expect.

Both libraries are imported where they are needed: this program's own networks do without them.
"""

import difflib
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cifar.checkpoint import Tensors
from cifar.config import IMAGENET, ModelConfig, require
from cifar.errors import ConfigError
from cifar.files import in_turn
from cifar.models.weights import read_file

_WITH_DROPOUT = (
    *("alexnet", "efficientnet", "googlenet", "inception", "mnasnet"),
    *("mobilenet", "squeezenet", "vgg"),
)
"""How torchvision's names begin whose `dropout` is that of the classifier."""
_WITH_EXTRA_HEADS = ("googlenet", "inception_v3")
"""torchvision's that can return several logits in training."""
_HALF = (0.5, 0.5, 0.5)
"""Mean and deviation of the images that those two were trained on."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation by channel, of pixels in 0..1."""


def build_of_library(config: ModelConfig) -> nn.Module:
    """A library's network, its classifier made for the classes of the configuration.

    Fresh weights are those that the library starts from. The additional classifiers of GoogLeNet
    and Inception, which would make them return several logits in training, are left out.

    Raises:
        ConfigError: the library has no such network, or does not build it so.
        UnsupportedError: the library is not installed.
    """
    config.check_installed()
    _check_known(config)
    try:
        return _build_timm(config) if config.library == "timm" else _build_torchvision(config)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model: {config.name!r}: {config.library} does not build it so ({error}); give "
            "another --resize or --dropout, or another model"
        ) from None


def _check_known(config: ModelConfig) -> None:
    """Raise a ConfigError that lists the most similar names if the library does not know this one.

    Of timm's, the weights that a name may end in are checked as well.
    """
    architecture, _, tag = config.library_name.partition(".")
    known = _names(config.library)
    near = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5) or known[:5]
    remedy = f"{config.library} has no such classifier; nearest: {', '.join(near)}"
    require(architecture in known, "model", config.name, remedy)
    if tag:
        import timm

        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        remedy = f"timm has no such weights; {architecture} has {', '.join(tags) or 'none'}"
        require(tag in tags, "model", config.name, remedy)


def _names(library: str) -> Sequence[str]:
    if library == "timm":
        import timm

        return timm.list_models()
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _build_timm(config: ModelConfig) -> nn.Module:
    import timm

    return timm.create_model(
        config.library_name,
        num_classes=config.num_classes,
        in_chans=config.in_channels,
        drop_rate=config.dropout or None,
    )


def _build_torchvision(config: ModelConfig) -> nn.Module:
    from torchvision import models

    name = config.library_name
    options: dict[str, Any] = {"num_classes": config.num_classes}
    if name in _WITH_EXTRA_HEADS:
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_") and config.resize:
        options["image_size"] = config.resize  # the only size it will take
    if config.dropout and name.startswith(_WITH_DROPOUT):
        options["dropout"] = config.dropout
    module: nn.Module = models.get_model(name, weights=None, **options)
    if config.dropout and not name.startswith(_WITH_DROPOUT):
        classifier = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
        classifier.register_forward_pre_hook(functools.partial(_drop, config.dropout))
    return module


def _drop(share: float, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Ahead of a classifier: dropout of its features `[N, K]` in training."""
    return F.dropout(inputs[0], share, module.training)


def usual_size(config: ModelConfig) -> int:
    """Pixels each way of the images that the library's default weights were trained on or for."""
    if config.library == "timm":
        return int(_timm_facts(config).input_size[-1])
    return int(_torchvision_weights(config, IMAGENET).transforms().crop_size[0])


def _timm_facts(config: ModelConfig) -> Any:
    """timm's `PretrainedCfg` of the weights that the name ends in, or of the default ones."""
    import timm

    return timm.get_pretrained_cfg(config.library_name)


def statistics(config: ModelConfig) -> Statistics:
    """What the network's published weights expect images to be normalised with.

    The named ones', or the default ones' where the configuration names none. torchvision has its
    Inception and GoogLeNet turn images of its usual statistics into ones of theirs; here they get
    those at once.

    Raises:
        ConfigError, UnsupportedError: as `build_of_library`, or torchvision has no such weights.
    """
    config.check_installed()
    _check_known(config)
    if config.library == "timm":
        found = _timm_facts(config)
        return tuple(found.mean), tuple(found.std)
    if config.library_name in _WITH_EXTRA_HEADS:
        return _HALF, _HALF
    named = config.pretrained.name if config.pretrained else None
    transforms = _torchvision_weights(config, named or IMAGENET).transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def published_weights(config: ModelConfig) -> Tensors:
    """The weights that `config.pretrained` names, fetched if they are not in the library's cache.

    On a machine one process fetches at a time and the others wait for it. Whenever they are read,
    the SHA-256 of torchvision's files must begin with the 8 digits in their name; that of timm's
    must be the one that huggingface_hub keeps them under, where its cache has links.

    Raises:
        ConfigError: no such weights, they cannot be fetched, or are damaged.
    """
    return _timm_weights(config) if config.library == "timm" else _fetch_torchvision(config)


def _torchvision_weights(config: ModelConfig, name: str) -> Any:
    """The member of the network's `torchvision.models.WeightsEnum`."""
    from torchvision import models

    known = models.get_model_weights(config.library_name)
    names = [each.name for each in known]
    remedy = f"{config.name} has {', '.join(names)}; give one of them, or {IMAGENET}"
    require(bool(names) and name in (IMAGENET, *names), "pretrained", name, remedy)
    return known.DEFAULT if name == IMAGENET else known[name]


def _fetch_torchvision(config: ModelConfig) -> Tensors:
    name = _name_of_weights(config)
    url: str = _torchvision_weights(config, name).url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    match = re.search(r"-([0-9a-f]{8,})\.", path.name)
    assert match is not None, "torchvision's files bear their checksum"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(path.parent):
            if not path.exists():
                print(f"note: fetching {url}", file=sys.stderr, flush=True)
                shows = sys.stderr.isatty()
                torch.hub.download_url_to_file(url, str(path), match[1], progress=shows)
    except (OSError, RuntimeError) as error:  # of the network or the disk; a wrong checksum
        raise _not_fetched(name, url, error, f"put the file at {path}") from None
    weights = read_file(path, match[1], name)
    return {_renamed(key): value for key, value in weights.items() if not _is_extra(key)}


def _renamed(key: str) -> str:
    """The names in DenseNet's files are older than its layers'."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def _is_extra(key: str) -> bool:
    """Whether a tensor is of the classifiers that are left out."""
    return key.startswith(("AuxLogits.", "aux1.", "aux2."))


def _timm_weights(config: ModelConfig) -> Tensors:
    """As timm's own loading turns them into the network's."""
    import timm

    name, found = _name_of_weights(config), _timm_facts(config)
    hub = found.hf_hub_id
    require(bool(hub), "pretrained", name, f"timm has no weights of {config.name}; give a file")
    of_clip = (found.hf_hub_filename or "").startswith("open_clip")
    path = _from_hub(hub, f"{'open_clip_' * of_clip}model.safetensors", name)
    blob = path.resolve().name
    checksum = blob if re.fullmatch("[0-9a-f]{64}", blob) else ""
    weights = read_file(path, checksum, name)
    whole = timm.create_model(
        config.library_name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}
    )
    return whole.state_dict()


def _from_hub(hub: str, filename: str, name: str) -> Path:
    """The file in huggingface_hub's cache, which fetches it under a lock and checks its size."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = hub.partition("@")
    try:
        return Path(hf_hub_download(repository, filename, revision=revision or None))
    except Exception as error:  # the hub's, the network's or the disk's, of any kind
        raise _not_fetched(name, f"{hub}/{filename}", error, "try again") from None


def _name_of_weights(config: ModelConfig) -> str:
    assert config.pretrained is not None
    assert config.pretrained.name is not None
    return config.pretrained.name


def _not_fetched(name: str, where: str, error: Exception, remedy: str) -> ConfigError:
    reason = " ".join(str(error).strip("<>").split()) or type(error).__name__
    return ConfigError(
        f"pretrained: {name!r}: {where}: cannot be fetched ({reason}); {remedy}, or give a file"
    )
