"""How the processes of a job meet and form their group, which Accelerate and DeepSpeed then use.

They meet at the store that `MASTER_ADDR` and `MASTER_PORT` name, of the launcher or of rank 0. Rank
0 greets the others, looks at what each was told, and gives the group a name that no earlier start
had: after an elastic restart the launcher's store still holds the addresses of the processes
before, at which the new ones would wait (`TORCHELASTIC_RESTART_COUNT` does not tell starts apart:
every node counts its own failures). What keeps them apart is one line that names the variable, its
value and the remedy, and comes in time whatever hangs.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cifar.errors import ConfigError, UnmetError
from cifar.interface import choose_interface, source_towards
from cifar.ranks import local_rank, rank, world_size

POLL_SECONDS = 0.05
"""Between two looks at what other processes have written."""
FAREWELL_SECONDS = 1.0
"""How long rank 0 keeps its store after a refusal, for the others to read it."""
GUARD_SECONDS = 5.0
"""Beyond the time for meeting, after which a process that sits in C is ended all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the processes meet; `is_launchers` if the launcher and not rank 0 has the store."""

    host: str
    port: int
    is_launchers: bool

    def connect(self, timeout: float, *, serve: bool = False) -> TCPStore:
        """A connection of one's own, or the store itself; seconds for every answer.

        Raises:
            RuntimeError: nothing answers there, or the port is taken.
        """
        return TCPStore(
            self.host,
            self.port,
            None,
            serve,
            timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The processes that have met: where, under which name, which of how many this is."""

    address: Address
    name: str
    rank: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """What a process says of itself; `token` tells one start from another."""

    rank: int
    size: int
    host: str
    pid: int
    gpu: str = ""
    """The GPU's own number; "" on a CPU."""
    source: str = ""
    """Its address on the way to the store."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.host}, pid {self.pid}"


def address_of(environ: Mapping[str, str]) -> Address:
    """Where the launcher says to meet, with Accelerate's default for the port."""
    agents = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return Address(
        host=environ["MASTER_ADDR"],
        port=int(environ.get("MASTER_PORT") or 29500),
        is_launchers=agents,
    )


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a group has to be formed; of even one process that has a `LOCAL_RANK`."""
    return world_size(environ) > 1 or local_rank(environ) >= 0


def form_group(
    environ: Mapping[str, str], *, backend: str, meeting_timeout: float, collective_timeout: float
) -> Group | None:
    """Form torch's default process group, unless there is none to form (None) or it exists.

    Call it on all processes of the job, before `Accelerator()` or DeepSpeed, which take the group
    as it is. `environ` must have passed `cifar.ranks.check_rendezvous`. `backend`: gloo, nccl or
    "cuda:nccl,cpu:gloo". The processes may start `meeting_timeout` seconds apart; a collective call
    fails after `collective_timeout` seconds.

    Raises:
        ConfigError: the processes do not fit together; all of them say so.
        UnmetError: this one has not met the others.
    """
    if dist.is_initialized() or not is_launched(environ):
        return None
    device = _device(backend, environ)
    if device is not None:
        torch.cuda.set_device(device)
    with _guarded(meeting_timeout, environ) as said:
        meeting = _Meeting(environ, device, meeting_timeout)
        said.text = meeting.unreachable()
        group, store, peers = meeting.hold()
        if "gloo" in backend:
            choose_interface(peers[group.rank].source, [peer.source for peer in peers])
        said.text = _unconnected(environ)
        dist.init_process_group(
            backend,
            store=PrefixStore(group.name, store),
            rank=group.rank,
            world_size=group.size,
            timeout=timedelta(seconds=collective_timeout),
            device_id=device,
        )
        dist.barrier(device_ids=None if device is None else [device.index])
    return group


def _device(backend: str, environ: Mapping[str, str]) -> torch.device | None:
    """The GPU of this process as Accelerate chooses it, None on a CPU."""
    if "nccl" not in backend:
        return None
    return torch.device("cuda", max(0, local_rank(environ)) % torch.cuda.device_count())


class _Meeting:
    """One process's part: rank 0 leads, the others follow."""

    def __init__(
        self, environ: Mapping[str, str], device: torch.device | None, timeout: float
    ) -> None:
        self._address = address_of(environ)
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        properties = None if device is None else torch.cuda.get_device_properties(device)
        self._me = Hello(
            rank=rank(environ),
            size=world_size(environ),
            host=socket.gethostname(),
            pid=os.getpid(),
            gpu="" if properties is None else str(properties.uuid),
            source=_source(self._address),
        )

    def hold(self) -> tuple[Group, TCPStore, list[Hello]]:
        """Meet the others; the group, its store and what everyone has said, by rank."""
        store = self._open()
        name, peers = self._lead(store) if self._me.rank == 0 else self._follow(store)
        me = self._me
        return Group(address=self._address, name=name, rank=me.rank, size=me.size), store, peers

    def _open(self) -> TCPStore:
        """The store, served by rank 0 unless the launcher has it."""
        serve = self._me.rank == 0 and not self._address.is_launchers
        try:
            return self._address.connect(self._timeout, serve=serve)
        except RuntimeError as error:
            if serve and "EADDRINUSE" in str(error):
                raise UnmetError(
                    f"MASTER_PORT: '{self._address.port}': in use on {self._me.host} by another "
                    "program, or by another process with RANK 0; give a free one"
                ) from None
            raise UnmetError(self.unreachable()) from None

    def unreachable(self) -> str:
        """What to say where nothing answers."""
        where, port = self._address.host, self._address.port
        return (
            f"MASTER_ADDR: {where!r}: rank {self._me.rank} on {self._me.host} has reached nothing "
            f"at port {port} (MASTER_PORT) within {self._timeout:g} s; give the address of rank "
            "0's machine, start that one too, and let the port through its firewall"
        )

    def _lead(self, store: TCPStore) -> tuple[str, list[Hello]]:
        """Greet all ranks; those of an earlier start may be greeted too, but do not answer."""
        name, met = secrets.token_hex(8), {0: self._me}
        try:
            while len(met) < self._me.size:
                for each in range(1, self._me.size):
                    self._greet(store, name, each, met)
                if len(met) < self._me.size:
                    self._check_time(lambda: _absent(met, self._me, self._timeout))
            peers = [met[each] for each in range(self._me.size)]
            _check_gpus(peers)
        except ConfigError as error:
            _refuse(store, met, self._me.size, str(error))
            raise
        store.set(f"go/{name}", json.dumps([asdict(peer) for peer in peers]))
        return name, peers

    def _greet(self, store: TCPStore, name: str, other: int, met: dict[int, Hello]) -> None:
        """Answer a rank's hello; it is met once it has seen that."""
        if not store.check([f"hello/{other}"]):
            return
        hello = Hello(**json.loads(store.get(f"hello/{other}")))
        if other in met:
            if hello != met[other]:
                raise ConfigError(
                    f"RANK: '{other}': given to two processes ({met[other].label}; {hello.label}); "
                    "number the processes from 0, or start by accelerate launch or torchrun"
                )
            return
        store.set(f"answer/{hello.token}", name)
        if store.check([f"here/{name}/{hello.token}"]):
            met[other] = hello
            if hello.size != self._me.size:
                raise ConfigError(
                    f"WORLD_SIZE: '{hello.size}': given to rank {other} ({hello.label}), but "
                    f"'{self._me.size}' to rank 0 ({self._me.label}); start all nodes with the "
                    "same numbers of nodes and of processes"
                )

    def _follow(self, store: TCPStore) -> tuple[str, list[Hello]]:
        """Say hello until rank 0 answers, then wait until all are there."""
        me = self._me
        try:
            store.set(f"hello/{me.rank}", json.dumps(asdict(me)))
            name = self._await(store, f"answer/{me.token}")
            store.set(f"here/{name}/{me.token}", "")
            peers = [Hello(**each) for each in json.loads(self._await(store, f"go/{name}"))]
        except RuntimeError:
            raise UnmetError(
                f"MASTER_ADDR: {self._address.host!r}: the store at port {self._address.port} has "
                "gone while the processes met; look at what rank 0 says"
            ) from None
        return name, peers

    def _await(self, store: TCPStore, key: str) -> str:
        """The value of a key once it is set; a refusal is raised."""
        refusal = f"refusal/{self._me.rank}/{self._me.token}"
        while True:
            if store.check([refusal]):
                raise ConfigError(store.get(refusal).decode())
            if store.check([key]):
                return store.get(key).decode()
            self._check_time(
                lambda: (
                    f"RANK: '{self._me.rank}': rank 0 has not come to {self._address.host}:"
                    f"{self._address.port} or not answered this process ({self._me.label}) within "
                    f"{self._timeout:g} s; start rank 0, and no two processes with one RANK"
                )
            )

    def _check_time(self, told: Callable[[], str]) -> None:
        if time.monotonic() >= self._deadline:
            raise UnmetError(told())
        time.sleep(POLL_SECONDS)


