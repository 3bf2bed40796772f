"""One measurement on a device at a time, whichever processes of this machine want to.

The launcher of what is measured inherits the lock, so that it lasts as long as that, even where the
process that took it was killed.
"""

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator

import psutil

from cifar.errors import UserError

PREFIX = "\0cifar-resnet-bench/"
"""An abstract socket's name (unix(7)): it is no file, all users of the machine see it, and the
kernel takes it back from a process that dies, in whatever way."""
_HELD: set[int] = set()
"""The descriptors of this process's locks."""
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
            number = stack.enter_context(_held(device)).fileno()
            _HELD.add(number)
            stack.callback(_HELD.discard, number)
        yield


def descriptors() -> tuple[int, ...]:
    """What a process has to inherit to hold this one's devices as well."""
    return tuple(sorted(_HELD))


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
            f"devices: {device!r}: {_holder(device)}, or give other --devices"
        ) from None
    return sock


def _holder(device: str) -> str:
    """Who measures on it, as far as that is told, and what to do about it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect(PREFIX + device)
        answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process = _CREDENTIALS.unpack(answer)[0]
        if not process:  # of a container with other process ids
            return "another bench measures on it; wait for it"
        if psutil.pid_exists(process):
            return f"another bench (process {process}) measures on it; wait for it"
        return (
            f"what a bench that was killed (process {process}) has started still measures on it; "
            "--resume its run, which ends that"
        )
    return "another bench measures on it; wait for it"
