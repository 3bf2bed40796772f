"""Runs on SLURM: submitit's executor against programs that stand in for SLURM's."""

import json
import os
import pickletools
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_slurm
import pytest
from fake_worker import environment, record_of
from test_bench_cli import bench, environ, statuses

from bench import cluster, runs, slurm
from bench.attempt import Attempt, read_attempt, read_result, write_attempt, write_result
from bench.cluster import Slurm, SubmissionError
from bench.commands import main
from bench.job import Job
from bench.job_runner import run as run_job
from bench.protocol import Protocol
from bench.record import Record
from bench.runs import Run
from bench.slurm_config import SlurmConfig
from bench.spec import Plan, Suite, Task, grid
from cifar.errors import ConfigError, UserError
from cifar.serialize import from_json, to_json

pytestmark = pytest.mark.usefixtures("own_locks")

FAKE = Path(__file__).with_name("fake_bench.py")
CELLS = ["run", "--models", "resnet20,resnet18"]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch) -> Path:
    """A cluster; its folder holds its jobs."""
    pytest.importorskip("submitit")
    folder = tmp_path / "nodes"
    monkeypatch.setenv("PATH", fake_slurm.install(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE.parents[1]), str(FAKE.parent)]))
    yield folder
    for number, job in fake_slurm.jobs(folder).items():
        if job["state"] in ("PENDING", "RUNNING"):
            fake_slurm.end(folder, number, "CANCELLED")