def _absent(met: Mapping[int, Hello], me: Hello, timeout: float) -> str:
    missing = [str(each) for each in range(me.size) if each not in met]
    which = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    return (
        f"WORLD_SIZE: '{me.size}': rank {which} has not come within {timeout:g} s; start as many "
        "processes on as many nodes as that, or give a longer --meeting-timeout"
    )


def _refuse(store: TCPStore, met: Mapping[int, Hello], size: int, text: str) -> None:
    """Let every process that has said hello know why there is no group."""
    waiting = [each for each in range(1, size) if store.check([f"hello/{each}"])]
    last = [Hello(**json.loads(store.get(f"hello/{each}"))) for each in waiting]
    for hello in (*met.values(), *last):
        store.set(f"refusal/{hello.rank}/{hello.token}", text)
    time.sleep(FAREWELL_SECONDS)


def _check_gpus(peers: list[Hello]) -> None:
    """Raise a ConfigError if two processes have one GPU, as with the same `LOCAL_RANK`."""
    owners: dict[str, Hello] = {}
    for peer in peers:
        other = owners.setdefault(peer.gpu, peer) if peer.gpu else peer
        if other is not peer:
            raise ConfigError(
                f"LOCAL_RANK: ranks {other.rank} and {peer.rank} on {peer.host} have the same GPU "
                f"({peer.gpu}); number the processes of a machine from 0, one for each GPU"
            )


