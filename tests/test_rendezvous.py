"""Processes that meet, and those that cannot: one line that says why, in time, from each."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import sleep

import pytest
from meet_all import ENOUGH, TIMEOUT
from torch.distributed import TCPStore
from training import ROOT, finish, free_port, start

from cifar import interface, rendezvous
from cifar.errors import ConfigError, UnmetError
from cifar.interface import choose_interface, interface_of, source_towards
from cifar.meeting import Hello, Meeting, check_gpus

pytestmark = pytest.mark.multiprocess


def listening() -> socket.socket:
    """A port of another program, which takes connections and says nothing."""
    taken = socket.create_server(("127.0.0.1", 0))
    taken.setblocking(False)
    return taken


@contextlib.contextmanager
def serving(serve: Callable[[socket.socket], object]) -> Iterator[socket.socket]:
    """A port of another program, which does this with each connection."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                serve(server.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def echo(visitor: socket.socket) -> None:
    """Send back what comes first."""
    with visitor, contextlib.suppress(OSError):
        visitor.settimeout(1.0)
        visitor.sendall(visitor.recv(1000))


def process(rank: int, size: int, port: int, **variables: str) -> dict[str, str]:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "WORLD_SIZE": str(size), **where, **variables}


STRANGER = (
    "MASTER_ADDR: '127.0.0.1': rank 1 on .* reached something that does not answer as rank 0 at"
)
IN_VAIN = {
    *("absent", "late", "unreachable", "nowhere", "silent", "foreign", "answering", "elsewhere"),
    *("stray", "deaf"),
}
"""Jobs with a process that waits for all of its time."""


