"""The command line of bench: exit codes, one-line errors, dry runs, interruptions, no torch."""

import csv
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_worker import environment, record_of

from bench import preflight, runs
from bench.commands import main
from bench.console import plural
from bench.job import Job
from bench.launchers import environment_for
from bench.protocol import Protocol
from bench.record import SCHEMA_VERSION, DataFacts
from bench.record_file import append_record, read_records
from bench.save import save
from bench.spec import Plan, Suite, Task, grid
from bench.suites import SUITES
from cifar.data.config import DataConfig, parse_data
from cifar.data.shapes import load_shapes
from cifar.data.sources import load_dataset
from cifar.errors import ConfigError
from cifar.files import in_turn
from cifar.process import recorded_environment

pytestmark = pytest.mark.usefixtures("own_locks")

ROOT = Path(__file__).parents[1]
FAKE = Path(__file__).with_name("fake_bench.py")
CELLS = ["run", "--models", "resnet20,resnet18"]


def environ(**variables):
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables


def bench(cwd, *words, fake="ok", **variables):
    """Run bench with fake workers in a folder; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(FAKE), *words],
        cwd=cwd,
        env=environ(FAKE=fake, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def statuses(cwd):
    return [record.status for record in runs.newest(cwd / "runs").records()]


# --- Bad input: one line, exit code 2, nothing started ---

LONG = "x" * 300
"""No file system takes a name that long."""

BAD = {
    "command: 'nope': choose one of list, run, frontier, search, table, save, selfcheck": ["nope"],
    "--nope: no such option; leave it out": ["run", "quick", "--nope"],
    "--repeats: no value: give one": ["run", "quick", "--repeats"],
    "--timeout: 'abc': give a number": ["run", "quick", "--timeout", "abc"],
    "--format: 'pdf': choose one of terminal, markdown, csv": ["table", "--format", "pdf"],
    "--compile-mode: 'fast': choose one of default, max-autotune, reduce-overhead": [
        *("run", "--models", "resnet20", "--compile-mode", "fast")
    ],
    "suite: none given": ["run"],
    "suite: 'nope': choose one of quick": ["run", "nope"],
    "models: 'resnet20': a suite brings its own": ["run", "quick", "--models", "resnet20"],
    "model: 'resnet19': choose one of": ["run", "--models", "resnet19"],
    "precision: 'int3': choose one of": ["run", "--models", "resnet20", "--precisions", "int3"],
    "recipe: 'nope': choose one of": ["run", "quick", "--recipe", "nope"],
    "launcher: 'nope': choose one of ddp": ["run", "quick", "--launcher", "nope"],
    "data: 'nope': write shapes": ["run", "quick", "--data", "nope"],
    "/missing: no cifar-10-batches-py": ["run", "quick", "--data", "cifar10:missing"],
    "/missing.npz: no such file": ["run", "quick", "--data", "npz:missing.npz"],
    "/missing/train: no such folder": ["run", "quick", "--data", "folder:missing"],
    "batch-size: 0: give 1 or more": ["run", "quick", "-b", "0"],
    "batch-size: 20000: shapes has 10000 images; give at most": [*CELLS, "-b", "20000"],
    "batch-size: 10: does not divide over 3 processes": [*CELLS, "-b", "10", "--num-processes=3"],
    "num-processes: 0: give 1 or more": ["run", "quick", "--num-processes", "0"],
    "seeds: 0: give 1 to 10000": ["run", "quick", "--seeds", "0"],
    "repeats: 0: give 1 or more": ["run", "quick", "--repeats", "0"],
    "timeout: 0.0: give a positive number": ["run", "quick", "--timeout", "0"],
    "train-samples: 5: give 0 (speed only)": ["run", "quick", "--train-samples", "5"],
    "--seeds": ["run", "quick", "--seeds", "two"],
    "run: 'nope': no such run": ["run", "--resume", "nope"],
    "compile-mode: 'max-autotune': needs --compile": [*CELLS, "--compile-mode=max-autotune"],
    "compile-mode: 'max-autotune': not with --accumulation": [
        *CELLS,
        "--compile",
        "--compile-mode=max-autotune",
        "--accumulation=2",
    ],
    "--compile-mode": [*CELLS, "--compile", "--compile-mode=nope"],
    "accumulation: 0: give 1 to 65536": [*CELLS, "--accumulation", "0"],
    "accumulation: 3: not with --resume": ["run", "--resume", "nope", "--accumulation", "3"],
    "local-steps: 3: not with --resume": ["run", "--resume", "nope", "--local-steps", "3"],
    "overlap: False: is for several processes": ["run", "quick", "--no-overlap"],
    "compression: 'bf16': is for ddp, not for fsdp": [
        *("run", "quick", "--num-processes", "2", "--launcher", "fsdp", "--compression", "bf16")
    ],
    "num-processes: '2,2': give each number once": ["run", "quick", "--num-processes", "2,2"],
    "seeds: 3: not with --resume": ["run", "--resume", "nope", "--seeds", "3"],
    "suite: quick: not with --resume": ["run", "quick", "--resume", "nope"],
    "runs-dir: ": ["run", "quick", "--runs-dir", "file/runs"],
    "/runs'; start one with bench run": ["table"],
    "--models: '': give one or more": ["run", "quick", "--models", ""],
    "--inference-batch-sizes: '1,a': give whole numbers": [*CELLS, "--inference-batch-sizes=1,a"],
    "records: empty.jsonl: no whole record in it; give another file": ["table", "empty.jsonl"],
    "/file': is a file; give a folder": ["list", "--runs-dir", "file"],
    "runs-dir: '': is no path in UTF-8": ["run", "quick", "--runs-dir", ""],
    "timed-steps: 5: not with --timed-seconds": [
        *(*CELLS, "--timed-steps", "5", "--timed-seconds", "3"),
    ],
    "bench: data: '': write shapes": ["run", "quick", "--data", ""],
    "timed-steps: 99999999999999999999: give at most": [*CELLS, "--timed-steps", 20 * "9"],
    "train-samples: 99999999999999999999: give at most": [*CELLS, "--train-samples", 20 * "9"],
    "inference-batch-sizes: '100000000': give different sizes of 1 to 1000000": [
        *(*CELLS, "--inference-batch-sizes", "100000000"),
    ],
    "inference-batch-sizes: '0': give different sizes": [*CELLS, "--inference-batch-sizes", "0"],
    "records: missing.jsonl: No such file": ["table", "missing.jsonl"],
    "records: '~no-such-user/x': no such user": ["table", "~no-such-user/x"],
    "xxx': File name too long; give another path": ["table", LONG],
    "xxx/run.json': File name too long; give another path": ["save", LONG],
    "runs-dir: '~no-such-user/x': no such user": ["list", "--runs-dir=~no-such-user/x"],
    "xxx': File name too long; give": ["list", "--runs-dir", LONG],
    "run: '~no-such-user/x': no such user": ["run", "--resume=~no-such-user/x"],
    "column: 'nope': choose a column of the CSV, such as batch, procs": [
        "table",
        "good.jsonl",
        "--sort",
        "nope",
    ],
    "filter: 'nope': write COLUMN=VALUE": ["table", "good.jsonl", "--filter", "nope"],
    "bad.jsonl:1": ["table", "bad.jsonl"],
    "newer.jsonl:1: schema_version: 99": ["table", "newer.jsonl"],
    "--format": ["table", "good.jsonl", "--format", "yaml"],
    "run: 'nope': no such run ": ["save", "nope"],
    "RUN: none given: give the run's id or its folder (see bench save --help)": ["save"],
    "max-rounds: 5: give 6 or more": ["selfcheck", "--max-rounds", "5"],
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with record files: a good one, one with an unknown key, a newer one."""
    (cell,) = grid(["resnet20"], ["fp32"])
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=(cell,)),))
    task = runs.create(suite, tmp_path / "other").plan.tasks[0]
    append_record(tmp_path / "good.jsonl", record_of(Job(task=task)))
    text = (tmp_path / "good.jsonl").read_text()
    (tmp_path / "bad.jsonl").write_text(text.replace('"suite":', '"color": 1, "suite":', 1) + text)
    newer = text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    (tmp_path / "newer.jsonl").write_text(newer)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("message", "words"), BAD.items())
