"""How the processes of a job find each other at the store that their launcher names.

Rank 0 greets the others, looks at what each was told, and gives the group a name that no earlier
start had: after an elastic restart the launcher's store still holds the addresses of the processes
before, at which the new ones would wait (`TORCHELASTIC_RESTART_COUNT` does not tell starts apart:
every node counts its own failures).
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cifar.agreement import first_difference
from cifar.errors import ConfigError, UnmetError
from cifar.ranks import rank, world_size
from cifar.store import Address, Entrance

POLL_SECONDS = 0.05
"""Between two looks at what other processes have written."""
FAREWELL_SECONDS = 1.0
"""How long rank 0 keeps its store after a refusal, for the others to read it."""
_SAME_SIZES = "start all nodes with the same numbers of nodes and of processes"
_TWICE = "twice"
"""Where a process whose rank another one has says so."""
VERDICT_SECONDS = 2.0
"""How much longer than its own time a process waits whom rank 0 has answered: rank 0, which ends in
the time of the first that came, knows better why there is no group."""


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
    told: Mapping[str, str] = field(default_factory=dict)
    """What it was told that must be alike everywhere, see `cifar.agreement`; rank 0 compares."""

    @classmethod
    def read(cls, text: str | bytes) -> "Hello":
        """That of a process which may have other sources, and so other fields."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.host}, pid {self.pid}"


class Meeting:
    """One process's part in a meeting: rank 0 leads, the others follow.

    `environ` must have passed `cifar.ranks.check_rendezvous`; `gpu` is the number of the process's
    own one, "" on a CPU; `told` is what must be alike, see `cifar.agreement`.
    """

    def __init__(
        self, environ: Mapping[str, str], gpu: str, told: Mapping[str, str], timeout: float
    ) -> None:
        self._address = Address.read(environ)
        self._entrance = Entrance(self._address, rank(environ), timeout)
        self._timeout = timeout
        self._leaders_size = ""
        self._met: dict[int, Hello] = {}
        self._is_in = False
        self._deadline = time.monotonic() + timeout
        self._me = Hello(
            rank=rank(environ),
            size=world_size(environ),
            host=socket.gethostname(),
            pid=os.getpid(),
            gpu=gpu,
            source=self._address.source(),
            told=told,
        )

    def hold(self) -> tuple[Group, TCPStore, list[Hello]]:
        """Meet the others; the group, its store and what everyone has said, by rank.

        Raises:
            ConfigError: the processes do not fit together; all of them say so.
            UnmetError: this one has not met the others.
        """
        store = self._entrance.open()
        self._is_in = True
        name, peers = self._lead(store) if self._me.rank == 0 else self._follow(store)
        me = self._me
        return Group(address=self._address, name=name, rank=me.rank, size=me.size), store, peers

    def unmet(self) -> str:
        """What to say where it takes too long."""
        me = self._me
        if not self._is_in:
            return self._entrance.unreachable()
        if me.rank == 0:
            return _absent(self._met, me, self._timeout)
        return self._other_size() or (
            f"RANK: '{me.rank}': rank 0 has not come to {self._address.host}:{self._address.port} "
            f"or not answered this process ({me.label}) within {self._timeout:g} s; start rank 0, "
            "and no two processes with one RANK"
        )

    def _lead(self, store: TCPStore) -> tuple[str, list[Hello]]:
        """Greet all ranks; those of an earlier start may be greeted too, but do not answer."""
        store.set("size", str(self._me.size))
        name, met = secrets.token_hex(8), self._met
        met[0] = self._me
        try:
            while True:
                for each in range(1, self._me.size):
                    self._check_time()
                    self._greet(store, name, each)
                if store.check([_TWICE]):
                    raise ConfigError(store.get(_TWICE).decode())
                if len(met) == self._me.size:
                    break
                time.sleep(POLL_SECONDS)
            peers = [met[each] for each in range(self._me.size)]
            check_gpus(peers)
        except ConfigError as error:
            _refuse(store, met, self._me.size, str(error))
            raise
        brief = [asdict(replace(peer, told={})) for peer in peers]
        store.set(f"go/{name}", json.dumps(brief))
        return name, peers

    def _greet(self, store: TCPStore, name: str, other: int) -> None:
        """Answer a rank's hello; it is met once it has seen that."""
        if not store.check([f"hello/{other}"]):
            return
        hello = Hello.read(store.get(f"hello/{other}"))
        if other in self._met:
            if hello != self._met[other]:
                raise ConfigError(_given_twice(self._met[other], hello))
            return
        store.set(f"answer/{hello.token}", name)
        if store.check([here := f"here/{name}/{hello.token}"]):
            self._met[other] = hello
            left = float(store.get(here))
            self._deadline = min(self._deadline, time.monotonic() + left)
            check_alike(self._me, hello)

    def _follow(self, store: TCPStore) -> tuple[str, list[Hello]]:
        """Say hello until rank 0 answers, then wait until all are there."""
        me = self._me
        try:
            self._say_hello(store)
            name = self._await(store, f"answer/{me.token}")
            left = self._deadline - time.monotonic()
            store.set(f"here/{name}/{me.token}", str(left))
            self._deadline += VERDICT_SECONDS
            peers = [Hello(**each) for each in json.loads(self._await(store, f"go/{name}"))]
        except RuntimeError:
            gone = (
                f"MASTER_ADDR: {self._address.host!r}: the store at port {self._address.port} has "
                "gone while the processes met; look at what rank 0 says, and start no two "
                "processes with one RANK"
            )
            raise UnmetError(self._other_size() or gone) from None
        return name, peers

    def _say_hello(self, store: TCPStore) -> None:
        """Leave a hello for rank 0; in its own store, which is as new as it is, only one per rank.

        A launcher's still holds those of an earlier start.
        """
        me = self._me
        key, hello = f"hello/{me.rank}", json.dumps(asdict(me))
        if self._address.is_launchers:
            store.set(key, hello)
            return
        first = store.compare_set(key, "", hello).decode()
        if first != hello:
            told = _given_twice(Hello.read(first), me)
            store.set(_TWICE, told)
            raise ConfigError(told)

    def _other_size(self) -> str:
        """What to say where rank 0 counts other processes, "" if it does not or has not come.

        It looks only for those that it counts; a launcher, that may have left an earlier start's
        number in its store, counts by itself.
        """
        me, size = self._me, self._leaders_size
        if self._address.is_launchers or size in ("", str(me.size)):
            return ""
        return (
            f"WORLD_SIZE: '{me.size}': given to rank {me.rank} ({me.label}), but '{size}' to rank "
            f"0; {_SAME_SIZES}"
        )

    def _await(self, store: TCPStore, key: str) -> str:
        """The value of a key once it is set; a refusal is raised."""
        refusal = f"refusal/{self._me.rank}/{self._me.token}"
        while True:
            if store.check([refusal]):
                raise ConfigError(store.get(refusal).decode())
            if store.check([key]):
                return store.get(key).decode()
            if not self._leaders_size and store.check(["size"]):
                self._leaders_size = store.get("size").decode()
            self._check_time()
            time.sleep(POLL_SECONDS)

    def _check_time(self) -> None:
        if time.monotonic() >= self._deadline:
            raise UnmetError(self.unmet())


