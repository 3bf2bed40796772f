"""Stands in for SLURM's programs on one machine: sbatch, squeue, sacct, scancel, srun.

`install(folder)` puts them there; the state of all jobs is in `folder`/jobs. Jobs wait while
`folder`/hold exists, sbatch refuses all once `folder`/refuse does, squeue breaks while
`folder`/down does, and a job has as many seconds as `folder`/limit says.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sbatch", "squeue", "sacct", "scancel", "srun")


def install(folder):
    """Make the programs; returns the PATH that finds them."""
    (folder / "jobs").mkdir(parents=True)
    for name in NAMES:
        text = f'#!/bin/sh\nexec {sys.executable} {__file__} {name} {folder} "$@"\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def jobs(folder):
    """All jobs by id: name, state, script, number of CPUs, ..."""
    files = (folder / "jobs").glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in sorted(files)}


def write(folder, number, **changes):
    path = folder / "jobs" / f"{number}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(known | changes))
    temporary.rename(path)


def end(folder, number, state):
    """Let a job end so, as `scancel`, a time limit or a node that dies would."""
    write(folder, number, ending=state)
    while jobs(folder)[number]["state"] in ("PENDING", "RUNNING"):
        time.sleep(0.02)


def sbatch(folder, script):
    if (folder / "refuse").exists():
        sys.exit("sbatch: error: Batch job submission failed: Invalid partition")
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    number = str(len(jobs(folder)) + 1)
    write(folder, number, state="PENDING", name=options["job-name"], options=options, script=text)
    subprocess.Popen(
        [sys.executable, __file__, "node", str(folder), number, script],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    print(f"Submitted batch job {number}")


def node(folder, number, script):
    """Run a job to its end."""
    while (folder / "hold").exists():
        if state := jobs(folder)[number].get("ending"):
            return write(folder, number, state=state)
        time.sleep(0.02)
    output = jobs(folder)[number]["options"]["output"].replace("%j", number)
    limit = float((folder / "limit").read_text()) if (folder / "limit").exists() else 3600.0
    with Path(output).open("ab") as file:
        process = subprocess.Popen(
            ["bash", script], env=os.environ | {"SLURM_JOB_ID": number},
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        write(folder, number, state="RUNNING", pid=process.pid)
        deadline, state = time.monotonic() + limit, None
        while process.poll() is None and state is None:
            state = jobs(folder)[number].get("ending")
            if time.monotonic() > deadline:
                state = "TIMEOUT"
            time.sleep(0.02)
        if state is not None:
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait()
    return write(folder, number, state=state or ("FAILED" if code else "COMPLETED"))


def squeue(folder, *_):
    if (folder / "down").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    for number, job in jobs(folder).items():
        if job["state"] in ("PENDING", "RUNNING"):
            print(number)


def sacct(folder, *words):
    wanted = [words[at + 1] for at, word in enumerate(words) if word == "-j"]
    print("JobID|State|NodeList")
    for number, job in jobs(folder).items():
        if number in wanted:
            print(f"{number}|{job['state']}|node1\n{number}.batch|{job['state']}|node1")


def scancel(folder, *words):
    for number, job in jobs(folder).items():
        is_meant = number in words or ("--name" in words and job["name"] == words[-1])
        if is_meant and job["state"] in ("PENDING", "RUNNING"):
            end(folder, number, "CANCELLED by 0")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
