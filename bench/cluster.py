"""What is asked of SLURM: to run a command, which jobs it has, and how one has ended.

submitit (https://github.com/facebookincubator/submitit) writes the batch scripts, submits them and
reads sacct. It is given plain commands: its own way is to pickle a function into the job's folder
and to unpickle there what it returned. No torch.
"""

import contextlib
import io
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.errors import CifarError, ConfigError, UserError

PROGRAMS = ("sbatch", "srun", "squeue", "sacct")
_ASK_SECONDS = 60


class SubmissionError(CifarError):
    """SLURM has refused a job; the message is its last line."""


class Slurm:
    """The cluster that this machine is part of; logs and scripts of its jobs go to `folder`.

    Raises:
        UserError: submitit is not installed, or this machine has no SLURM.
    """

    def __init__(self, folder: Path, name: str) -> None:
        require_slurm()
        self._submitit = _submitit()
        self._folder, self._name = folder, name

    def submit(self, command: Sequence[str], parameters: Mapping[str, Any]) -> str:
        """Submit a command as a job of one node; returns the job's id.

        `parameters` are those of submitit's executor, see `bench.slurm_config`.

        Raises:
            SubmissionError: it was refused.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        executor = self._submitit.SlurmExecutor(self._folder)
        executor.update_parameters(
            job_name=self._name,
            stderr_to_stdout=True,
            use_srun=False,  # a step has one core, unless it is told the job's number again
            wckey=None,  # else a label of submitit's own, which some clusters refuse
            **parameters,
        )
        utils = self._submitit.core.utils
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where it repeats what sbatch said
                job = executor._submit_command(shlex.join(command))
        except (utils.UncompletedJobError, utils.FailedSubmissionError) as error:
            lines = str(error).strip().splitlines()
            raise SubmissionError(lines[-1] if lines else "sbatch failed") from None
        return str(job.job_id)

    def queued(self) -> frozenset[str] | None:
        """The ids of this user's jobs that wait, run or end; None: SLURM does not answer."""
        command = ["squeue", f"--user={os.getuid()}", "--noheader", "--format=%i"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True
            )
        except (subprocess.SubprocessError, OSError):
            return None
        return frozenset(done.stdout.split())

    def state(self, job_id: str) -> str:
        """How a job has ended, e.g. `TIMEOUT`, `CANCELLED by 1000`; `UNKNOWN` if nothing tells."""
        watcher = self._submitit.slurm.slurm.SlurmInfoWatcher()
        return str(watcher.get_state(job_id, mode="force"))

    def log(self, job_id: str) -> Path:
        """What a job has printed."""
        path: Path = self._submitit.SlurmJob(self._folder, job_id).paths.stdout
        return path


def require_slurm() -> None:
    """Raise a UserError if submitit is not installed, or this machine has no SLURM."""
    _submitit()
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise ConfigError(
                f"slurm: {program!r}: is not on this machine; start it where SLURM is, on a "
                "login node"
            )


def _submitit() -> Any:
    """The module, which tells nothing on its own.

    Raises:
        UserError: it is not installed.
    """
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError:
        raise UserError("slurm: 'submitit': is not installed; pip install submitit") from None
    logging.getLogger("submitit").setLevel(logging.CRITICAL)
    return submitit