def _source(address: Address) -> str:
    """This machine's address on the way to the store.

    Raises:
        UnmetError: the host's name means nothing here.
    """
    try:
        return source_towards(address.host, address.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no host's name"
        raise UnmetError(
            f"MASTER_ADDR: {address.host!r}: unknown here ({reason}); give the address of rank 0's "
            "machine"
        ) from None


def _unconnected(environ: Mapping[str, str]) -> str:
    return (
        f"WORLD_SIZE: '{environ.get('WORLD_SIZE', '1')}': the processes have met at "
        f"{environ['MASTER_ADDR']}, but cannot connect to one another; open the ports between "
        "their machines, or name the network with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


class _Said:
    """What to say if the time is up while this process sits in C."""

    text = ""


@contextmanager
def _guarded(timeout: float, environ: Mapping[str, str]) -> Iterator[_Said]:
    """While entered, a process that hangs is ended with a line, as Python could not do it."""
    said, done = _Said(), threading.Event()

    def watch() -> None:
        if not done.wait(timeout + GUARD_SECONDS):
            prefix = f"cifar: process {rank(environ)}" if rank(environ) else "cifar"
            line = f"{prefix}: {said.text}\n"
            os.write(sys.stderr.fileno(), line.encode())
            os._exit(UnmetError.exit_code)

    threading.Thread(target=watch, name="meeting-guard", daemon=True).start()
    try:
        yield said
    except RuntimeError as error:  # torch's, of a store, gloo or NCCL
        told = " ".join(str(error).split())
        raise UnmetError(f"{said.text} ({told[:200]})") from None
    finally:
        done.set()
