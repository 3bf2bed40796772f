"""Starts many small jobs at once, whose processes only meet: `python meet_all.py FOLDER`.

FOLDER/jobs.json holds the variables of every process by job. Each process leaves what it printed
and its exit code there. They are forked, so that torch is imported once.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from cifar import cli, store
from cifar.cli import Command, run_program
from cifar.distributed import leave
from cifar.ranks import check_rendezvous
from cifar.rendezvous import form_group

TIMEOUT = 6.0
"""Seconds to meet within, of processes that wait in vain."""
ENOUGH = 60.0
"""And of those that hear from each other."""


def meet(words: list[str]) -> int:
    check_rendezvous(os.environ, cpu=True)
    group = form_group(
        os.environ,
        backend="gloo",
        told=lambda: json.loads(os.environ.get("TOLD", "{}")),
        meeting_timeout=float(os.environ["MEETING"]),
        collective_timeout=30.0,
    )
    print(f"met as {group.rank} of {group.size}")
    store = torch.distributed.distributed_c10d._get_default_store()
    print(f"store waits {store.timeout.total_seconds():g} s")
    leave()
    return 0


def fork(folder: Path, name: str, variables: dict[str, str]) -> tuple[int, str]:
    """Start one process, which waits for as long as `LATE` says; its id and name."""
    pid = os.fork()
    if pid:
        return pid, name
    os.environ.update(variables)
    for stream, ending in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / f"{name}.{ending}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    time.sleep(float(variables.get("LATE", "0")))
    if "DEAF" in variables:  # its name service does not answer
        store.source_towards = lambda host, port: time.sleep(1000)
    code = run_program("meeting", "", {"meet": Command(help="", run=meet)}, ["meet"])
    os._exit(code)


def main(folder: Path) -> None:
    cli.FIRST_PROCESS_SECONDS = 0.1
    jobs = json.loads((folder / "jobs.json").read_text())
    begun, started = time.monotonic(), {}
    for job, processes in jobs.items():
        for number, variables in enumerate(processes):
            pid, name = fork(folder, f"{job}-{number}", variables)
            started[pid] = name
    ends = {}
    while started:
        pid, status = os.wait()
        name = started.pop(pid)
        ends[name] = os.waitstatus_to_exitcode(status), time.monotonic() - begun
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