def submitted(tmp_path: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    path = os.environ["PYTHONPATH"]
    return subprocess.Popen(
        [sys.executable, str(FAKE), *words],
        cwd=tmp_path,
        env=environ(**variables) | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_slurm(tmp_path: Path, *words: str, fake: str = "ok", **variables: str):
    """A run on the cluster; everything it needs is found as if it were installed."""
    return bench(tmp_path, *words, fake=fake, PYTHONPATH=os.environ["PYTHONPATH"], **variables)


def wait_for_jobs(nodes: Path, count: int, state: str) -> None:
    deadline = time.monotonic() + 60
    while sum(job["state"] == state for job in fake_slurm.jobs(nodes).values()) < count:
        assert time.monotonic() < deadline, fake_slurm.jobs(nodes)
        time.sleep(0.02)


def wait_until_known(tmp_path: Path, count: int) -> None:
    """Until so many jobs' ids are kept, by which a run that goes on takes them up."""
    deadline = time.monotonic() + 60
    while sum(is_known(folder) for folder in tmp_path.glob("runs/*/cells/*")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_known(folder: Path) -> bool:
    attempt = read_attempt(folder)
    return attempt is not None and attempt.job_id != ""


# --- Whole runs ---


def test_every_repeat_is_a_job_whose_record_is_collected(tmp_path: Path, nodes: Path) -> None:
    options = ["--slurm", "--slurm-partition", "gpu", "--slurm-account", "us", "--slurm-cpus", "8"]
    options += ["--slurm-options", "qos=low,requeue", "--slurm-setup", "export GREETING=hello"]
    done = on_slurm(tmp_path, *CELLS, "--repeats", "2", *options, fake="resnet18=crash,ok")
    assert done.returncode == 1, done.stderr
    assert statuses(tmp_path) == ["ok", "failed", "ok", "failed"]
    records = runs.newest(tmp_path / "runs").records()
    assert {record.reason for record in records} == {"", "ValueError: the worker broke"}
    jobs = fake_slurm.jobs(nodes)
    assert [job["state"] for job in jobs.values()] == ["COMPLETED"] * 4
    known = {"nodes": "1", "time": "40", "partition": "gpu", "account": "us", "requeue": ""}
    known |= {"gpus-per-node": "1", "cpus-per-task": "8", "qos": "low"}
    assert jobs["1"]["options"].items() >= known.items()
    assert "wckey" not in jobs["1"]["options"]
    assert "export GREETING=hello" in jobs["1"]["script"]
    lines = done.stderr.splitlines()
    assert lines[0].endswith("fp32 b64 on SLURM as job 1 ...")
    assert sum(" ... ok 256 images/s" in line for line in lines) == 2
    assert "2 did not finish; to try them again: bench run --resume runs/" in done.stdout


def test_nothing_is_pickled(tmp_path: Path, nodes: Path) -> None:
    assert on_slurm(tmp_path, *CELLS, "--slurm").returncode == 0
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".sh", ".out", "", ".lock"}
    for path in files:
        with pytest.raises(ValueError, match=r"opcode|pickle exhausted|invalid"):
            list(pickletools.genops(path.read_bytes()))
    assert [line for job in fake_slurm.jobs(nodes).values() for line in job["script"].split("\n")
            if "submitit.core" in line] == []  # fmt: skip


def test_only_what_is_missing_is_submitted_again(tmp_path: Path, nodes: Path) -> None:
    assert on_slurm(tmp_path, *CELLS, "--slurm", fake="resnet18=crash,ok").returncode == 1
    run = runs.newest(tmp_path / "runs")
    shown = on_slurm(tmp_path, "run", "--resume", run.id, "--dry-run")
    assert shown.stdout.splitlines()[0].startswith("[1/1] resnet18 fp32 b64"), shown.stderr
    assert "  SLURM job of nodes=1 time=40 gpus_per_node=1" in shown.stdout
    done = on_slurm(tmp_path, "run", "--resume", run.id, "--slurm-time", "90")
    assert done.returncode == 0, done.stderr
    assert [record.status for record in run.records()] == ["ok", "failed", "ok"]
    jobs = fake_slurm.jobs(nodes)
    assert [job["options"]["time"] for job in jobs.values()] == ["40", "40", "90"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_jobs_outlive_the_run_and_are_taken_up(tmp_path, nodes, number, code) -> None:
    """Both wait; neither is submitted twice."""
    hold = nodes / "hold"
    hold.touch()
    process = submitted(tmp_path, *CELLS, "--slurm", FAKE="ok")
    wait_until_known(tmp_path, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    run = runs.newest(tmp_path / "runs")
    if number != signal.SIGKILL:
        stay = f"runs/{run.id} (SLURM keeps its jobs; to end them: scancel --name {run.id})"
        assert errors.splitlines()[-1].endswith(f"to go on: bench run --resume {stay}")
    assert run.records() == []
    again = submitted(tmp_path, "run", "--resume", run.id, FAKE="ok")
    assert again.stderr is not None
    taken_up = [again.stderr.readline() for _ in range(2)]
    assert ["on SLURM as job" in line for line in taken_up] == [True, True], taken_up
    hold.unlink()
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert len(fake_slurm.jobs(nodes)) == 2
    assert [record.status for record in run.records()] == ["ok", "ok"]


def test_what_ended_while_nobody_watched_is_collected_once(tmp_path: Path, nodes: Path) -> None:
    (nodes / "hold").touch()
    process = submitted(tmp_path, *CELLS, "--slurm", FAKE="resnet20=crash,ok")
    wait_until_known(tmp_path, 2)
    process.kill()
    process.communicate()
    (nodes / "hold").unlink()
    wait_for_jobs(nodes, 2, "COMPLETED")
    run = runs.newest(tmp_path / "runs")
    done = on_slurm(tmp_path, "run", "--resume", run.id)
    assert done.returncode == 1 and len(fake_slurm.jobs(nodes)) == 2, done.stderr
    assert [record.status for record in run.records()] == ["failed", "ok"]
    done = on_slurm(tmp_path, "run", "--resume", run.id)
    assert done.returncode == 0, "a failure that was told is tried again"
    assert [record.status for record in run.records()] == ["failed", "ok", "ok"]


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("TIMEOUT", "timeout", "SLURM job 1: timeout: hello"),
        ("OUT_OF_MEMORY", "oom", "SLURM job 1: out_of_memory: hello"),
        ("PREEMPTED", "failed", "SLURM job 1: preempted: hello"),
        ("NODE_FAIL", "failed", "SLURM job 1: node_fail: hello"),
        ("CANCELLED by 0", "failed", "SLURM job 1: cancelled by 0: hello"),
    ],
)
def test_a_job_that_dies_is_a_record_with_the_end_of_its_log(
    tmp_path, nodes, state, status, words
) -> None:
    run_words = ["run", "--models", "resnet20", "--slurm", "--slurm-setup", "echo hello"]
    process = submitted(tmp_path, *run_words, FAKE="hang")
    deadline = time.monotonic() + 60
    while not any(path.read_text() == "hello\n" for path in (tmp_path / "runs").rglob("*.out")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fake_slurm.end(nodes, "1", state)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    (record,) = runs.newest(tmp_path / "runs").records()
    assert (record.status, record.reason) == (status, words)
    assert record.run_id and record.suite == "custom" and record.started


def test_a_cancelled_job_is_submitted_anew_by_who_goes_on(tmp_path: Path, nodes: Path) -> None:
    (nodes / "hold").touch()
    process = submitted(tmp_path, "run", "--models", "resnet20", "--slurm", FAKE="ok")
    wait_until_known(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    name = errors.rpartition("scancel --name ")[2].strip().rstrip(")")
    subprocess.run(["scancel", "--name", name], check=True)
    (nodes / "hold").unlink()
    done = on_slurm(tmp_path, "run", "--resume", name)
    assert done.returncode == 0, done.stderr
    assert [job["state"] for job in fake_slurm.jobs(nodes).values()] == [
        "CANCELLED by 0", "COMPLETED",
    ]  # fmt: skip
    assert statuses(tmp_path) == ["ok"]


def test_a_refused_job_is_one_line(tmp_path: Path, nodes: Path) -> None:
    (nodes / "refuse").touch()
    done = on_slurm(tmp_path, *CELLS, "--slurm", "--slurm-partition", "nope")
    assert done.returncode == 2
    assert done.stderr == (
        "bench: slurm: 'resnet20 fp32 b64': sbatch: error: Batch job submission failed: Invalid "
        "partition; correct the --slurm-... options, or go on later with --resume\n"
    )


# --- Parts ---


def make_run(tmp_path: Path) -> tuple[Run, Task, Path]:
    (cell,) = grid(["resnet20"], ["fp32"])
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=(cell,)),))
    run = runs.create(suite, tmp_path / "runs", slurm=SlurmConfig())
    (task,) = run.plan.tasks
    return run, task, run.cell_folder(1, task)


class FakeCluster:
    """Takes what it is told to, and has what it is given in its queue."""

    def __init__(self, queue: frozenset[str] | None = frozenset(), state: str = "UNKNOWN") -> None:
        self.queue, self.answer = queue, state
        self.commands: list[list[str]] = []
        self.refuses = False
        self.folder = Path("none")

    def submit(self, command, parameters) -> str:
        if self.refuses:
            raise SubmissionError("limit")
        self.commands.append(command)
        return str(len(self.commands))

    def queued(self):
        return self.queue

    def state(self, job_id: str) -> str:
        return self.answer

    def log(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.out"


@pytest.fixture
def quick(monkeypatch) -> None:
    names = ("POLL_SECONDS", "ASK_SECONDS", "SETTLE_SECONDS", "COMPLETED_SETTLE_SECONDS")
    for name in names:
        monkeypatch.setattr(slurm, name, 0.0)


@pytest.mark.usefixtures("quick")
def test_a_job_that_nothing_is_known_of_any_more_is_a_record(tmp_path: Path) -> None:
    run, task, folder = make_run(tmp_path)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), FakeCluster())
    assert jobs.start(Job(task=task, run_id=run.id), folder) == "SLURM as job 1"
    ((job, record),) = jobs.wait()
    assert (job.task, record.status, record.reason) == (task, "failed", "SLURM job 1: unknown")
    assert jobs.ended() == []