def test_bad_input_is_one_line_and_exit_code_2(files, capsys, message, words):
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("bench: ")
    assert message in output.err
    assert output.out == ""
    assert not (files / "runs").exists() or not list((files / "runs").iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--bogus", "--bogus: no such option; leave it out"),
        ("--seeds=x", "--seeds: 'x': give a whole number"),
    ],
)
def test_the_line_on_a_bad_option_is_the_same_in_any_encoding(monkeypatch, encoding, word, told):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(sys, "stderr", errors)
    assert main(["run", "quick", word]) == 2
    assert errors.getvalue() == f"bench: {told} (see bench run --help)\n"


def test_what_is_no_utf_8_is_refused(files, capsys):
    for words in (
        [*CELLS, "--runs-dir", "r\udcff"],
        [*CELLS, "--data", "npz:b\udcff.npz", "--dry-run"],
    ):
        assert main(words) == 2
        assert "is no path in UTF-8; give another one" in capsys.readouterr().err


def test_a_variable_that_tells_no_number_of_threads_is_refused_first(files, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "abc")
    assert main([*CELLS, "--num-processes", "2"]) == 2
    assert capsys.readouterr().err == (
        "bench: OMP_NUM_THREADS: 'abc': give 1 or more, or unset it\n"
    )
    assert not (files / "runs").exists()