@dataclass(frozen=True)
class Jobs:
    """What became of the processes of all jobs, by `job-number`."""

    folder: Path
    ends: dict[str, tuple[int, float]]

    def of(self, job: str) -> list[tuple[int, str]]:
        """Exit code and the program's own lines, by process; torch's log is left out."""
        found = []
        for name in sorted(each for each in self.ends if each.startswith(f"{job}-")):
            text = (self.folder / f"{name}.out").read_text() + self.err(name)
            lines = [each for each in text.splitlines() if re.match("met as|meeting|cifar", each)]
            found.append((self.ends[name][0], "\n".join(lines)))
        return found

    def err(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs, started at once, for each takes as long as its processes wait in vain."""
    folder = tmp_path_factory.mktemp("jobs")
    store, other, agents = (
        TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
        for _ in range(3)
    )
    store.set("hello/1", json.dumps({"rank": 1, "size": 2, "host": "old", "pid": 1, "token": "x"}))
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with (
        listening() as silent,
        listening() as taken,
        serving(socket.socket.close) as foreign,
        serving(echo) as answering,
    ):
        listeners = {"silent": silent, "taken": taken, "foreign": foreign, "answering": answering}
        ports = {name: each.getsockname()[1] for name, each in listeners.items()}

        def job(*ranks_and_sizes: tuple[int, int], **variables: str) -> list[dict[str, str]]:
            port = free_port()
            return [process(*each, port, **variables) for each in ranks_and_sizes]

        listed = {
            "two": job((0, 2), (1, 2)),
            "alone": job((0, 1), LOCAL_RANK="0"),
            "restarted": [process(each, 2, store.port, **agent) for each in (0, 1)],
            "unreachable": job((1, 2)),
            "nowhere": job((1, 2), MASTER_ADDR="nowhere.invalid"),
            "silent": [process(1, 2, ports["silent"])],
            "foreign": [process(1, 2, ports["foreign"])],
            "answering": [process(1, 2, ports["answering"])],
            "elsewhere": job((0, 2), MASTER_ADDR="192.0.2.1"),
            "stray": job((0, 2), (1, 2), (2, 3)),
            "taken": [process(0, 2, ports["taken"])],
            "sizes": job((0, 2), (1, 3)),
            "absent": job((0, 4), (1, 4)),
            "late": [process(each, 3, other.port, **agent) for each in (0, 1)],
            "twice": job((0, 3), (1, 3), (1, 3)),
            "both": [process(*each, agents.port, **agent) for each in ((0, 3), (1, 3), (1, 3))],
            "deaf": job((1, 2), DEAF="1"),
            "options": job((0, 2), (1, 2), TOLD='{"epochs": "3", "lr": "0.1"}'),
            "local": job((0, 2), LOCAL_RANK="2", LOCAL_WORLD_SIZE="2"),
        }
        for name, processes in listed.items():
            vain = name in IN_VAIN
            for each in processes:
                each["MEETING"] = str(TIMEOUT if vain else ENOUGH)
        listed["twice"][2]["LATE"] = listed["both"][2]["LATE"] = "1"
        listed["stray"][1]["LATE"] = "2"
        listed["absent"][0]["LATE"] = "2"
        listed["late"][0]["LATE"] = "4"
        listed["options"][1]["TOLD"] = '{"epochs": "3", "lr": "0.2"}'
        (folder / "jobs.json").write_text(json.dumps(listed))
        program = [sys.executable, str(ROOT / "tests" / "meet_all.py"), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(program, env=environment, timeout=120, check=True)
    return Jobs(folder, json.loads((folder / "ends.json").read_text()))


def test_two_processes_meet(jobs: Jobs) -> None:
    assert jobs.of("two") == [(0, "met as 0 of 2"), (0, "met as 1 of 2")]


def test_the_groups_store_waits_as_long_as_a_collective_call(jobs: Jobs) -> None:
    """NCCL asks it for addresses when a new group is made; the meeting's time was for the start."""
    assert "store waits 30 s" in (jobs.folder / "two-0.out").read_text()


def test_connecting_takes_longer_the_more_processes_there_are() -> None:
    guard = rendezvous._Guard(45.0, {})
    before = guard._deadline
    guard.expect(str, rendezvous.CONNECT_SECONDS * 256)
    assert guard._deadline - before >= 0.5 * 256


def test_one_process_that_a_launcher_started_has_a_group_too(jobs: Jobs) -> None:
    assert jobs.of("alone") == [(0, "met as 0 of 1")]


def test_processes_started_anew_do_not_wait_for_those_before_them(jobs: Jobs) -> None:
    """The launcher's store still holds what a process of the first start has said."""
    assert jobs.of("restarted") == [(0, "met as 0 of 2"), (0, "met as 1 of 2")]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("unreachable", "MASTER_ADDR: '127.0.0.1': rank 1 on .* reached nothing at port"),
        ("nowhere", r"MASTER_ADDR: 'nowhere\.invalid': unknown here \(.*\); give the address of"),
        ("silent", STRANGER),
        ("foreign", STRANGER),
        ("answering", STRANGER),
        (
            "elsewhere",
            r"MASTER_ADDR: '192\.0\.2\.1': rank 0 on .* serves port \d+ \(MASTER_PORT\), but "
            "has not reached itself there within 6 s; give this machine's own address",
        ),
        ("taken", r"MASTER_PORT: '\d+': in use on .* by another program"),
        ("local", "LOCAL_RANK: '2': must be 0 to 1; start by"),
        ("deaf", r"MASTER_ADDR: '127\.0\.0\.1': this machine has not found out in time which"),
    ],
)
def test_a_process_that_cannot_meet_the_others_says_why(jobs: Jobs, job: str, said: str) -> None:
    ((code, line),) = jobs.of(job)
    assert code == 2
    assert re.match(f"(meeting|cifar)(: process 1)?: {said}", line) and "\n" not in line, line


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("sizes", r"WORLD_SIZE: '3': given to rank 1 \(.*, pid \d+\), but '2' to rank 0"),
        ("absent", "WORLD_SIZE: '4': rank 2, 3 has not come within 6 s; start as many processes"),
        ("late", "WORLD_SIZE: '3': rank 2 has not come within 6 s; start as many processes"),
        (
            "options",
            r"lr: '0\.2': given to rank 1 \(.*, pid \d+\), but '0\.1' to rank 0 \(.*, pid \d+\); "
            "start all processes with the same options and sources",
        ),
        ("twice", r"RANK: '1': given to two processes \(.*, pid \d+; .*, pid \d+\)"),
        ("both", r"RANK: '1': given to two processes \(.*, pid \d+; .*, pid \d+\)"),
    ],
)
def test_processes_that_do_not_fit_together_are_all_told(jobs: Jobs, job: str, said: str) -> None:
    ends = jobs.of(job)
    assert [code for code, _ in ends] == [2] * len(ends)
    for number, (_, line) in enumerate(ends):
        who = "meeting" if number == 0 else "meeting: process 1"
        assert re.match(f"{who}: {said}", line) and "\n" not in line, line


def test_a_process_that_rank_0_does_not_count_says_so(jobs: Jobs) -> None:
    """The others have met without it."""
    *met, (code, line) = jobs.of("stray")
    assert met == [(0, "met as 0 of 2"), (0, "met as 1 of 2")]
    assert code == 2 and "\n" not in line
    assert re.match(
        r"meeting: process 2: WORLD_SIZE: '3': given to rank 2 \(.*\), but '2' to", line
    )
    assert len(jobs.err("stray-2").splitlines()) == 1


def test_they_are_told_in_time_and_without_a_traceback(jobs: Jobs) -> None:
    for name, (_, seconds) in jobs.ends.items():
        assert seconds < TIMEOUT + 20, name
        assert "Traceback" not in jobs.err(name)


def test_two_processes_with_one_gpu_are_refused() -> None:
    hellos = [
        Hello(rank=each, size=3, host="node", pid=each, gpu=gpu)
        for each, gpu in enumerate(("a", "b", "a"))
    ]
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK: ranks 0 and 2 on node have .* same GPU"):
        check_gpus(hellos)
    check_gpus(hellos[:2])
    check_gpus([Hello(rank=each, size=2, host="node", pid=each) for each in (0, 1)])


