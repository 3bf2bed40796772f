"""What a worker would run on, and whether it could, asked of a short process that imports torch."""

import os
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType

from bench.launchers import environment_for
from bench.record import Environment
from cifar.config import ModelConfig
from cifar.errors import CifarError, ConfigError
from cifar.serialize import from_json

MODULE = "bench.environment"
_LIMIT_SECONDS = 120


def present_environment(
    num_processes: int, *, variables: Mapping[str, str] = MappingProxyType({})
) -> Environment:
    """The environment of one of `num_processes` workers, with these variables, on this machine.

    Raises:
        CifarError: the process failed; the message is its last line.
    """
    environment = {**environment_for(num_processes, os.environ), **variables}
    done = _answer([sys.executable, "-m", MODULE], environment)
    if done.returncode:
        raise CifarError(f"environment: cannot be read: {_last_line(done)}")
    return from_json(Environment, done.stdout, source=MODULE)


def check_model(model: ModelConfig, image_size: tuple[int, int]) -> None:
    """Refuse a library's network that is not there, or does not take images of this size.

    Raises:
        ConfigError: as `cifar summary` says it.
        CifarError: the process failed; the message is its last line.
    """
    resize = () if model.resize is None else ("--resize", str(model.resize))
    options = ("--image-size", str(min(image_size)), *resize)
    command = [sys.executable, "-m", "cifar", "summary", model.name, *options]
    done = _answer(command, environment_for(1, os.environ))
    if done.returncode:
        told = _last_line(done).removeprefix("cifar: ")
        raise (ConfigError if done.returncode == ConfigError.exit_code else CifarError)(told)


def _answer(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CifarError(f"environment: no answer within {_LIMIT_SECONDS} s") from None


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