def test_a_file_without_a_whole_record_is_named(files, capsys):
    torn = files / "torn.jsonl"
    torn.write_text('{"schema_version": 2')
    assert main(["table", str(torn)]) == 2
    assert capsys.readouterr().err == (
        f"bench: records: {torn}: no whole record in it; give another file\n"
    )


def test_a_damaged_data_set_is_found_before_anything_starts(files, npz, capsys):
    npz.write_bytes(npz.read_bytes()[:2000])
    assert main([*CELLS, "--data", f"npz:{npz}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (files / "runs").exists()


def test_a_batch_larger_than_the_data_is_refused(files, npz, capsys):
    assert main([*CELLS, "--data", f"npz:{npz}", "-b", "97"]) == 2
    assert "batch-size: 97: npz:" in capsys.readouterr().err


def test_every_data_set_is_known_by_its_images_but_the_embedded_one(npz):
    named = parse_data(f"npz:{npz}")
    tasks = [
        Task(cell=cell, protocol=Protocol())
        for data in (DataConfig(), named)
        for cell in grid(["resnet20"], ["fp32"], data=data, batch_sizes=(16,))
    ]
    before = preflight.check(tasks)
    assert before == {named: load_dataset(named).fingerprint()}
    arrays = dict(np.load(npz))
    arrays["test_images"][0, 0, 0, 0] ^= 1
    np.savez(npz, **arrays)
    assert preflight.check(tasks)[named] != before[named]


def test_the_embedded_data_set_has_as_many_images_as_is_said():
    train = load_shapes(test=100).train
    assert len(train) == preflight.SHAPES_TRAIN_IMAGES
    assert train.images.shape[2:] == preflight.SHAPES_SIZE


# --- Help, list, dry run ---


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *(
            [name, "-h"]
            for name in ("list", "run", "frontier", "search", "table", "save", "selfcheck")
        ),
    ],
)
def test_help_has_examples_and_exits_0(capsys, words):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert code in (0, None)
    assert output.err == ""
    shown = "examples:\n  bench" if words == ["--help"] else f"example:\n  bench {words[0]}"
    assert shown in output.out


