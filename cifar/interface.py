"""Which network interface leads to the other machines of a job. No torch in here.

gloo takes the one that the machine's own name resolves to, which on many systems is the loopback,
where no other machine can reach it.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Sequence

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(own: str, sources: Sequence[str]) -> None:
    """Tell gloo which interface to use, unless the user has or all processes are on one machine.

    `sources` are the addresses of the processes on their way to where they meet, `own` is that of
    this one; "" for one that is not known.
    """
    if VARIABLE in os.environ or len(set(sources)) < 2:
        return
    if _is_loopback(own):  # the store is on this machine: the way to another one tells
        others = [each for each in sources if each and not _is_loopback(each)]
        own = source_towards(others[0]) if others else ""
    if name := interface_of(own):
        os.environ[VARIABLE] = name


def source_towards(host: str, port: int = 9) -> str:
    """This machine's address on the way to a host; "" if there is no way.

    Raises:
        OSError: the host's name means nothing here.
    """
    for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with (
            contextlib.suppress(OSError),
            socket.socket(family, kind, protocol) as probe,
        ):
            probe.connect(where)  # of datagrams: chooses a route, sends nothing
            return str(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """The interface of this machine that has an address; "" if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return ""


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
