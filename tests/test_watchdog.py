"""Who is missing where a group of processes makes no progress, and what does not count as that."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import ROOT, TINY_OPTIONS, complaints, finish, free_port, start

from cifar.meeting import Group
from cifar.pulse import Pulse
from cifar.store import Address
from cifar.watchdog import EXIT_CODE, STOPPING_SECONDS, Beat, Watchdog, missing, whereabouts

GROUP = Group(address=Address(host="here", port=1, is_launchers=True), name="group", rank=0, size=3)
TIMEOUT = 16.0


class Watched:
    """A watchdog of rank 0 whose thread, store and end are the test's."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, timeout: float = TIMEOUT, group: Group = GROUP
    ) -> None:
        self.pulse = Pulse()
        self.watchdog = Watchdog(group, timeout, pulse=self.pulse)
        self.told: list[tuple[str, int]] = []
        self.store = self.watchdog._correspondent
        self.answers = True
        monkeypatch.setattr(self.watchdog, "_end", lambda *told: self.told.append(told))
        self.others = {rank: Beat(number=0, host="node", pid=rank, waits=True) for rank in (1, 2)}
        self.frozen: set[int] = set()

    def pass_time(self, seconds: int, each: Callable[[], object] = lambda: None) -> None:
        """Let seconds pass, in which all but the frozen ranks tell of themselves."""
        for _ in range(seconds):
            if self.told:
                return
            each()
            for rank, beat in self.others.items():
                if rank not in self.frozen:
                    fields = {name: getattr(beat, name) for name in Beat.__slots__}
                    self.others[rank] = Beat(**{**fields, "number": beat.number + 1})
            if self.answers:
                if self.store.asks:
                    self.store.beats = dict(self.others)
                self.store.rounds += 1
            self.watchdog._look(1.0)

    def change(self, rank: int, **fields: object) -> None:
        old = {name: getattr(self.others[rank], name) for name in Beat.__slots__}
        self.others[rank] = Beat(**{**old, **fields})


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_group_that_goes_on_is_left_alone(watched: Watched) -> None:
    steps = iter(range(1000))
    watched.frozen = {2}  # which the others would notice by waiting for it
    watched.pass_time(100, lambda: watched.pulse.at(next(steps)))
    assert watched.told == []


def test_one_that_does_not_answer_is_named_by_the_first_of_the_others(watched: Watched) -> None:
    watched.pulse.at(12)
    watched.change(1, step=11)
    watched.frozen = {1}
    watched.pass_time(100)
    ((told, speaker),) = watched.told
    assert told.startswith("rank 1 (node, pid 1) has not come since step 12 (")
    assert told.endswith("s ago) and does not answer") and speaker == 0


def test_where_hosts_run_ahead_the_step_is_the_one_that_the_lost_rank_has_told(
    watched: Watched,
) -> None:
    """This one's host has queued steps that its GPU waits in for the other."""
    watched.watchdog._runs_ahead = True
    watched.pulse.at(30)
    watched.change(1, step=11)
    watched.frozen = {1}
    watched.pass_time(100)
    assert " has not come since step at least 11 (" in watched.told[0][0]


def test_a_rank_that_reads_from_its_device_is_one_that_waits(watched: Watched) -> None:
    """Wherever in the program that is; the rank that does not is named."""
    watched.change(2, waits=False, place="evaluation.py:1 evaluate")
    with watched.pulse.waiting():
        watched.pass_time(100)
    ((told, speaker),) = watched.told
    assert told.startswith("rank 2 (node, pid 2) has not come since step 0") and speaker == 0
    assert not watched.pulse.waits


def test_once_told_to_stop_it_waits_less_long_for_one_that_does_not_answer(
    watched: Watched,
) -> None:
    """Which has died, so that the launcher told the others to end; they may sit in C."""
    watched.pulse.is_stopping = True
    watched.frozen = {1}
    watched.pass_time(int(STOPPING_SECONDS) - 1)
    assert watched.told == []
    watched.pass_time(2)
    assert watched.told[0][0].startswith("rank 1 (node, pid 1) has not come since step 0")


def test_once_told_to_stop_a_slow_step_or_checkpoint_is_still_waited_for(watched: Watched) -> None:
    watched.pulse.is_stopping = True
    watched.pass_time(int(TIMEOUT) - 1)
    assert watched.told == []
    watched.frozen = {1}
    with watched.pulse.during("writing a checkpoint"):
        watched.pass_time(int(TIMEOUT) - 1)
    watched.pulse.beat()
    watched.frozen, watched.answers = set(), False
    watched.pass_time(int(TIMEOUT) - 1)
    assert watched.told == [], "a launcher that was killed has taken the store with it"


