"""The few collective operations the trainer needs; with one process they do nothing."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from cifar.config import RunConfig
from cifar.errors import PEER_GONE, DataError, PeerError, Stopped
from cifar.rendezvous import form_group
from cifar.watchdog import BACKSTOP, Watchdog

T = TypeVar("T")

_WATCHDOGS: list[Watchdog] = []
"""That of the default group, if it has one: like the group, one in a process."""


def join_group(backend: str, run: RunConfig, told: Callable[[], Mapping[str, str]]) -> None:
    """Meet the other processes of the job, if there are any and this has not happened yet.

    What `told` returns must be alike on all of them, see `cifar.agreement`.

    Raises as `cifar.rendezvous.form_group` does, which see.
    """
    group = form_group(
        os.environ,
        backend=backend,
        told=told,
        meeting_timeout=run.meeting_timeout,
        collective_timeout=BACKSTOP * run.collective_timeout,
    )
    if group is not None and group.size > 1:
        runs_ahead = "nccl" in backend
        _WATCHDOGS.append(Watchdog(group, run.collective_timeout, runs_ahead=runs_ahead))
        _WATCHDOGS[-1].start()


def limit_collectives(group: dist.ProcessGroup, device: torch.device) -> None:
    """Let a group that a library has made wait as long as the default one, not torch's 10 min."""
    default = distributed_c10d._get_default_group()
    seconds = default._get_backend(device).options._timeout
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(seconds, group)


def is_distributed() -> bool:
    """Whether a process group of more than one process exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over all processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


@contextlib.contextmanager
def explained_peers() -> Iterator[None]:
    """While entered, the end of another process is an error that says so, instead of torch's.

    Raises:
        PeerError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        if not PEER_GONE.search(str(error)):
            raise
        told = " ".join(str(error).split())
        raise PeerError(
            "processes: another one has ended or cannot be reached any more, its own words or the "
            f"launcher's say why ({told.partition('. This')[0][-120:]})"
        ) from None


def leave() -> None:
    """End this process's part in the group; without it NCCL warns of leaked resources.

    Call it when nothing needs the models that were trained in it: they hold the group, whose
    threads abort a process that ends before them (https://github.com/pytorch/pytorch/issues/190489).
    """
    while _WATCHDOGS:
        _WATCHDOGS.pop().stop()
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def then_leave(work: Callable[[], T]) -> T:
    """What `work` returns, after which this process leaves the group; also if a signal stopped it.

    The frames of a stop hold the models, and so the group: it forgets where it was raised. What
    fails does not leave, for the others may not come; see `cifar.process.run_to_end`.
    """
    try:
        result = work()
    except Stopped as error:
        error.__traceback__ = None
        leave()
        raise
    leave()
    return result


def gather(values: Sequence[float], device: torch.device) -> tuple[tuple[float, ...], ...]:
    """Every process's values by rank, as many from each; a collective call."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    if not is_distributed():
        return (tuple(mine.tolist()),)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return tuple(tuple(each.tolist()) for each in everyone)


def least(count: int, device: torch.device) -> int:
    """The smallest of all processes' counts; a collective call."""
    return -int(reduce_max(torch.tensor(-count, device=device)))


def gather_text(text: str, device: torch.device) -> tuple[str, ...]:
    """Every process's text by rank; without NUL characters; a collective call."""
    mine = text.encode()
    longest = -least(-len(mine), device)
    everyone = gather(list(mine.ljust(longest + 1, b"\0")), device)
    return tuple(bytes(map(int, each)).rstrip(b"\0").decode() for each in everyone)


def check_same_images(fingerprint: str, device: torch.device) -> None:
    """Raise a DataError on all processes unless all have the same images; a collective call."""
    everyone = gather_text(fingerprint, device)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise DataError(
                f"data: fingerprint {theirs}: of the images of rank {rank}, but {everyone[0]} of "
                "those of rank 0; give all processes the same images"
            )