def test_the_queue_is_asked_for_once_though_many_jobs_are_taken_up(tmp_path: Path) -> None:
    cells = grid(["resnet20", "resnet18", "resnet34"], ["fp32"])
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=cells),))
    run = runs.create(suite, tmp_path / "runs", slurm=SlurmConfig())
    tasks = [(task, run.cell_folder(number, task)) for number, task in enumerate(run.plan.tasks, 1)]
    for number, (_, folder) in enumerate(tasks, 1):
        folder.mkdir(parents=True)
        write_attempt(folder, Attempt(job_id=str(number)))
    asked = []
    cluster = FakeCluster()
    cluster.queued = lambda: asked.append(1) or frozenset("123")
    jobs = slurm.SlurmJobs(run, SlurmConfig(), cluster)
    told = [jobs.start(Job(task=task, run_id=run.id), folder) for task, folder in tasks]
    assert told == [f"SLURM as job {number}" for number in (1, 2, 3)]
    assert len(asked) == 1 and cluster.commands == []


@pytest.mark.usefixtures("quick")
def test_a_result_that_shows_late_is_not_replaced_by_a_failure(tmp_path: Path, monkeypatch) -> None:
    """This machine's look at the folder was older than the result that the job has written."""
    run, task, folder = make_run(tmp_path)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), FakeCluster(state="COMPLETED"))
    job = Job(task=task, run_id=run.id)
    jobs.start(job, folder)
    write_result(folder, read_attempt(folder).token, record_of(job))
    looks = iter([None])
    monkeypatch.setattr(slurm, "read_result", lambda *words: next(looks, read_result(*words)))
    ((_, record),) = jobs.wait()
    assert record.status == "ok" and next(looks, "none left") == "none left"
    assert read_result(folder, read_attempt(folder).token).status == "ok"


