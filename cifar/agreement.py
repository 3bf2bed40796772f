"""What all processes of a training must have been told alike, so that they make one. No torch.

Processes that were started by hand on several machines may have other options, sources or engines,
and would train apart without a word, or wait for each other for ever.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cifar.config import RunConfig, TrainConfig, option_name
from cifar.run_folder import options_of
from cifar.serialize import contents

ROOT = Path(__file__).resolve().parent.parent
"""Of the project's packages."""
_BY_RUN = ("save_every", "check_every", "max_skipped_steps")
"""What of a RunConfig decides when processes exchange something, or stop."""
_LABELS = ("recipe",)
"""Options that change nothing that is computed."""


def told(train: TrainConfig | None, run: RunConfig, **others: object) -> dict[str, str]:
    """What this process was told, by name: its software, `others`, and the options that are read.

    What is named in `others` replaces an option; without `train` there are none of its options.
    """
    found: dict[str, object] = {
        "torch": (installed("torch") or "").partition("+")[0],
        "sources": sources_digest(("cifar",), (".py",)),
        **others,
    }
    if train is not None:
        found |= options_of(train, functools.partial(contents, defaults=True))
        found["pretrained"] = contents(train.model.pretrained, defaults=True)
    found |= {option_name(name): getattr(run, name) for name in _BY_RUN} | others
    return {name: str(value) for name, value in found.items() if name not in _LABELS}


def first_difference(
    mine: Mapping[str, str], theirs: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """Name and both values of the first thing that two processes were not told alike."""
    for name in (*mine, *theirs):
        here, there = mine.get(name, "nothing"), theirs.get(name, "nothing")
        if here != there:
            return name, here, there
    return None


def installed(distribution: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def sources_digest(packages: Sequence[str], endings: Sequence[str]) -> str:
    """16 hexadecimal digits over those files of the project's packages that end so."""
    sha = hashlib.sha256()
    for package in packages:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in endings and not path.name.startswith("."):
                sha.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()[:16]
