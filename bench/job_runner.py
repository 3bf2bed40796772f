"""The program that a cluster's job runs: it measures one task on the node that it was given.

`python -m bench.job_runner FOLDER TOKEN` reads FOLDER/cell.json, launches the task's processes as
`bench run` does, and writes the record as FOLDER/result-TOKEN.json. It measures nothing if another
attempt at the task has been submitted since, or runs there now. No torch.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.attempt import read_attempt, write_result
from bench.console import stoppable
from bench.job import CELL_FILE, Job
from bench.launchers import launch
from bench.record import Record
from cifar.cli import complain
from cifar.errors import CifarError, UserError
from cifar.files import locked
from cifar.serialize import from_json

PROGRAM = "bench.job_runner"


def run(folder: Path, token: str, launch: Callable[[Job, Path], Record] = launch) -> Record:
    """Measure the task in `folder`; its record is there when this returns.

    Raises:
        UserError: the attempt is not the newest of the task, or another one runs.
        OSError: the folder cannot be read or written.
    """
    attempt = read_attempt(folder)
    if attempt is None or attempt.token != token:
        raise UserError(f"attempt: {token!r}: was superseded by another one; nothing is measured")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError:
            raise UserError(
                f"attempt: {token!r}: another one is being measured in {folder}; end that job first"
            ) from None
        job = from_json(Job, (folder / CELL_FILE).read_bytes(), source=CELL_FILE)
        record = launch(job, folder)
        write_result(folder, token, record)
    return record


def main(argv: Sequence[str]) -> int:
    """Returns 0 if there is a record, whatever it says."""
    folder, token = argv
    try:
        with stoppable():
            run(Path(folder), token)
    except CifarError as error:
        complain(PROGRAM, str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
