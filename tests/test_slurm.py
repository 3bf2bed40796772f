"""launch/slurm.sbatch, with a scontrol and an srun that start two "nodes" on this machine."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from training import ROOT, TINY_OPTIONS, complaints, finish, metrics

from cifar.checkpoint import list_checkpoints

SCRIPT = ROOT / "launch" / "slurm.sbatch"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    [[ $1 == *=* ]] && shift || shift 2
done
echo "$@" >> "$FAKE_LOG"
pids=()
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -KILL "${pids[@]}"' TERM # "forcing job termination", as SLURM's own does
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid" || code=$?
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") [[ $3 == none ]] || printf '127.0.0.1\\n127.0.0.1\\n' ;;
    "show job")
        echo "   StartTime=2026-01-02T00:00:00 EndTime=Unknown Deadline=N/A"
        echo "   PreemptEligibleTime=2026-01-02T00:00:00 PreemptTime=${FAKE_TIME:-None}" ;;
    *) echo "scontrol $*" >> "$FAKE_LOG" ;;
esac
"""

Sbatch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sbatch(tmp_path: Path) -> Sbatch:
    """Runs the script as SLURM would, in a folder of its own."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*words: object, **variables: str) -> subprocess.Popen[str]:
        path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = {
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "PYTHONPATH": str(ROOT),
            "PATH": path,
            "FAKE_LOG": str(tmp_path / "log"),
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return run


def wait_for_epoch(process: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def calls(tmp_path: Path) -> list[str]:
    return re.findall("^scontrol .*$", (tmp_path / "log").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_job_whose_time_is_up_is_saved_put_back_and_goes_on(
    sbatch: Sbatch, npz: Path, tmp_path: Path
) -> None:
    words = ("--cpu", "--data", f"npz:{npz}", *TINY_OPTIONS, "--epochs", 60)
    folder = tmp_path / "runs" / "slurm" / "17"
    job = sbatch(*words)
    wait_for_epoch(job, folder)
    job.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    code, out, err = finish(job)
    assert code == 0, err
    assert "2 x cpu, global batch 32, steps 0..180" in out
    (line,) = complaints(err)
    step = int(re.match(r"cifar: stopped by signal 10 after step (\d+);", line)[1])
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step-{step:09d}"
    assert calls(tmp_path) == ["scontrol requeue 17"]
    assert "back into the queue" in err

    code, out, err = finish(sbatch(*words))
    assert code == 0, err
    assert f"steps {step}..180" in out
    assert [line["step"] for line in metrics(folder)] == [*range(3, 181, 3)]
    assert len(calls(tmp_path)) == 1, "a finished job stays finished"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_job_that_is_cancelled_is_saved_and_does_not_come_back(
    sbatch: Sbatch, npz: Path, tmp_path: Path
) -> None:
    job = sbatch("--cpu", "--data", f"npz:{npz}", *TINY_OPTIONS, "--epochs", 4000,
                 "--output-dir", tmp_path / "mine")  # fmt: skip
    wait_for_epoch(job, tmp_path / "mine")
    job.send_signal(signal.SIGTERM)
    code, _, err = finish(job)
    assert code != 0
    assert complaints(err)[0].startswith("cifar: stopped by signal 10 after step ")
    assert list_checkpoints(tmp_path / "mine" / "checkpoints") and calls(tmp_path) == []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_job_that_is_preempted_with_a_grace_time_is_saved_and_put_back(
    sbatch: Sbatch, npz: Path, tmp_path: Path
) -> None:
    """SLURM signals the step's processes, and neither srun nor the script."""
    job = sbatch("--cpu", "--data", f"npz:{npz}", *TINY_OPTIONS, "--epochs", 4000,
                 "--output-dir", tmp_path / "mine", FAKE_TIME="2026-01-02T03:04:05")  # fmt: skip
    wait_for_epoch(job, tmp_path / "mine")
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # those that have ended meanwhile
            if "torch.distributed.run" in process.cmdline():
                process.send_signal(signal.SIGTERM)
    code, _, err = finish(job)
    assert code == 0, err
    assert complaints(err)[0].startswith("cifar: stopped by signal 15 after step ")
    assert list_checkpoints(tmp_path / "mine" / "checkpoints")
    assert calls(tmp_path) == ["scontrol requeue 17"]


def test_outside_of_slurm_a_line_says_so() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("slurm.sbatch: SLURM_JOB_NODELIST: not set")


def test_every_node_gets_the_same_command(sbatch: Sbatch, tmp_path: Path) -> None:
    """Two nodes of four processes each; what the user gives comes last, and wins."""
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/sh\necho "$@" > "$FAKE_LOG"\ncase "$*" in *meet*) ;; *) exit 7;; esac\n'
    )
    code, _, err = finish(sbatch("--output-dir", "/shared/run", SLURM_GPUS_ON_NODE="4"))
    assert (code, err) == (7, "")
    words = (tmp_path / "log").read_text().split()
    assert words[: words.index("python")] == [
        *("--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=0")
    ]
    text = " ".join(words)
    assert "--nnodes 2 --nproc-per-node 4 --max-restarts 3" in text
    assert "--rdzv-endpoint 127.0.0.1:20017 --rdzv-id 17" in text
    assert text.endswith(
        "-m cifar train --resume auto --output-dir runs/slurm/17 --output-dir /shared/run"
    )


