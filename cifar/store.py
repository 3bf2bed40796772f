"""The store at which the processes of a job meet: the launcher's, or one that rank 0 serves.

Plain sockets look first whether one may be there: while torch's own client tries, Ctrl-C waits.
"""

import contextlib
import errno
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cifar.errors import UnmetError
from cifar.interface import source_towards

POLL_SECONDS = 0.05
"""Between two looks at what other processes have done."""
SILENCE_SECONDS = 0.2
"""How long what listens is given to hang up or to speak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the processes meet; `is_launchers` if the launcher and not rank 0 has the store."""

    host: str
    port: int
    is_launchers: bool

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Address":
        """Where the launcher says to meet, with Accelerate's default for the port."""
        agents = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        port = int(environ.get("MASTER_PORT") or 29500)
        return cls(host=environ["MASTER_ADDR"], port=port, is_launchers=agents)

    def source(self) -> str:
        """This machine's own address on the way to the store.

        Raises:
            UnmetError: the host's name means nothing here.
        """
        try:
            return source_towards(self.host, self.port)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "no host's name"
            raise UnmetError(
                f"MASTER_ADDR: {self.host!r}: unknown here ({reason}); give the address of rank "
                "0's machine"
            ) from None

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


class Entrance:
    """One process's way to the store, which has to open within `timeout` seconds."""

    def __init__(self, address: Address, rank: int, timeout: float) -> None:
        self._address, self._rank, self._timeout = address, rank, timeout
        self._deadline = time.monotonic() + timeout
        self._serves = rank == 0 and not address.is_launchers
        self._is_listened_to = False

    def open(self) -> TCPStore:
        """The store, served by rank 0 unless the launcher has it.

        Raises:
            UnmetError: it cannot be reached, or the port is taken.
        """
        taken = UnmetError(
            f"MASTER_PORT: '{self._address.port}': in use on {socket.gethostname()} by another "
            "program, or by another process with RANK 0; give a free one"
        )
        if not self._serves:
            self._knock()
        elif _is_taken(self._address.port):
            raise taken
        try:
            return self._address.connect(self._timeout, serve=self._serves)
        except RuntimeError as error:
            if self._serves and "EADDRINUSE" in str(error):
                raise taken from None
            raise UnmetError(self.unreachable()) from None

    def _knock(self) -> None:
        """Wait until what listens there may be a store.

        What hangs up or speaks first is none; but what stands in for rank 0 until that has come may
        do so, as the proxies of clusters do.
        """
        where = self._address.host, self._address.port
        while True:
            with contextlib.suppress(OSError):
                left = max(POLL_SECONDS, self._deadline - time.monotonic())
                with socket.create_connection(where, timeout=left) as visitor:
                    self._is_listened_to = True
                    if _is_silent(visitor):
                        return
            if time.monotonic() >= self._deadline:
                raise UnmetError(self.unreachable())
            time.sleep(POLL_SECONDS)

    def unreachable(self) -> str:
        """What to say where no store answers."""
        where, port, host = self._address.host, self._address.port, socket.gethostname()
        if self._serves:
            return (
                f"MASTER_ADDR: {where!r}: rank 0 on {host} serves port {port} (MASTER_PORT), but "
                f"has not reached itself there within {self._timeout:g} s; give this machine's own "
                "address, as the others reach it"
            )
        found, remedy = "nothing", ", start that one too"
        if self._is_listened_to:
            found, remedy = "another program than rank 0", " and a free port, start that one too"
        return (
            f"MASTER_ADDR: {where!r}: rank {self._rank} on {host} has reached {found} at port "
            f"{port} (MASTER_PORT) within {self._timeout:g} s; give the address of rank 0's "
            f"machine{remedy}, and let the port through its firewall"
        )


def _is_silent(visitor: socket.socket) -> bool:
    """Whether the other side waits to be spoken to, as a store does."""
    visitor.settimeout(SILENCE_SECONDS)
    try:
        visitor.recv(1)
    except TimeoutError:
        return True
    except ConnectionError:
        pass
    return False


def _is_taken(port: int) -> bool:
    """Whether a program of this machine listens at a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one in TIME_WAIT is free
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
