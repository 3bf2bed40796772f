"""The self-check: judged by hand, with workers that measure nothing, and once for real."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_worker import record_of

from bench import execution, runs, selfcheck
from bench.commands import main
from bench.job import Fault, Job
from bench.protocol import Protocol
from bench.record import Measurement
from bench.selfcheck import FAULTS, MIN_ROUNDS, judge, judge_costs, judge_wrong_dtype
from bench.spec import Plan, Suite, expand, grid
from cifar.errors import ConfigError
from cifar.serialize import from_json, to_json

pytestmark = pytest.mark.usefixtures("own_locks")

ROOT = Path(__file__).parents[1]
TASK = expand(selfcheck.suite())[0]
PLAIN, COST = 0.040, 0.050


def rate(*seconds):
    return Measurement(
        name="train_throughput",
        unit="samples/s",
        better="higher",
        labels={"samples_per_step": 16},
        samples=seconds,
    )


def timed(*seconds):
    return Measurement(name="fault_seconds", unit="s", better="none", samples=(seconds,))


def record(job, added=COST, plain=PLAIN, cost=COST):
    """What a worker with this fault would write if a cost added `added` seconds to every step."""
    fault = job.fault
    if fault and fault.kind == "wrong-dtype":
        return record_of(job, status="failed", reason="compute_dtype: bfloat16 where float32")
    seconds = plain + (added if fault else 0.0)
    costs = (timed(cost, cost, 9.0), timed(cost, cost)) if fault else ()
    return record_of(job, measurements=(rate((seconds, seconds, 7.0)), *costs))


def rounds(count=MIN_ROUNDS, **changes):
    """Rounds in which all processes are as they should be, but for the changed ones."""
    return [
        {
            name: changes.get(name, record)(Job(task=TASK, fault=fault))
            for name, fault in FAULTS.items()
        }
        for _ in range(count)
    ]


def verdicts(findings):
    return {each.name: each.verdict for each in findings}


# --- Judging ---


def test_a_step_s_seconds_are_the_median_of_the_rank_whose_median_is_larger():
    two = record_of(Job(task=TASK), measurements=(rate((1.0, 5.0, 2.0), (3.0, 4.0, 1.0)),))
    assert selfcheck.step_seconds(two) == 3.0  # of 2 and 3


def test_the_true_cost_is_the_median_of_all_times_it_was_measured_by_itself():
    one = record_of(Job(task=TASK), measurements=(timed(0.1, 0.3), timed(0.2, 0.5, 0.4)))
    assert selfcheck.true_seconds(one) == 0.3


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        # The interval of 6 values ends 0.357 of the way from the first to the second value.
        ((48, 49, 50, 50, 51, 52), "seen"),  # 48.4 to 51.6: holds 50
        ((51, 52, 52, 53, 53, 54), "seen"),  # 51.4 to 53.6: within 10 %
        ((48, 50, 52, 52, 54, 58), "seen"),  # 48.7 to 56.6: holds 50, 3.9 to a side
        ((51, 52, 52, 53, 53, 58), "not seen"),  # 51.4 to 56.2: neither
        ((56, 60, 70, 70, 80, 90), "not seen"),  # 57.4 to 86.4: wide, and wholly beyond 10 %
        ((42, 46, 50, 50, 54, 58), "too noisy"),  # 43.4 to 56.6: 6.6 to a side, 5 are allowed
        ((51, 54, 60, 60, 65, 70), "too noisy"),  # 52.1 to 68.2: 8.1 to a side, begins within 10 %
        ((0, 0, 0, 0, 0, 0), "not seen"),
        ((24, 25, 25, 25, 25, 26), "not seen"),  # half of it
        ((99, 100, 100, 100, 100, 101), "not seen"),  # twice
        ((28, 49, 50, 50, 51, 70), "too noisy"),  # 35.5 to 63.2
        ((-1, 49, 50, 50, 51, 52), "too noisy"),
        ((48, 49, 50, 51, 52), "too noisy"),  # five values have no 95 % interval
    ],
)
def test_a_cost_of_50_ms_is_seen_at_its_true_size_or_not(differences, verdict):
    found = judge("sleep", [each / 1000 for each in differences], 0.050, slack=0.005)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-2, -1, 0, 0, 1, 2), "seen"),
        ((1, 1, 1, 2, 2, 3), "seen"),  # within 10 % of the smallest cost
        ((1, 1, 1, 2, 2, 9), "not seen"),
        ((-20, 0, 0, 0, 0, 20), "too noisy"),
    ],
)
def test_the_control_must_show_nothing(differences, verdict):
    found = judge("control", [each / 1000 for each in differences], 0.0, slack=0.005)
    assert found.verdict == verdict


def test_a_finding_by_hand():
    found = judge("sleep", [0.048, 0.050, 0.051, 0.053, 0.052, 0.049], 0.050, slack=0.005)
    assert (found.low, found.added, found.high) == pytest.approx(
        (0.048 + 0.001 * 0.357143, 0.0505, 0.053 - 0.001 * 0.357143)
    )
    assert found.ratio == pytest.approx(1.01)


def test_every_cost_is_judged_against_the_plain_process_of_its_own_round():
    drifting = rounds()
    for number, each in enumerate(drifting):  # the machine gets slower from round to round
        for name in each:
            job = Job(task=TASK, fault=FAULTS[name])
            each[name] = record(job, plain=PLAIN * (1 + number))
    assert verdicts(judge_costs(drifting)) == dict.fromkeys(("control", "sleep", "matmul"), "seen")


def test_a_cost_is_judged_against_what_it_took_in_its_own_process():
    drifting = rounds()
    for number, each in enumerate(drifting):
        job, cost = Job(task=TASK, fault=FAULTS["matmul"]), COST * (1 + number)
        each["matmul"] = record(job, added=cost, cost=cost)
    (found,) = [each for each in judge_costs(drifting) if each.name == "matmul"]
    true = COST * (1 + (MIN_ROUNDS - 1) / 2)
    assert (found.verdict, found.true, found.ratio) == ("seen", true, pytest.approx(1.0))
    assert found.high - found.low == pytest.approx(0.0)


def test_a_cost_that_does_not_reach_the_window_is_not_seen():
    unseen = rounds(sleep=lambda job: record(job, added=0.0))
    assert verdicts(judge_costs(unseen)) == {
        "control": "seen",
        "sleep": "not seen",
        "matmul": "seen",
    }


def test_a_control_that_differs_is_told():
    slow = rounds(control=lambda job: record(job, plain=PLAIN * 2))
    assert verdicts(judge_costs(slow))["control"] == "not seen"


def test_a_process_that_fails_leaves_nothing_to_judge():
    broken = rounds(matmul=lambda job: record_of(job, status="oom", reason="no room"))
    findings = judge_costs(broken)
    assert set(verdicts(findings).values()) == {"failed"}
    assert findings[0].note == "oom: no room"


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"status": "failed", "reason": "compute_dtype: bfloat16 where float32"}, "seen"),
        ({"status": "failed", "reason": "ValueError: out of luck"}, "not seen"),
        ({"status": "ok"}, "not seen"),
    ],
)
def test_a_wrong_dtype_must_fail_for_that_reason(fields, verdict):
    assert judge_wrong_dtype(record_of(Job(task=TASK), **fields)).verdict == verdict


# --- The program ---


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """The jobs that `bench selfcheck` starts in `tmp_path`, their workers stood in for."""
    started = []

    def launch(job, folder):
        started.append(job)
        return replace(record(job), suite=job.suite)

    execute = selfcheck.execute
    monkeypatch.setattr(selfcheck, "execute", lambda run: execute(run, launch=launch))
    monkeypatch.chdir(tmp_path)
    return started


def test_it_ends_with_the_first_rounds_that_tell_and_keeps_every_record(jobs, capsys):
    assert main(["selfcheck"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sleep +50\.00 +50\.00 +50\.00 to 50\.00 +1\.000 +seen", out)
    assert re.search(r"control +0\.00 +0\.00 +0\.00 to 0\.00 +seen", out)
    assert "\x1b" not in out
    run = runs.newest(Path("runs"))
    assert len(jobs) == len(run.records()) == 1 + 4 * MIN_ROUNDS
    assert {job.suite for job in jobs} == {run.plan.suite} == {"selfcheck"}
    assert len({job.task.key for job in jobs}) == len(jobs)
    orders = {tuple(job.fault for job in jobs[i : i + 4]) for i in range(1, len(jobs), 4)}
    assert len(orders) > 1
    kinds = [job.fault.kind if job.fault else "" for job in jobs]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "": 2 * MIN_ROUNDS,
        "sleep": MIN_ROUNDS,
        "matmul": MIN_ROUNDS,
        "wrong-dtype": 1,
    }


@pytest.mark.parametrize("kind", ["sleep", "wrong-dtype"])
def test_what_is_not_seen_is_exit_code_1_and_gets_no_second_chance(jobs, monkeypatch, capsys, kind):
    def blind(job, fault=record):
        hidden = job.fault is not None and job.fault.kind == kind
        return record(replace(job, fault=None)) if hidden else record(job)

    monkeypatch.setattr(selfcheck, "true_seconds", lambda _: COST)
    execute = selfcheck._Execution
    monkeypatch.setattr(
        selfcheck, "_Execution", lambda run, _: execute(run, lambda job, folder: blind(job))
    )
    assert main(["selfcheck", "--max-rounds", "7"]) == 1
    assert re.search(rf"{kind} .*not seen", capsys.readouterr().out)
    assert len(runs.newest(Path("runs")).records()) == 1 + 4 * MIN_ROUNDS


def test_what_is_too_noisy_is_measured_in_more_rounds_up_to_the_last(jobs, monkeypatch, capsys):
    def noisy(job, folder):
        jobs.append(job)
        number = (len(jobs) - 2) // 4  # of the round, after the wrong format
        return record(job, added=COST * (1.3 if number % 2 else 0.7))

    execute = selfcheck._Execution
    monkeypatch.setattr(selfcheck, "_Execution", lambda run, _: execute(run, noisy))
    assert main(["selfcheck", "--max-rounds", "8"]) == 1
    assert re.search(r"sleep .*too noisy", capsys.readouterr().out)
    assert len(jobs) == 1 + 4 * 8


def test_a_process_that_fails_ends_it_at_once(jobs, monkeypatch, capsys):
    def broken(job, folder):
        jobs.append(job)
        return record_of(job, status="failed", reason="the worker broke")

    execute = selfcheck._Execution
    monkeypatch.setattr(selfcheck, "_Execution", lambda run, _: execute(run, broken))
    assert main(["selfcheck"]) == 1
    assert len(jobs) == 1 + 4
    assert "sleep: failed: the worker broke" in capsys.readouterr().out


def test_a_self_check_is_not_resumed_without_its_faults(jobs, capsys):
    main(["selfcheck"])
    assert main(["run", "--resume", runs.newest(Path("runs")).id]) == 2
    assert "a self-check is neither resumed, tabulated nor saved" in capsys.readouterr().err


def test_a_self_check_is_in_no_table(jobs, capsys):
    main(["selfcheck"])
    run = runs.newest(Path("runs"))
    file = str(run.records_file)
    for words, name in (([run.id], run.id), ([str(run.folder)], run.id), ([file], file)):
        capsys.readouterr()
        assert main(["table", *words]) == 2
        assert f"run: {name!r}: a self-check is neither" in capsys.readouterr().err
    assert main(["table"]) == 2
    assert "run: no run in" in capsys.readouterr().err


def test_the_newest_run_s_table_passes_self_checks_over(jobs, capsys):
    plan = Plan(protocol=Protocol(), cells=grid(["resnet32"], ["fp32"]))
    older = runs.create(Suite(name="aaa", description="", plans=(plan,)), Path("runs"))
    execution.measure(older, 1, older.plan.tasks[0], lambda job, folder: record(job))
    main(["selfcheck"])
    assert runs.newest(Path("runs")).plan.suite == selfcheck.SUITE
    capsys.readouterr()
    assert main(["table"]) == 0
    assert "resnet32" in capsys.readouterr().out


# --- What a worker is told ---


def test_a_fault_is_part_of_the_job_alone():
    job = Job(task=TASK, fault=Fault(kind="sleep", seconds=0.05))
    assert from_json(Job, to_json(job)) == job
    assert job.fault is not None
    assert job.fault.label == "sleep:0.05"
    assert Fault(kind="wrong-dtype").label == "wrong-dtype"
    assert from_json(Job, json.dumps({"task": json.loads(to_json(TASK))})).fault is None


@pytest.mark.parametrize(
    ("kind", "seconds"), [("sleep", 0.0), ("matmul", -1.0), ("wrong-dtype", 0.1), ("nope", 1.0)]
)
def test_a_fault_that_cannot_be_meant_is_refused(kind, seconds):
    fault = {"kind": kind, "seconds": seconds}
    text = json.dumps({"task": json.loads(to_json(TASK)), "fault": fault})
    with pytest.raises(ConfigError, match="fault"):
        from_json(Job, text)


@pytest.mark.slow
def test_real_processes_show_every_fault(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "selfcheck", "--runs-dir", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert "too noisy" not in done.stdout, f"run it on an idle machine:\n{done.stdout}"
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(control|sleep|matmul|wrong-dtype) .*\bseen$", done.stdout, re.MULTILINE)
    assert found == ["control", "sleep", "matmul", "wrong-dtype"]
    for record in runs.newest(tmp_path).records():
        assert record.valid == (record.find("fault_seconds") is None)
