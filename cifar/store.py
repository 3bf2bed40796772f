"""The store at which the processes of a job meet: the launcher's, or one that rank 0 serves."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cifar.errors import UnmetError
from cifar.interface import source_towards
from cifar.process import IN_C

LOOK_SECONDS = 1.0
"""How long a program that may listen at the address is given to take a connection."""


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
        self._opened: queue.SimpleQueue[TCPStore | Exception] = queue.SimpleQueue()

    def open(self) -> TCPStore:
        """The store, served by rank 0 unless the launcher has it.

        torch's client is left to a thread of its own, since in it this one would notice neither
        Ctrl-C nor the end of its time.

        Raises:
            UnmetError: it cannot be reached, or the port is taken.
        """
        threading.Thread(target=self._connect, name=IN_C, daemon=True).start()
        try:
            found = self._opened.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise UnmetError(self.unreachable()) from None
        if isinstance(found, TCPStore):
            return found
        if not isinstance(found, RuntimeError):  # which is torch's
            raise found
        if self._serves and "EADDRINUSE" in str(found):
            raise UnmetError(
                f"MASTER_PORT: '{self._address.port}': in use on {socket.gethostname()} by another "
                "program, or by another process with RANK 0; give a free one"
            )
        raise UnmetError(self.unreachable())

    def _connect(self) -> None:
        try:
            self._opened.put(self._address.connect(self._timeout, serve=self._serves))
        except Exception as error:  # `open` raises it
            self._opened.put(error)

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
        if _is_listened_to(self._address):
            found, remedy = (
                "something that does not answer as rank 0",
                " and a free port, start that one too",
            )
        return (
            f"MASTER_ADDR: {where!r}: rank {self._rank} on {host} has reached {found} at port "
            f"{port} (MASTER_PORT) within {self._timeout:g} s; give the address of rank 0's "
            f"machine{remedy}, and let the port through its firewall"
        )


def _is_listened_to(address: Address) -> bool:
    """Whether any program takes connections there."""
    with contextlib.suppress(OSError):
        socket.create_connection((address.host, address.port), timeout=LOOK_SECONDS).close()
        return True
    return False