def test_list_names_every_suite_with_cells_and_time(files, capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SUITES)
    assert all(re.search(r"; \d+ cells, about \d+ (s|min|h)", line) for line in lines)


def test_a_dry_run_shows_commands_that_a_shell_can_read_and_starts_nothing(files, capsys):
    words = [*CELLS, "--precisions", "fp32,bf16", "-b", "256", "--channels-last", "--compile"]
    words += ["--seeds", "3", "--launcher", "ddp", "--num-processes", "2", "--timeout", "600"]
    assert main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/12] resnet20 fp32 channels-last compile b256 x2  about ")
    command = shlex.split(lines[1])
    assert "GOMP_SPINCOUNT=100000" in command
    assert command[command.index("--num_processes") + 1] == "2"
    assert command[-3:] == ["-m", "bench.worker", "FOLDER"]
    assert lines[-1].startswith("12 cells, about ")
    assert lines[-1].endswith("(from rules of thumb alone)")
    assert not (files / "runs").exists()


def test_a_dry_run_shows_the_settings_that_would_be_recorded(files, capsys, monkeypatch):
    chosen = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_PLACES": "{0:4}, {4:4}", "MALLOC_TOP_PAD_": "1"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert main([*CELLS, "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    settings = dict(word.split("=", 1) for word in words[: words.index(sys.executable)])
    assert settings == recorded_environment(environment_for(1, os.environ))
    assert settings.items() >= chosen.items()
    assert "GOMP_SPINCOUNT" not in settings, "a user's own wait policy stands"


