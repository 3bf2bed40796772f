"""The exceptions of this package and the exit code that each stands for."""

import re

PEER_GONE = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|pair closure|Timed out waiting \d+ms"
    r"|ncclRemoteError|NCCL communicator was aborted"
)
"""What gloo and NCCL say where another process has ended."""


class CifarError(Exception):
    """Root of every exception raised on purpose by this package."""

    exit_code = 1


class UserError(CifarError, ValueError):
    """Bad input: the message is one line that names the field, the value and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be meant: unknown name, value out of range, conflict."""


class UnmetError(ConfigError):
    """This process has not met the others of its job, and it alone can say so."""


class DataError(UserError):
    """A data set that is missing, damaged or of the wrong form."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another model."""


class UnsupportedError(UserError):
    """This machine or software stack cannot run what was asked as it was asked."""


class OutputError(CifarError):
    """What is made cannot be written, as on a full disk; what was made before is there."""


class TrainingError(CifarError):
    """Training cannot go on: a non-finite loss, or too many skipped steps in a row."""


class PeerError(TrainingError):
    """Another process of the job has ended, which says why itself, or its launcher does."""


class OutOfMemoryError(TrainingError):
    """The model and its batch do not fit into the memory of the machine or of its GPU."""


class Stopped(CifarError):  # noqa: N818 - no error
    """Training stopped on a signal after saving; the exit code is 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
