"""One measurement on a device at a time, whichever processes of this machine want to.

The launcher of what is measured inherits the lock, so that it lasts as long as that, even where the
process that took it was killed.
"""

import contextlib
import errno
import socket
import struct
import sys
import time
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
DYING_SECONDS = 0.3
"""How long a process may seem alive that was killed just now."""
ENDING_SECONDS = 3.0
"""How long what a bench that was killed has left is given to end."""
POLL_SECONDS = 0.1


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
    """A socket whose name says that this process measures on a device.

    What a bench that was killed has left there may be about to end: that is waited for.
    """
    since = time.monotonic()
    while True:
        if sock := _bound(device):
            return sock
        holder = _holder(device)
        is_measuring = holder is None or _is_alive(holder)
        if time.monotonic() - since >= (DYING_SECONDS if is_measuring else ENDING_SECONDS):
            told = _told(holder)
            raise UserError(f"devices: {device!r}: {told}, or give other --devices")
        time.sleep(POLL_SECONDS)


def _bound(device: str) -> socket.socket | None:
    """The socket, None if another process has it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(PREFIX + device)
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return sock


def _holder(device: str) -> int | None:
    """The process that has taken it, which may have died since; None if that is not told."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect(PREFIX + device)
        answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(answer)[0]) or None  # 0: of another container
    return None


def _is_alive(process: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def _told(holder: int | None) -> str:
    """Who measures there, and what to do about it."""
    if holder is None:
        return "another bench measures on it; wait for it"
    if _is_alive(holder):
        return f"another bench (process {holder}) measures on it; wait for it"
    return (
        f"what a bench that was killed (process {holder}) has started still measures on it; "
        "--resume its run, which ends that"
    )
