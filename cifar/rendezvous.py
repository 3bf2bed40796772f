"""How the processes of a job meet and form their group, which Accelerate and DeepSpeed then use.

What keeps them apart is one line that names the variable, its value and the remedy, and comes in
time whatever hangs.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from cifar.errors import UnmetError
from cifar.interface import choose_interface
from cifar.meeting import Group, Meeting
from cifar.ranks import local_rank, rank, world_size

GUARD_SECONDS = 5.0
"""Beyond the time for meeting, after which a process that sits in C is ended all the same."""
CONNECT_SECONDS = 0.5
"""For every process of the group on top of that, to connect them: NCCL makes its rings at once."""


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a group has to be formed; of even one process that has a `LOCAL_RANK`."""
    return world_size(environ) > 1 or local_rank(environ) >= 0


def form_group(
    environ: Mapping[str, str],
    *,
    backend: str,
    told: Callable[[], Mapping[str, str]],
    meeting_timeout: float,
    collective_timeout: float,
) -> Group | None:
    """Form torch's default process group, unless there is none to form (None) or it exists.

    Call it on all processes of the job, before `Accelerator()` or DeepSpeed, which take the group
    as it is. `environ` must have passed `cifar.ranks.check_rendezvous`. `backend`: gloo, nccl or
    "cuda:nccl,cpu:gloo". What `told` returns must be alike on all, see `cifar.agreement`. The
    processes may start `meeting_timeout` seconds apart; a collective call fails after
    `collective_timeout` seconds.

    Raises:
        ConfigError: the processes do not fit together; all of them say so.
        UnmetError: this one has not met the others.
    """
    if dist.is_initialized() or not is_launched(environ):
        return None
    device = _device(backend, environ)
    if device is not None:
        torch.cuda.set_device(device)
    gpu = "" if device is None else str(torch.cuda.get_device_properties(device).uuid)
    given = told()
    with _Guard(meeting_timeout, environ) as guard:
        meeting = Meeting(environ, gpu, given, meeting_timeout)
        guard.expect(meeting.unmet)
        with _silenced(environ):
            group, store, peers = meeting.hold()
        if "gloo" in backend:
            choose_interface(peers[group.rank].source, [peer.source for peer in peers])
        guard.expect(lambda: _unconnected(environ), CONNECT_SECONDS * group.size)
        store.set_timeout(timedelta(seconds=collective_timeout))  # was the meeting's
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
    """The GPU of this process as Accelerate chooses it, which must exist; None on a CPU."""
    if "nccl" not in backend:
        return None
    return torch.device("cuda", max(0, local_rank(environ)))


def _unresolved(environ: Mapping[str, str]) -> str:
    return (
        f"MASTER_ADDR: {environ['MASTER_ADDR']!r}: this machine has not found out in time which "
        "address that is; give rank 0's as a number, or mend the name service"
    )


def _unconnected(environ: Mapping[str, str]) -> str:
    return (
        f"WORLD_SIZE: '{world_size(environ)}': the processes have met at "
        f"{environ['MASTER_ADDR']}, but cannot connect to one another; open the ports between "
        "their machines, or name the network with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def _stderr() -> int:
    """A descriptor of its own for stderr, or for nothing where that is closed."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


@contextlib.contextmanager
def _silenced(environ: Mapping[str, str]) -> Iterator[None]:
    """While entered, nothing is written to stderr, unless the user wants to see torch's log.

    torch's store tells of every try to reach it with the frames of its stack, more than a hundred
    lines before the one that says what to do.
    """
    if "TORCH_CPP_LOG_LEVEL" in environ:
        yield
        return
    sys.stderr.flush()
    kept = _stderr()
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class _Guard:
    """While entered, a process that hangs is ended with a line, as Python could not do it in C."""

    def __init__(self, timeout: float, environ: Mapping[str, str]) -> None:
        self._timeout = timeout + GUARD_SECONDS
        self._who = f"cifar: process {rank(environ)}" if rank(environ) else "cifar"
        self._tell: Callable[[], str] = lambda: _unresolved(environ)
        self._deadline = time.monotonic() + self._timeout
        self._stderr = _stderr()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meeting-guard", daemon=True)

    def expect(self, tell: Callable[[], str], more: float = 0.0) -> None:
        """Tell that if what comes now fails, or takes so many seconds more than a meeting may."""
        self._tell, self._deadline = tell, time.monotonic() + self._timeout + more

    def __enter__(self) -> "_Guard":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        os.close(self._stderr)
        if isinstance(error, RuntimeError):  # torch's, of a store, gloo or NCCL
            told = " ".join(str(error).split())
            raise UnmetError(f"{self._tell()} ({told[:200]})") from None

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            if time.monotonic() >= self._deadline:
                os.write(self._stderr, f"{self._who}: {self._tell()}\n".encode())
                os._exit(UnmetError.exit_code)