@pytest.mark.usefixtures("quick")
def test_the_result_of_a_completed_job_is_waited_for_longer(tmp_path: Path, monkeypatch) -> None:
    run, task, folder = make_run(tmp_path)
    monkeypatch.setattr(slurm, "COMPLETED_SETTLE_SECONDS", 3600.0)
    nodes = FakeCluster(state="COMPLETED")
    jobs = slurm.SlurmJobs(run, SlurmConfig(), nodes)
    job = Job(task=task, run_id=run.id)
    jobs.start(job, folder)
    assert [jobs.ended() for _ in range(3)] == [[]] * 3
    write_result(folder, read_attempt(folder).token, record_of(job))
    ((_, record),) = jobs.ended()
    assert record.status == "ok"


@pytest.mark.usefixtures("quick")
def test_a_scheduler_that_does_not_answer_is_waited_for(tmp_path: Path, capsys) -> None:
    run, task, folder = make_run(tmp_path)
    nodes = FakeCluster(queue=None)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), nodes)
    job = Job(task=task, run_id=run.id)
    jobs.start(job, folder)
    asked = []

    def queued() -> None:
        asked.append(jobs.ended())
        if len(asked) == 3:
            write_result(folder, read_attempt(folder).token, record_of(job))

    nodes.queued = queued
    ((_, record),) = jobs.wait()
    assert record.status == "ok" and asked == [[]] * 3
    told = "note: squeue does not answer; no job that dies is noticed\n"
    assert capsys.readouterr().err == told


def test_no_more_jobs_than_asked_for_are_in_the_queue(tmp_path: Path) -> None:
    run, task, folder = make_run(tmp_path)
    nodes = FakeCluster(frozenset({"1", "2", "3"}))
    jobs = slurm.SlurmJobs(run, SlurmConfig(jobs=2), nodes)
    places = []
    for repeat in range(3):
        job = Job(task=replace(task, repeat=repeat))
        places.append(jobs.start(job, folder.with_name(str(repeat))))
    assert places == ["SLURM as job 1", "SLURM as job 2", None]
    again = slurm.SlurmJobs(run, SlurmConfig(jobs=1), nodes)
    found = [
        again.start(Job(task=replace(task, repeat=repeat)), folder.with_name(str(repeat)))
        for repeat in range(3)
    ]
    assert found == places, "those that are there are taken up"


@pytest.mark.usefixtures("quick")
def test_what_a_dead_job_s_worker_had_written_is_kept(tmp_path: Path) -> None:
    run, task, folder = make_run(tmp_path)
    nodes = FakeCluster(state="NODE_FAIL")
    nodes.folder = tmp_path
    (tmp_path / "1.out").write_text("one\ntwo\n\n")
    job = Job(task=task, run_id=run.id)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), nodes)
    jobs.start(job, folder)
    (folder / "record.json").write_text(to_json(record_of(job)))
    ((_, record),) = jobs.wait()
    assert record.status == "ok" and record.value("train_throughput") == 256.0
    assert record.reason == "SLURM job 1: node_fail: two, after the record was written"


def test_a_job_whose_id_was_lost_measures_nothing(tmp_path: Path) -> None:
    """The run died between submitting it and writing down its id."""
    run, task, folder = make_run(tmp_path)
    write_attempt(folder, Attempt(token="aaaa"))
    jobs = slurm.SlurmJobs(run, SlurmConfig(), FakeCluster())
    assert jobs.start(Job(task=task), folder) == "SLURM as job 1"
    attempt = read_attempt(folder)
    assert attempt is not None and attempt.token != "aaaa" and attempt.job_id == "1"

    def launch(job: Job, folder: Path) -> Record:
        return record_of(job)

    with pytest.raises(UserError, match="attempt: 'aaaa': was superseded by another one"):
        run_job(folder, "aaaa", launch)
    assert jobs.ended() == []
    record = run_job(folder, attempt.token, launch)
    ((_, found),) = jobs.ended()
    assert found == record