def test_options_change_the_cells_of_a_suite(files, capsys):
    assert main(["run", "quick", "-b", "64", "--train-samples", "0", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "resnet20 fp32 b64" in out
    assert "b128" not in out


# --- Runs ---


def test_a_run_prints_tables_time_and_folder(tmp_path):
    done = bench(tmp_path, *CELLS, fake="ok")
    assert done.returncode == 0, done.stderr
    assert re.search(r"resnet18 .* 256", done.stdout)
    assert re.search(r"2 cells in \d+ s; records and logs are in runs/\S+", done.stdout)
    assert [line[:5] for line in done.stderr.splitlines()] == ["[1/2]", "[2/2]"]
    (run,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in run.iterdir() if path.name[0] != ".") == [
        "cells", "records.jsonl", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fake", "code", "expected"),
    [
        ("resnet20=unsupported", 0, ["unsupported", "ok"]),
        ("resnet20=oom", 1, ["oom", "ok"]),
        ("resnet20=hang", 1, ["timeout", "ok"]),
    ],
)
def test_a_broken_cell_is_survived_and_told_by_the_exit_code(tmp_path, fake, code, expected):
    done = bench(tmp_path, *CELLS, fake=fake, FAKE_TIME_UP="1")
    assert done.returncode == code, done.stderr
    assert statuses(tmp_path) == expected
    assert f"{expected[0]}:" in done.stdout, "the table shows the row with its status"
    assert ("try them again: bench run --resume runs/" in done.stdout) == (code == 1)


def test_a_cell_that_broke_after_its_training_is_told_and_tried_again(tmp_path):
    done = bench(tmp_path, *CELLS, fake="resnet20=later-sleep,ok", FAKE_TIME_UP="1")
    assert done.returncode == 1, done.stderr
    assert "ok 256 images/s" in done.stderr.splitlines()[0], "what was measured counts"
    assert "1 did not finish; to try them again: bench run --resume runs/" in done.stdout
    again = bench(tmp_path, "run", "--resume", runs.newest(tmp_path / "runs").id)
    assert again.returncode == 0, again.stderr
    assert [" kept " in line for line in again.stderr.splitlines()] == [True, False], "those first"
    records = runs.newest(tmp_path / "runs").records()
    assert [record.status for record in records] == ["ok"] * 3
    assert [record.finished for record in records] == [False, True, True]


def test_a_run_goes_on_when_its_terminal_closes_if_nohup_started_it(tmp_path):
    process = subprocess.Popen(
        ["nohup", sys.executable, str(FAKE), *CELLS, "--timeout", "20"],
        cwd=tmp_path,
        env=environ(FAKE="resnet18=hang,ok"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("runs/*/cells/*/child")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert statuses(tmp_path) == ["ok", "timeout"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_run_ends_its_cell_and_can_be_resumed(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, str(FAKE), *CELLS],
        cwd=tmp_path,
        env=environ(FAKE="resnet18=hang"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (children := list(tmp_path.glob("runs/*/cells/*/child"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "resnet20" in output, "what is finished is shown"
    assert "resnet18" not in output
    last = errors.splitlines()[-1]
    assert "to go on: bench run --resume runs/" in last
    pid = int(children[0].read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert statuses(tmp_path) == ["ok"]
    command = shlex.split(last.partition("to go on: bench ")[2])
    done = bench(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "[1/2] resnet20 fp32 b64 ... kept ok" in done.stderr
    assert statuses(tmp_path) == ["ok", "ok"]


def test_a_cell_that_outlives_a_killed_run_is_ended_by_the_next_one(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(FAKE), *CELLS], cwd=tmp_path, env=environ(FAKE="hang")
    )
    while not (children := list(tmp_path.glob("runs/*/cells/*/child"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    child = psutil.Process(int(children[0].read_text()))
    assert child.is_running()
    name = runs.newest(tmp_path / "runs").id
    done = bench(tmp_path, "run", "--resume", name)
    assert done.returncode == 0
    assert done.stderr.startswith("note: ending what a killed bench has left running in ")
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert statuses(tmp_path) == ["ok", "ok"]


def test_what_a_worker_finished_after_its_run_was_killed_is_not_measured_again(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(FAKE), *CELLS], cwd=tmp_path, env=environ(FAKE="ok-hang")
    )
    while not list(tmp_path.glob("runs/*/cells/*/child")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    run = runs.newest(tmp_path / "runs")
    assert run.records() == []
    done = bench(tmp_path, "run", "--resume", run.id, fake="crash")
    assert "note: kept what resnet20 fp32 b64 had measured\n" in done.stderr
    assert done.returncode == 1
    assert statuses(tmp_path) == ["ok", "failed"]
    done = bench(tmp_path, "run", "--resume", run.id)
    assert "note:" not in done.stderr, "once is enough"
    assert statuses(tmp_path) == ["ok", "failed", "ok"]


def test_a_dry_run_of_a_resumed_run_shows_what_is_missing(tmp_path):
    assert bench(tmp_path, *CELLS, fake="resnet20=crash").returncode == 1
    name = runs.newest(tmp_path / "runs").id
    done = bench(tmp_path, "run", "--resume", name, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "[1/1] resnet20 fp32" in done.stdout and "resnet18" not in done.stdout
    assert statuses(tmp_path) == ["failed", "ok"]


def test_resume_measures_anew_what_is_of_images_that_changed(tmp_path, npz):
    data = parse_data(f"npz:{npz}")
    cells = grid(["resnet20"], ["fp32"], data=data, batch_sizes=(16,))
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=cells),))
    run = runs.create(suite, tmp_path / "runs")
    for fingerprint, count in (("other", 1), (load_dataset(data).fingerprint(), 0)):
        facts = DataFacts(
            name="npz", fingerprint=fingerprint, train_samples=96, test_samples=50, classes=10
        )
        append_record(run.records_file, record_of(Job(task=run.plan.tasks[0]), data=facts))
        done = bench(tmp_path, "run", "--resume", run.id, "--dry-run")
        assert done.stdout.splitlines()[-1].startswith(plural(count, "cell") + ", about "), (
            done.stderr
        )


def test_a_cell_that_timed_out_is_given_more_time_on_resume(tmp_path):
    timed_out = bench(
        tmp_path, *CELLS, "--timeout", "30", fake="resnet20=hang,ok", FAKE_TIME_UP="1"
    )
    assert timed_out.returncode == 1
    name = runs.newest(tmp_path / "runs").id
    done = bench(tmp_path, "run", "--resume", name, "--timeout", "0")
    assert (done.returncode, done.stderr) == (
        2,
        "bench: timeout: 0.0: give a positive number, at most 1000000000000\n",
    )
    done = bench(tmp_path, "run", "--resume", name, "--timeout", "60")
    assert done.returncode == 0, done.stderr
    old, new, _ = runs.newest(tmp_path / "runs").records()
    assert [(each.status, each.protocol.timeout) for each in (old, new)] == [
        ("timeout", 30.0),
        ("ok", 60.0),
    ]
    assert old.key == new.key
    done = bench(tmp_path, "run", "--resume", name, "--timeout", "90", "--dry-run")
    assert done.stdout.startswith("0 cells"), "another limit makes no record less good"


def test_more_processes_than_gpus_are_refused():
    cells = grid(["resnet20"], ["fp32"], num_processes=4)
    tasks = [Task(cell=cell, protocol=Protocol()) for cell in cells]
    for gpus in (("H200",), ("H200", "H200")):
        with pytest.raises(ConfigError, match=f"num-processes: 4: this machine has {len(gpus)} "):
            preflight.check_devices(tasks, lambda _, gpus=gpus: environment(gpu_names=gpus))
    preflight.check_devices(tasks, lambda count: environment())
    preflight.check_devices(tasks, lambda count: environment(gpu_names=("H200",) * 4))


def test_resume_measures_anew_what_other_code_measured(tmp_path):
    assert bench(tmp_path, *CELLS, FAKE_CODE="old").returncode == 0
    name = runs.newest(tmp_path / "runs").id
    assert bench(tmp_path, "run", "--resume", name, FAKE_CODE="new").returncode == 0
    records = runs.newest(tmp_path / "runs").records()
    assert [record.environment.code_digest for record in records] == ["old", "new"] * 2


def test_a_disturbed_cell_is_told_and_measured_again_on_resume(tmp_path):
    done = bench(tmp_path, *CELLS, fake="resnet20=disturbed,ok")
    assert done.returncode == 0
    assert "1 disturbed; to measure it again: bench run --resume runs/" in done.stdout
    assert "(disturbed: a goat)" in done.stderr
    assert bench(tmp_path, "run", "--resume", runs.newest(tmp_path / "runs").id).returncode == 0
    records = runs.newest(tmp_path / "runs").records()
    assert [record.valid for record in records] == [False, True, True]


# --- Tables and results ---


def test_table_filters_sorts_and_formats(files, capsys):
    main(["table", "good.jsonl", "--format", "csv", "--filter", "model=resnet20"])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["model"], float(row["train_throughput"])) == ("resnet20", 256.0)
    main(["table", "good.jsonl", "--format", "markdown", "--sort", "train"])
    assert "### fp32" in capsys.readouterr().out


def test_a_torn_last_line_is_a_notice_on_stderr(files, capsys):
    with Path("good.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "ru')
    assert main(["table", "good.jsonl", "--format", "csv"]) == 0
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert "note: good.jsonl:2: the last line is incomplete" in output.err
    assert len(output.out.splitlines()) == 2
    assert main(["table", "good.jsonl", "--sort", "nope"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: column: 'nope'"), "an error comes alone"


def test_runs_and_results_may_lie_in_the_home_folder(files, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(files))
    run = runs.newest(files / "other")
    append_record(run.records_file, record_of(Job(task=run.plan.tasks[0])))
    assert main(["save", run.id, "--runs-dir=~/other", "--results-dir=~/results"]) == 0
    assert list((files / "results").glob("*/s.jsonl")) and not (files / "~").exists()
    assert main(["table", "~/good.jsonl"]) == 0


def test_save_says_what_it_does_not_replace(files, capsys):
    (cell,) = grid(["resnet20"], ["fp32"])
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=(cell,)),))
    for status in ("ok", "timeout"):
        run = runs.create(suite, files / "runs")
        record = record_of(Job(task=run.plan.tasks[0]), status=status, reason="why")
        append_record(run.records_file, record)
        assert main(["save", run.id]) == 0
    output = capsys.readouterr()
    assert "bench: note: resnet20 fp32 b64: timeout (why); the results keep" in output.err
    assert "note" not in output.out


def test_saving_waits_for_another_save_to_the_same_hardware(files):
    (cell,) = grid(["resnet20"], ["fp32"])
    suite = Suite(name="s", description="", plans=(Plan(protocol=Protocol(), cells=(cell,)),))
    run = runs.create(suite, files / "runs")
    append_record(run.records_file, record_of(Job(task=run.plan.tasks[0])))
    folder = files / "results" / environment().hardware
    folder.mkdir(parents=True)
    second = threading.Thread(target=save, args=(run, files / "results"))
    with in_turn(folder):
        second.start()
        second.join(0.3)
        assert second.is_alive() and not list(folder.iterdir())
    second.join(30)
    assert {path.name for path in folder.iterdir()} == {"s.jsonl", "s.md"}


def test_table_shows_the_newest_run_and_save_stores_it(tmp_path):
    assert bench(tmp_path, *CELLS).returncode == 0
    assert "resnet18" in bench(tmp_path, "table").stdout
    done = bench(tmp_path, "save", runs.newest(tmp_path / "runs").id)
    assert done.returncode == 0
    assert done.stdout.split() == ["results/fake-2c/custom.jsonl", "results/fake-2c/custom.md"]
    assert done.stderr == "bench: note: these records name no git commit\n"
    assert len(read_records(tmp_path / "results/fake-2c/custom.jsonl")) == 2
    done = bench(tmp_path, "table", "results/fake-2c/custom.jsonl", "--format", "csv")
    assert len(done.stdout.splitlines()) == 3


NO_TORCH = """
import sys
from bench.commands import main
from bench.console import plural
try:
    code = main(sys.argv[1:])
finally:
    heavy = {"torch", "accelerate", "torchvision", "deepspeed"} & set(sys.modules)
    assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["table", "good.jsonl"],
        ["table", "good.jsonl", "--format", "csv"],
        ["list"],
        ["run", "quick", "--dry-run"],
        ["frontier", "--models", "resnet20", "--memory-limit", "4096", "--dry-run"],
        ["search", "sgd", "--model", "resnet20", "--lr", "0.01..1", "--dry-run"],
        ["--help"],
        ["run", "-h"],
    ],
)
def test_no_torch_is_imported(files, words):
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words],
        cwd=files,
        env=environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.fixture
def shell(files):
    """Run the program by a shell, with words for that: redirections, variables before it."""

    def run(before, words, after=""):
        command = f"{before} {sys.executable} -m bench {words} {after}"
        return subprocess.run(
            ["sh", "-c", command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )

    return run


QUICK = ROOT / "results/amd-epyc-family-25-model-17-2c/quick.jsonl"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_are_spelled_out_where_the_terminal_has_no_such_characters(shell, encoding):
    done = shell(f"PYTHONIOENCODING={encoding}", f"table {QUICK}")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert "resnet18-w16" in text and "-" * 20 in text and "?" not in text


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_none_to_worry_about(shell, closed):
    assert shell("", f"table {QUICK}", closed).returncode == 0


@pytest.mark.parametrize("words", [f"table {QUICK}", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_told(shell, words, unbuffered):
    done = shell(f"PYTHONUNBUFFERED={unbuffered}", words, "> /dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        b"bench: output: cannot be written (No space left on device); make room, or write "
        b"elsewhere\n"
    )


def test_a_reader_that_has_enough_is_no_error(shell):
    done = shell("", f"table --format csv {QUICK}", "| true")
    assert (done.returncode, done.stderr) == (0, b"")