@pytest.mark.parametrize(
    ("code", "restarts", "comes_back"),
    [(137, None, True), (137, 2, True), (137, 3, False), (1, None, False), (2, None, False)],
)
def test_a_job_whose_launcher_was_killed_comes_back_a_few_times(
    sbatch: Sbatch, tmp_path: Path, code: int, restarts: int | None, comes_back: bool
) -> None:
    """torchrun itself ends with 1, also where it was given bad input."""
    (tmp_path / "log").touch()
    (tmp_path / "bin" / "srun").write_text(
        f'#!/bin/sh\ncase "$*" in *meet*) ;; *) exit {code};; esac\n'
    )
    count = {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    found, _, err = finish(sbatch(**count))
    assert found == (0 if comes_back else code)
    assert calls(tmp_path) == ["scontrol requeue 17"] * comes_back
    assert ("back into the queue" in err) is comes_back


@pytest.mark.parametrize(
    ("when", "comes_back"),
    [("None", False), ("2026-01-02T03:04:05", True), ("2026-01-01T23:59:59", False)],
)
def test_a_job_that_failed_comes_back_if_this_start_of_it_was_preempted(
    sbatch: Sbatch, tmp_path: Path, when: str, comes_back: bool
) -> None:
    (tmp_path / "log").touch()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\ncase "$*" in *meet*) ;; *) exit 1;; esac\n')
    code, _, _ = finish(sbatch(FAKE_TIME=when))
    assert code == (0 if comes_back else 1)
    assert calls(tmp_path) == ["scontrol requeue 17"] * comes_back


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "24", "SLURM_CPUS_ON_NODE": "32"}, "24"),
        ({"SLURM_CPUS_ON_NODE": "32"}, "32"),
    ],
)
def test_the_launcher_of_a_node_has_the_cores_of_the_job_there(
    sbatch: Sbatch, tmp_path: Path, variables: dict[str, str], cores: str
) -> None:
    """srun has not taken them from sbatch's --cpus-per-task since SLURM 22.05."""
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho $SRUN_CPUS_PER_TASK >> "$FAKE_LOG"\n')
    assert finish(sbatch(**variables))[0] == 0
    assert (tmp_path / "log").read_text().split() == [cores, cores]


@pytest.mark.parametrize("job", [1, 12767, 12768, 4_000_000_000])
def test_the_port_is_none_that_linux_gives_to_anyone(
    sbatch: Sbatch, tmp_path: Path, job: int
) -> None:
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho $MASTER_PORT >> "$FAKE_LOG"\n')
    assert finish(sbatch(SLURM_JOB_ID=str(job)))[0] == 0
    port = int((tmp_path / "log").read_text().split()[0])
    assert port == 20000 + job % 12768 < 32768


def test_nodes_that_do_not_meet_end_the_job_at_once(sbatch: Sbatch, tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/sh\necho "$MASTER_ADDR:$MASTER_PORT $WORLD_SIZE $*" >> "$FAKE_LOG"\nexit 2\n'
    )
    assert finish(sbatch())[0] == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("127.0.0.1:20017 2 --nodes 2 --ntasks 2")
    assert line.endswith("RANK=$SLURM_NODEID exec python -m cifar meet --cpu")


@pytest.mark.parametrize(
    ("number", "comes_back"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)]
)
@pytest.mark.parametrize("ends_at_once", [True, False])
def test_a_job_that_is_told_to_stop_before_its_nodes_have_met_trains_nothing(
    sbatch: Sbatch, tmp_path: Path, number: int, comes_back: bool, ends_at_once: bool
) -> None:
    """Whether the signal ends the meeting, or comes when that has just succeeded."""
    (tmp_path / "bin" / "srun").write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'exit {138 if ends_at_once else 0}' USR1\n"
        'echo "$@" >> "$FAKE_LOG"\n'
        "for _ in {1..600}; do sleep 0.1; done\n"
    )
    job = sbatch()
    while not (tmp_path / "log").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(number)
    assert finish(job)[0] == (0 if comes_back else 138)
    assert calls(tmp_path) == ["scontrol requeue 17"] * comes_back
    assert "-m cifar train" not in (tmp_path / "log").read_text()


def test_a_job_without_hosts_is_refused_in_a_line(sbatch: Sbatch) -> None:
    code, _, err = finish(sbatch(SLURM_JOB_NODELIST="none"))
    assert code == 2
    assert err == "slurm.sbatch: SLURM_JOB_NODELIST: 'none': names no host\n"


def test_the_script_asks_slurm_for_what_it_relies_on() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= set(options)
    assert not [each for each in options if re.match("--(nodes|gpus|gres|ntasks=)", each)]


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