def test_two_jobs_do_not_measure_one_task_at_the_same_time(tmp_path: Path) -> None:
    run, task, folder = make_run(tmp_path)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), FakeCluster())
    jobs.start(Job(task=task), folder)
    token = read_attempt(folder).token

    def launch(job: Job, folder: Path) -> Record:
        with pytest.raises(UserError, match="another one is being measured in"):
            run_job(folder, token, launch)
        return record_of(job)

    run_job(folder, token, launch)

    def full(job: Job, folder: Path) -> Record:
        raise BlockingIOError(11, "Resource temporarily unavailable")  # as of a process to start

    with pytest.raises(BlockingIOError, match="temporarily"):
        run_job(folder, token, full)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", ["", "\x80\x04N.", '{"schema_version": 2}', "[1"])
def test_a_result_that_is_no_record_is_a_failure(tmp_path: Path, text: str) -> None:
    run, task, folder = make_run(tmp_path)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), FakeCluster(frozenset({"1"})))
    jobs.start(Job(task=task, run_id=run.id, suite="s"), folder)
    (folder / f"result-{read_attempt(folder).token}.json").write_bytes(text.encode("latin-1"))
    ((_, record),) = jobs.wait()
    assert (record.status, record.run_id, record.suite) == ("failed", run.id, "s")
    assert record.reason.startswith("unreadable: ")


@pytest.mark.usefixtures("quick")
def test_a_result_of_another_cell_is_a_failure(tmp_path: Path) -> None:
    run, task, folder = make_run(tmp_path)
    jobs = slurm.SlurmJobs(run, SlurmConfig(), FakeCluster(frozenset({"1"})))
    jobs.start(Job(task=task), folder)
    other = replace(record_of(Job(task=task)), repeat=7)
    write_result(folder, read_attempt(folder).token, other)
    ((_, record),) = jobs.wait()
    assert record.reason == "the result is of another cell: resnet20 fp32 b64"


def test_a_limit_of_submissions_is_waited_for_while_others_run(tmp_path: Path) -> None:
    run, task, folder = make_run(tmp_path)
    nodes = FakeCluster(frozenset({"1"}))
    jobs = slurm.SlurmJobs(run, SlurmConfig(), nodes)
    nodes.refuses = True
    with pytest.raises(UserError, match="slurm: 'resnet20 fp32 b64': limit; correct the --slurm"):
        jobs.start(Job(task=task), folder)
    nodes.refuses = False
    jobs.start(Job(task=task), folder)
    nodes.refuses = True
    assert jobs.start(Job(task=replace(task, repeat=1)), folder.with_name("other")) is None


@pytest.mark.parametrize(
    ("change", "current"),
    [({}, True), ({"cpu_model": "other", "gpu_names": ("H200",), "os": "x", "driver": "1"}, True),
     ({"code_digest": "x"}, False), ({"torch": "9"}, False), ({"python": "9"}, False)],
)  # fmt: skip
def test_records_of_other_nodes_count_if_their_code_and_packages_are_ours(change, current) -> None:
    (cell,) = grid(["resnet20"], ["fp32"])
    record = record_of(
        Job(task=Task(cell=cell, protocol=Protocol())), environment=environment(**change)
    )
    asked = []

    def present(count: int, **_: object):
        asked.append(count)
        return environment()

    is_current = slurm.current(present)
    assert [is_current(record) for _ in range(2)] == [current] * 2
    assert asked == [1]
    assert not is_current(replace(record, environment=None))