def test_a_rank_that_another_process_has_is_told_though_rank_0_has_met_neither() -> None:
    """In rank 0's own store, where no earlier start has left a hello."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    first, second = (
        Meeting({**process(1, 2, store.port), "LOCAL_RANK": "1"}, "", {}, 5.0) for _ in range(2)
    )
    first._say_hello(store)
    with pytest.raises(ConfigError, match=r"^RANK: '1': given to two processes \("):
        second._say_hello(store)
    leader = Meeting({**process(0, 2, store.port), "LOCAL_RANK": "0"}, "", {}, 5.0)
    with pytest.raises(ConfigError, match=r"^RANK: '1': given to two processes \("):
        leader._lead(store)


def test_rank_0_says_who_lacks_however_many_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the time between two of them, and the guard says the same."""
    looked_for: list[int] = []
    monkeypatch.setattr(
        Meeting, "_greet", lambda *given: looked_for.append(given[3]) or sleep(0.01)
    )
    meeting = Meeting({**process(0, 65536, free_port()), "LOCAL_RANK": "0"}, "", {}, 3.0)
    with pytest.raises(UnmetError, match=r"^WORLD_SIZE: '65536': rank 1, 2, .* has not come") as it:
        meeting.hold()
    assert 0 < len(looked_for) < 65535
    assert meeting.unmet() == str(it.value)


def test_a_hello_of_other_sources_can_be_read() -> None:
    """Which may have other fields, and is refused for its sources' digest."""
    text = json.dumps({"rank": 1, "size": 2, "host": "node", "pid": 1, "told": {}, "new": 7})
    assert Hello.read(text).rank == 1


def test_rank_0_tells_the_others_where_all_are_and_not_what_they_were_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or what every process reads would grow with their number squared."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    meeting = Meeting({**process(0, 1, store.port), "LOCAL_RANK": "0"}, "", {"lr": "x" * 99}, 5.0)
    name, (peer,) = meeting._lead(store)
    assert peer.told and b"xxx" not in store.get(f"go/{name}")


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose address on the wire is 10.0.0.1."""
    monkeypatch.delenv(interface.VARIABLE, raising=False)
    names = {"127.0.0.1": "lo", "10.0.0.1": "wire"}
    monkeypatch.setattr(interface, "interface_of", lambda address: names.get(address, ""))
    monkeypatch.setattr(interface, "source_towards", lambda host: {"10.0.0.2": "10.0.0.1"}[host])


@pytest.mark.parametrize(
    ("own", "sources", "chosen"),
    [
        ("127.0.0.1", ["127.0.0.1", "127.0.0.1"], None),
        ("10.0.0.1", ["10.0.0.1", "10.0.0.2"], "wire"),
        ("127.0.0.1", ["127.0.0.1", "10.0.0.2"], "wire"),
        ("", ["", "10.0.0.2"], None),
    ],
)
@pytest.mark.usefixtures("wires")
def test_gloo_takes_the_interface_that_leads_to_other_machines(
    own: str, sources: list[str], chosen: str | None
) -> None:
    choose_interface(own, sources)
    assert os.environ.pop(interface.VARIABLE, None) == chosen


@pytest.mark.usefixtures("wires")
def test_an_interface_that_the_user_names_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interface.VARIABLE, "mine")
    choose_interface("10.0.0.1", ["10.0.0.1", "10.0.0.2"])
    assert os.environ[interface.VARIABLE] == "mine"


def test_the_interface_of_this_machine_is_found() -> None:
    assert source_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("192.0.2.1") == ""


@pytest.mark.gpu
def test_one_process_on_a_gpu_meets_itself_by_nccl() -> None:
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", 1, "-m", "cifar", "meet")
    code, out, err = finish(start(*words))
    assert (code, out.strip()) == (0, "all 1 have met"), err


def test_nothing_is_told_but_the_line_where_nobody_listens(jobs: Jobs) -> None:
    """torch's own store would tell of it in dozens, as of a program that answers."""
    for job in ("unreachable", "taken", "silent", "foreign", "answering", "elsewhere"):
        name = f"{job}-0"
        assert len(jobs.err(name).splitlines()) == 1, name


def test_a_program_that_has_met_nobody_ends_with_its_code() -> None:
    """And is not aborted by the thread in which torch's client still tries."""
    with serving(echo) as other:
        variables = process(1, 2, other.getsockname()[1], LOCAL_RANK="1")
        words = ("cifar", "meet", "--cpu", "--meeting-timeout", 2)
        code, _, err = finish(start(*words, environment=variables))
    assert code == 2
    (line,) = err.splitlines()
    assert "something that does not answer as rank 0" in line


def test_ctrl_c_is_noticed_while_torch_s_client_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = process(1, 2, silent.getsockname()[1], LOCAL_RANK="1")
        words = ("cifar", "meet", "--cpu", "--meeting-timeout", 100)
        waiting = start(*words, environment=variables)
        with silent.accept()[0]:
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(timeout=50) == 130
    finish(waiting)