def test_once_told_to_stop_it_waits_less_long_for_rank_0_that_has_the_store(monkeypatch) -> None:
    """Which tells of nobody then; a launcher's store may have gone with a launcher alone."""
    address = replace(GROUP.address, is_launchers=False)
    watched = Watched(monkeypatch, group=replace(GROUP, address=address, rank=2))
    watched.others = {rank: Beat(number=0, host="node", pid=rank, waits=True) for rank in (0, 1)}
    watched.pass_time(20, watched.pulse.beat)
    watched.pulse.is_stopping, watched.answers = True, False
    with watched.pulse.during("writing a checkpoint"):
        watched.pass_time(int(TIMEOUT) - 1)
    watched.pulse.beat()
    watched.pass_time(int(STOPPING_SECONDS))
    assert watched.told == []
    watched.pass_time(2)
    ((told, speaker),) = watched.told
    assert told.startswith("rank 0 at here:1, which has the group's store, has not answered")
    assert speaker == 1


def test_what_was_long_already_when_it_is_told_to_stop_is_looked_into_first(monkeypatch) -> None:
    """The others have been asked for nothing until then, and are well."""
    watched = Watched(monkeypatch, timeout=60.0)
    watched.pass_time(12)
    watched.pulse.is_stopping = True
    watched.pass_time(40)
    assert watched.told == []
    watched.change(1, announced="writing a checkpoint")
    watched.pass_time(1)
    watched.frozen = {1}
    watched.pass_time(6)
    assert watched.told == [], "its thread may be short of time"
    watched.frozen = {2}
    watched.pass_time(6)
    assert watched.told[0][0].startswith("rank 2 (node, pid 2) has not come")


def test_it_takes_the_time_that_is_given_and_no_less(watched: Watched) -> None:
    watched.frozen = {1}
    watched.pass_time(int(TIMEOUT) - 1)
    assert watched.told == []
    watched.pass_time(1)
    assert len(watched.told) == 1


def test_one_that_never_came_is_named(watched: Watched) -> None:
    del watched.others[2]
    watched.pass_time(100)
    assert watched.told[0][0].startswith("rank 2 has not come at all")


def test_one_that_has_finished_fewer_steps_is_named(watched: Watched) -> None:
    watched.pulse.at(5)
    watched.change(1, step=5)
    watched.change(2, step=4, place="training.py:7 sleep", waits=False)
    watched.pass_time(100)
    ((told, speaker),) = watched.told
    assert re.fullmatch(
        r"rank 2 \(node, pid 2\) has not come since step 4 \(\d+ s ago\): it is at training\.py:7 "
        "sleep",
        told,
    )
    assert speaker == 0


def test_one_that_is_elsewhere_than_where_one_waits_is_named() -> None:
    beats = {
        rank: Beat(number=9, host="node", pid=rank, step=5, place=f"p{rank}", waits=rank != 0)
        for rank in range(3)
    }
    told, speaker = missing(beats, 60.0)
    assert told == "rank 0 (node, pid 0) has not come since step 5 (60 s ago): it is at p0"
    assert speaker == 1


def test_where_all_wait_nobody_is_blamed() -> None:
    beats = {
        rank: Beat(number=9, host="node", pid=rank, step=5, place=f"p{rank}", waits=True)
        for rank in range(2)
    }
    told, speaker = missing(beats, 60.0)
    assert told.startswith(
        "no process goes on since step 5 (60 s ago), all answer: rank 0 is at p0"
    )
    assert speaker == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_long_work_that_is_announced_is_no_hang(watched: Watched, rank: int) -> None:
    if rank == 0:
        with watched.pulse.during("compiling"):
            watched.pass_time(100)
    else:
        watched.change(1, announced="writing a checkpoint")
        watched.pass_time(100)
    assert watched.told == []
    watched.change(1, announced="")
    watched.pass_time(100)
    assert len(watched.told) == 1


def test_announced_work_does_not_excuse_one_that_does_not_answer(watched: Watched) -> None:
    watched.frozen = {2}
    with watched.pulse.during("compiling"):
        watched.pass_time(100)
    assert watched.told[0][0].startswith("rank 2 (node, pid 2) has not come")


def test_another_one_that_goes_on_is_waited_for(watched: Watched) -> None:
    counts = iter(range(1, 1000))
    watched.pass_time(100, lambda: watched.change(1, count=next(counts)))
    assert watched.told == []
    watched.pass_time(100)
    assert len(watched.told) == 1, "until it hangs as well"


def test_a_store_that_has_gone_is_told(watched: Watched) -> None:
    watched.answers = False
    watched.pass_time(100)
    assert watched.told[0][0].startswith("the launcher at here:1, which has the group's store, has")