def _given_twice(first: Hello, second: Hello) -> str:
    return (
        f"RANK: '{first.rank}': given to two processes ({first.label}; {second.label}); number the "
        "processes from 0, or start by accelerate launch or torchrun"
    )


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
    last = [Hello.read(store.get(f"hello/{each}")) for each in waiting]
    for hello in (*met.values(), *last):
        store.set(f"refusal/{hello.rank}/{hello.token}", text)
    time.sleep(FAREWELL_SECONDS)


def check_alike(first: Hello, other: Hello) -> None:
    """Raise a ConfigError if a process was not told what rank 0 was."""
    sizes = {"WORLD_SIZE": str(first.size)}, {"WORLD_SIZE": str(other.size)}
    remedy = _SAME_SIZES
    difference = first_difference(*sizes)
    if difference is None:
        difference = first_difference(first.told, other.told)
        remedy = "start all processes with the same options and sources"
    if difference is not None:
        name, mine, theirs = difference
        raise ConfigError(
            f"{name}: {theirs!r}: given to rank {other.rank} ({other.label}), but {mine!r} to rank "
            f"{first.rank} ({first.label}); {remedy}"
        )


def check_gpus(peers: list[Hello]) -> None:
    """Raise a ConfigError if two processes have one GPU, as with the same `LOCAL_RANK`."""
    owners: dict[str, Hello] = {}
    for peer in peers:
        other = owners.setdefault(peer.gpu, peer) if peer.gpu else peer
        if other is not peer:
            raise ConfigError(
                f"LOCAL_RANK: ranks {other.rank} and {peer.rank} on {peer.host} have the same GPU "
                f"({peer.gpu}); number the processes of a machine from 0, one for each GPU"
            )
