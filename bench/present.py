"""What a worker would run on, here and now, asked of a short process that may import torch."""

import os
import subprocess
import sys

from bench.launchers import environment_for
from bench.record import Environment
from cifar.errors import CifarError
from cifar.serialize import from_json

MODULE = "bench.environment"
_LIMIT_SECONDS = 120


def present_environment(num_processes: int) -> Environment:
    """The environment of one of `num_processes` workers on this machine.

    Raises:
        CifarError: the process failed; the message is its last line.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            env=environment_for(num_processes, os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CifarError(f"environment: no answer within {_LIMIT_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CifarError(f"environment: cannot be read: {last}")
    return from_json(Environment, done.stdout, source=MODULE)