def test_time_that_the_process_was_stopped_for_does_not_count(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread wakes up long after it should have: it has lost only one interval."""
    looked: list[float] = []
    monkeypatch.setattr(watched.watchdog, "_look", looked.append)
    times = iter([0.0, 1.0, 5000.0])
    monkeypatch.setattr("cifar.watchdog.time.monotonic", lambda: next(times))
    ends = iter([False, False, True])
    monkeypatch.setattr(watched.watchdog._ended, "wait", lambda seconds: next(ends))
    watched.watchdog._run()
    assert looked == [1.0, 2 * watched.watchdog._interval]


def test_the_hot_path_is_an_assignment_and_an_addition() -> None:
    """Counted, not timed: no lock, no store, no call but its own."""
    pulse, calls = Pulse(), []
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    pulse.at(7)
    sys.setprofile(None)
    assert calls.count("call") == 1 and calls.count("c_call") == 1  # itself, and setprofile
    assert (pulse.step, pulse.count) == (7, 1)


def test_a_thread_is_found_where_it_waits() -> None:
    here = sys._current_frames()[threading.get_ident()]
    place, waits = whereabouts(here)
    assert re.fullmatch(r"tests/test_watchdog\.py:\d+ \w+", place) and not waits
    code = compile("def all_reduce():\n  return frame()\n", "x/torch/distributed/c10d.py", "exec")
    names: dict[str, object] = {"frame": lambda: sys._getframe(1)}
    exec(code, names)
    function = names["all_reduce"]
    assert callable(function)
    assert whereabouts(function()) == ("distributed/c10d.py:2 all_reduce", True)


# --- Real processes ---

HUNG = """
import os, signal, sys, time
from pathlib import Path
from cifar.commands import main
from cifar.trainer import Trainer
original = Trainer.train_step
def train_step(self):
    if self.step == 2 and self.place.index == int(os.environ["WHO"]):
        Path(os.environ["TOLD"]).write_text(str(os.getpid()))
        if os.environ["HOW"] == "asleep":
            time.sleep(600)
        time.sleep(2.5)  # until it has told the others that it is at no long work of its own
        os.kill(os.getpid(), signal.SIGSTOP)
    original(self)
Trainer.train_step = train_step
sys.exit(main())
"""


def two(
    tmp_path: Path,
    npz: Path,
    how: str,
    *options: object,
    device: str = "--cpu",
    who: int = 1,
    then: Callable[[int], object] = lambda pid: None,
) -> Callable[[], tuple[int, str]]:
    """Start two processes, of which rank `who` stops in step 3; how the other one has ended.

    `then` is done with the other one's id.
    """
    (tmp_path / "hung.py").write_text(HUNG)
    words = ("train", *filter(None, [device]), *TINY_OPTIONS, "--data", f"npz:{npz}",
             "--output-dir", tmp_path / "run", *options)  # fmt: skip
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "CIFAR_RESTARTED": "1", "TOLD": str(tmp_path / "pid"), "HOW": how,
              "WHO": str(who)}  # fmt: skip
    processes = [
        start(tmp_path / "hung.py", *words, module=False, cwd=ROOT,
              environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip

    def ends() -> tuple[int, str]:
        try:
            then(processes[1 - who].pid)
            code, _, err = finish(processes[1 - who], seconds=120)
        finally:
            os.killpg(processes[who].pid, signal.SIGKILL)
            processes[who].communicate()
        return code, err

    return ends


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["stopped", pytest.param("asleep", marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_named_by_the_other(npz: Path, tmp_path: Path, how: str) -> None:
    assert_named(tmp_path, how, *two(tmp_path, npz, how, "--collective-timeout", "8")())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_told_to_stop_ends_though_another_one_never_comes(
    npz: Path, tmp_path: Path
) -> None:
    """It waits in C, as under NCCL for one that has died; the timeout is ten minutes."""
    assert_named(tmp_path, "stopped", *two(tmp_path, npz, "stopped", then=terminate(tmp_path))())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_told_to_stop_ends_though_rank_0_has_stopped_with_the_store(
    npz: Path, tmp_path: Path
) -> None:
    code, err = two(tmp_path, npz, "stopped", who=0, then=terminate(tmp_path))()
    assert code == EXIT_CODE
    (line,) = complaints(err)
    assert re.fullmatch(
        r"cifar: process 1: timeout: rank 0 at 127\.0\.0\.1:\d+, which has the group's store, has "
        r"not answered since step 2 \(\d+ s ago\); continue from the last checkpoint with --resume",
        line,
    )


def terminate(tmp_path: Path) -> Callable[[int], None]:
    """What sends a process SIGTERM when the other one has stopped."""

    def stop(pid: int) -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        time.sleep(3.5)
        os.kill(pid, signal.SIGTERM)

    return stop


def assert_named(tmp_path: Path, how: str, code: int, err: str) -> None:
    assert code == EXIT_CODE
    (line,) = complaints(err)
    pid = (tmp_path / "pid").read_text()
    why = {"stopped": r" and does not answer", "asleep": r": it is at .*/hung\.py:\d+ train_step"}
    assert re.fullmatch(
        rf"cifar: timeout: rank 1 \(.*, pid {pid}\) has not come since step 2 \(\d+ s ago\)"
        rf"{why[how]}; continue from the last checkpoint with --resume",
        line,
    )


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_process_that_hangs_is_named_by_the_other_under_nccl(
    npz: Path, tmp_path: Path, how: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ends = two(tmp_path, npz, how, "--collective-timeout", "30", device="")
    assert_named(tmp_path, how, *ends())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_that_was_stopped_for_a_while_goes_on(npz: Path, tmp_path: Path) -> None:
    ends = two(tmp_path, npz, "stopped", "--collective-timeout", "60")
    told = tmp_path / "pid"
    while not (told.exists() and told.read_text()):
        time.sleep(0.1)
    time.sleep(3)
    os.kill(int(told.read_text()), signal.SIGCONT)
    assert ends()[0] == 0
