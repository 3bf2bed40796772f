"""What processes under DistributedDataParallel average, and when: gradients, or weights."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # `torch.distributed.GradBucket`, with types
from torch.futures import Future

from cifar.config import Parallel, RunConfig, option_name, require
from cifar.distributed import is_distributed, reduce_sum
from cifar.optim import WeightAverage

Held = list[tuple[Tensor, Future[Tensor]]]
"""Buckets of this backward pass, and what promises each of them averaged."""


def bf16_gradients(_state: Held, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket as soon as it is full, rounded to bf16; torch's hook.

    Under a name of its own, for under torch's DDP refuses it where there is no NCCL.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # imports all others

    return default_hooks.bf16_compress_hook(None, bucket)  # type: ignore[arg-type]


def after_backward(held: Held, bucket: GradBucket) -> Future[Tensor]:
    """Average all buckets once the last gradient is there: nothing is hidden by the computation."""
    return _hold(held, bucket, _average)


def bf16_after_backward(held: Held, bucket: GradBucket) -> Future[Tensor]:
    """The same, rounded to bf16."""
    return _hold(held, bucket, _average_in_bf16)


HOOKS: dict[str, Callable[[Held, GradBucket], Future[Tensor]]] = {
    hook.__name__: hook for hook in (bf16_gradients, after_backward, bf16_after_backward)
}
"""By `Parallel.gradient_hook`; see `torch.distributed.algorithms.ddp_comm_hooks`."""


def register_hook(wrapped: Any, parallel: Parallel) -> None:
    """Have a DistributedDataParallel average gradients as is asked; its own way needs no hook."""
    if hook := HOOKS.get(parallel.gradient_hook):
        wrapped.register_comm_hook([], hook)


def _hold(held: Held, bucket: GradBucket, average: Callable[[Tensor], Tensor]) -> Future[Tensor]:
    """Buckets come in order, and the last one when all gradients are there."""
    buffer = bucket.buffer()
    promise: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
    held.append((buffer, promise))
    if bucket.is_last():
        for each, promised in held:
            promised.set_result(average(each))
        held.clear()
    return promise


def _average(buffer: Tensor) -> Tensor:
    return reduce_sum(buffer.div_(dist.get_world_size()))


def _average_in_bf16(buffer: Tensor) -> Tensor:
    return buffer.copy_(_average(buffer.bfloat16()))


@torch.no_grad()
def average_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the mean of all processes' values, in place; one exchange per dtype.

    Values that are equal everywhere stay as they are, to the bit.
    """
    if not is_distributed():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = reduce_sum(torch.cat([each.reshape(-1) for each in group]))
        flat /= dist.get_world_size()
        means = torch.split(flat, [each.numel() for each in group])
        for each, mean in zip(group, means, strict=True):
            each.copy_(mean.view(each.shape))


class LocalSteps:
    """Rounds of steps that every process takes by itself, at whose end all state is averaged.

    A round ends after every `count` steps of the run, and with an epoch and the run themselves, so
    that what is evaluated is one network. Momenta are averaged with the weights that they belong
    to, as in Yu et al. 2019 (https://arxiv.org/abs/1905.03817), and so are BatchNorm's statistics:
    all processes are then equal, and one of them can save the state of all. (Post-local SGD, Lin et
    al. 2018, https://arxiv.org/abs/1808.07217, torch's PostLocalSGDOptimizer and Accelerate's
    LocalSGD average the weights alone and leave every process its own momenta.)
    """

    def __init__(self, count: int, steps_per_epoch: int, total_steps: int) -> None:
        self._count = count
        self._steps_per_epoch = steps_per_epoch
        self._total_steps = total_steps
        self.ended = 0
        """Rounds so far in this process, all but those of single steps."""

    def end_at(self, step: int) -> bool:
        """Whether all processes are equal once so many steps are done."""
        return (
            step % self._count == 0
            or step % self._steps_per_epoch == 0
            or step == self._total_steps
        )

    def end_if_due(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        weights: Callable[[], dict[str, Tensor]],
        average: WeightAverage | None,
    ) -> None:
        """Average the state of all processes if a round of several steps ends here.

        That is weights and buffers, the optimiser's state and the weights' moving `average`, but
        not what is counted. A collective call.
        """
        if self._count == 1 or not self.end_at(step):
            return
        states = itertools.chain(*(each.values() for each in optimizer.state.values()))
        averages = average.weights.values() if average else ()
        found = [*weights().values(), *(each for each in states if isinstance(each, Tensor))]
        self.ended += 1
        average_tensors(
            each for each in [*found, *averages] if each.is_floating_point() and each.ndim > 0
        )

    def whole(self, steps: int) -> int:
        """As many steps, or a few more, as are whole rounds."""
        return -(-steps // self._count) * self._count

    def check_intervals(self, run: RunConfig) -> None:
        """Raise a ConfigError if the run is to save, or to agree on anything, within rounds."""
        for name in ("save_every", "check_every"):
            value = getattr(run, name)
            remedy = (
                f"give a multiple of --local-steps {self._count}, after which weights are equal"
            )
            whole = value is None or value % self._count == 0
            require(whole, option_name(name), value, remedy)