def test_a_job_has_time_for_its_cell_and_a_gpu_for_each_process() -> None:
    (cell,) = grid(["resnet20"], ["fp32"], num_processes=4)
    task = Task(cell=cell, protocol=Protocol(timeout=61.0))
    assert SlurmConfig().parameters(task) == {"nodes": 1, "time": 12, "gpus_per_node": 4}
    config = SlurmConfig(
        minutes=5, gpus=0, cpus=2, options=("qos=a=b", "--exclusive"), setup="module load x"
    )
    assert config.parameters(task) == {
        "nodes": 1,
        "time": 5,
        "cpus_per_task": 8,
        "setup": ["module load x"],
        "additional_parameters": {"qos": "a=b", "exclusive": True},
    }
    with pytest.raises(ConfigError, match="slurm-gpus: 2: resnet20 fp32 b64 x4 has 4 processes"):
        SlurmConfig(gpus=2).check(task)
    SlurmConfig(gpus=8).check(task)
    SlurmConfig(gpus=0).check(task)


BAD = {
    "slurm-partition: 'gpu': is an option of --slurm; give that too": ["--slurm-partition", "gpu"],
    "slurm-time: 5: is an option of --slurm": ["--slurm-time", "5"],
    "slurm-time: 0: give 1 to": ["--slurm", "--slurm-time", "0"],
    "slurm-gpus: -1: give 0 to": ["--slurm", "--slurm-gpus", "-1"],
    "slurm-options: '=x': write NAME=VALUE or NAME": ["--slurm", "--slurm-options", "=x"],
    "devices: 'cpu:0': not with --slurm": ["--slurm", "--devices", "cpu:0"],
    "slurm: 'sbatch': is not on this machine": ["--slurm"],
}


@pytest.mark.parametrize(("message", "words"), BAD.items())
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, message, words) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert main([*CELLS, *words]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"bench: {message}") and output.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("suite", ["scaling", "exchange"])
def test_the_devices_of_the_login_node_are_not_counted(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert main(["run", suite, "--slurm"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        f"bench: num-processes: not given: suite {suite} counts the devices of this"
    )
    if suite == "scaling":  # the other one needs its images first
        assert main(["run", suite, "--slurm", "--num-processes", "2"]) == 2
        assert capsys.readouterr().err.startswith("bench: slurm: 'sbatch': is not on this machine")


def test_a_run_goes_on_where_it_was_started(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Plan(protocol=Protocol(), cells=grid(["resnet20"], ["fp32"]))
    here = runs.create(Suite(name="s", description="", plans=(plan,)), tmp_path / "runs")
    there, _, _ = make_run(tmp_path)
    for run, words, told in (
        (here, ["--slurm"], "slurm: True: the run to resume was started without"),
        (there, ["--devices", "cpu:0"], "devices: 'cpu:0': the run to resume is on SLURM"),
    ):
        assert main(["run", "--resume", run.id, *words]) == 2
        assert told in capsys.readouterr().err


def test_without_submitit_it_says_how_to_get_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*CELLS, "--slurm"]) == 2
    told = "bench: slurm: 'submitit': is not installed; pip install submitit\n"
    assert capsys.readouterr().err == told


def test_submitit_is_imported_only_when_it_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; from bench.commands import main; "
        "main(['run', '--models', 'resnet20', '--slurm', '--dry-run']); "
        "assert 'submitit' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_plan_of_a_run_on_slurm_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = SlurmConfig(partition="gpu", options=("qos=low",), minutes=5)
    assert from_json(SlurmConfig, to_json(config)) == config
    run, _, _ = make_run(tmp_path)
    assert json.loads((run.folder / "run.json").read_text())["slurm"]["jobs"] == 100
    assert runs.find(run.id, run.folder.parent).plan == run.plan


@pytest.mark.usefixtures("nodes")
def test_what_slurm_says_is_read(tmp_path: Path, nodes: Path) -> None:
    slurm_here = Slurm(tmp_path / "logs", "run-1")
    job_id = slurm_here.submit([sys.executable, "-c", "print('a b')"], {"time": 3})
    wait_for_jobs(nodes, 1, "COMPLETED")
    assert (job_id, slurm_here.state(job_id), slurm_here.state("99")) == (
        *("1", "COMPLETED", "UNKNOWN"),
    )
    assert slurm_here.log(job_id).read_text() == "a b\n", "with words that a shell would part"
    assert slurm_here.queued() == frozenset()
    (nodes / "down").touch()
    assert slurm_here.queued() is None
    (nodes / "refuse").touch()
    with pytest.raises(SubmissionError, match="Invalid partition"):
        slurm_here.submit(["true"], {})
    assert cluster.PROGRAMS == ("sbatch", "srun", "squeue", "sacct")
