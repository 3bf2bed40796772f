"""Taking up a run without being told whether there is one: `--resume auto`, for restarts. No torch.

The same command starts a run and goes on with it, as often as a launcher or a job scheduler starts
it anew.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cifar import run_folder
from cifar.config import RunConfig, TrainConfig
from cifar.errors import ConfigError
from cifar.files import LOCK, locked, made, sweep
from cifar.ranks import world_size
from cifar.run_folder import CONFIG
from cifar.weights import list_checkpoints

AUTO = "auto"
"""The value of `--resume` that leaves it to what `--output-dir` holds."""
PATIENCE_SECONDS = 60.0
"""How long the processes of the start before, which may be saving still, may take to end; where
other processes wait for this one to meet them, no longer than half of what they wait."""
_LOOK_SECONDS = 0.5


@contextlib.contextmanager
def taken_up(folder: Path, train: TrainConfig, run: RunConfig, *, finds_lr: bool) -> Iterator[None]:
    """While entered no other process can train in the folder, which is a run's or an empty one.

    Raises:
        CheckpointError: one does, and has not ended in time.
        ConfigError: the folder holds something else, a run with other options, or cannot be
            written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made(folder))
            _check_contents(folder)
            _lock(folder, patience(run, os.environ), stack)
        except OSError as error:
            raise ConfigError(
                f"output-dir: '{folder}': cannot be written ({error.strerror}); choose another"
            ) from None
        if (folder / CONFIG).exists() and list_checkpoints(folder / "checkpoints"):
            _check_same(folder, train, run, finds_lr=finds_lr)
        stack.callback(run_folder.forget, folder)
        yield


def patience(run: RunConfig, environ: Mapping[str, str]) -> float:
    """Seconds to wait for the folder; raises as `cifar.ranks.world_size`."""
    alone = world_size(environ) == 1
    return PATIENCE_SECONDS if alone else min(PATIENCE_SECONDS, run.meeting_timeout / 2)


def _lock(folder: Path, seconds: float, stack: contextlib.ExitStack) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            stack.enter_context(locked(folder))
            sweep(folder)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise run_folder.in_use(folder) from None
            time.sleep(_LOOK_SECONDS)


def _check_contents(folder: Path) -> None:
    """Raise a ConfigError if a folder holds something else than a run.

    A start that was killed before it had begun may have left its lock and temporary files.
    """
    names = [path.name for path in folder.iterdir()]
    left_over = [name for name in names if name == LOCK or re.fullmatch(r"\..*\.tmp", name)]
    if CONFIG not in names and len(names) > len(left_over):
        raise ConfigError(
            f"output-dir: '{folder}': holds something else than a run; choose another"
        )


def _check_same(folder: Path, train: TrainConfig, run: RunConfig, *, finds_lr: bool) -> None:
    """Raise a UserError that names the first option that differs from those of the run there."""
    stored = run_folder.read_config(folder)
    if train.precision is None:  # was resolved when the run began
        train = dataclasses.replace(train, precision=stored.train.precision)
    if finds_lr:  # was found then
        found = stored.train.recipe
        recipe = dataclasses.replace(train.recipe, lr=found.lr, muon_step=found.muon_step)
        train = dataclasses.replace(train, recipe=recipe)
    run_folder.check_same(stored, train, run, folder)
