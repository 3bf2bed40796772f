"""One measurement on a device at a time, whichever processes of this machine want to."""

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator

from cifar.errors import UserError

PREFIX = "\0cifar-resnet-bench/"
"""An abstract socket's name (unix(7)): it is no file, all users of the machine see it, and the
kernel takes it back from a process that dies, in whatever way."""
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group: `struct ucred` of unix(7)."""


@contextlib.contextmanager
def held(devices: Iterable[str]) -> Iterator[None]:
    """While entered, no other process of this machine can enter it for any of these devices.

    Containers with a network of their own are machines of their own here. Where the system is not
    Linux nobody is kept out.

    Raises:
        UserError: another process measures on one of them.
    """
    with contextlib.ExitStack() as stack:
        for device in sorted(set(devices)) if sys.platform == "linux" else ():
            stack.enter_context(_held(device))
        yield


def _held(device: str) -> socket.socket:
    """A socket whose name says that this process measures on a device."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(PREFIX + device)
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(
            f"devices: {device!r}: another bench{_holder(device)} measures on it; wait for it, or "
            "give other --devices"
        ) from None
    return sock


def _holder(device: str) -> str:
    """Its process, ` (process 4711)`; empty if that is not told."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect(PREFIX + device)
        answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return f" (process {_CREDENTIALS.unpack(answer)[0]})"
    return ""
