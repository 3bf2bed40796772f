"""FSDP2: every process holds a share of the rows of every weight, gradient and optimiser state.

torch's own `fully_shard`, also on CPUs, for which Accelerate's FSDP quietly is plain data
parallelism; and like DDP with fp32 weights under autocast, so that both compute the same
(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from cifar.accelerator import autocast_module
from cifar.checkpoint import Tensors
from cifar.config import TrainConfig
from cifar.distributed import reduce_max
from cifar.engine import SharingEngine, global_norm
from cifar.optim import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

_EPSILON = 1e-6
"""As in torch's `clip_grad_norm_`."""


class FullyShardedEngine(SharingEngine):
    """A network in FSDP2.

    Stages of the network (its children that are sequences) are gathered one by one, what else it
    has together. The optimiser works on this process's rows as plain tensors: what is elementwise
    needs no more, and operations on DTensors cost more than those of a small network themselves.
    """

    def __init__(self, accelerator: "Accelerator", module: nn.Module, config: TrainConfig) -> None:
        super().__init__(accelerator, module, config)
        mesh = init_device_mesh(accelerator.device.type, (dist.get_world_size(),))
        self._mesh, self.rows = mesh, self
        for child in module.children():
            if isinstance(child, nn.Sequential) and any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(module, mesh=mesh)
        autocast_module(accelerator, module, self._precision)
        self._sharded: dict[str, DTensor] = dict(module.named_parameters())  # type: ignore[arg-type]
        self._rows = {name: _rows_of(each) for name, each in self._sharded.items()}
        self._names = {id(rows): name for name, rows in self._rows.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This process's rows of every parameter."""
        yield from self._rows.items()

    def wrap(self) -> Any:
        """The network itself, whose hooks gather and share out."""
        return self.module

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Without exchange every process keeps the gradients of whole weights."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def backward(self, loss: Tensor) -> None:
        """After the last micro-batch every process has its rows of the mean gradient."""
        loss.backward()  # type: ignore[no-untyped-call]
        for name, sharded in self._sharded.items():
            if isinstance(sharded.grad, DTensor):
                self._rows[name].grad = sharded.grad.to_local()
                sharded.grad = None

    def after_unscaling(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
    ) -> None:
        """A step is skipped by all where any process's rows have overflowed."""
        for found in scaler._found_inf_per_device(optimizer).values():
            reduce_max(found)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Over all rows of all parameters; a collective call."""
        return global_norm(gradients)

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Shorten the rows by the length of the whole gradient; a collective call."""
        gradients = [rows.grad for rows in self._rows.values() if rows.grad is not None]
        factor = (limit / (self.norm(gradients) + _EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)

    def live(self) -> Tensors:
        """This process's rows of the weights; buffers are every process's own."""
        state: Tensors = dict(self.module.state_dict())
        return state | {name: rows.detach() for name, rows in self._rows.items()}

    @torch.no_grad()
    def gather(self, tensors: Tensors) -> Tensors:
        """All rows of those that are parameters' names, in the network's order on every process."""
        names = [name for name in self.shapes if name in tensors]
        return tensors | {name: self._whole(name, tensors[name]) for name in names}

    def _whole(self, name: str, rows: Tensor) -> Tensor:
        shape = self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        placed = DTensor.from_local(
            rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        return placed.full_tensor()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's rows; none where there are fewer rows than processes."""
        if name not in self.shapes:
            return whole
        parts = whole.chunk(dist.get_world_size(), 0)
        rank = dist.get_rank()
        return parts[rank] if rank < len(parts) else whole[:0]

    def whole(self, weight: Tensor, rows: Tensor) -> Tensor:
        """All rows of a tensor of which this process has those of an optimiser's `weight`."""
        return self._whole(self._names[id(weight)], rows)

    def own(self, weight: Tensor, whole: Tensor) -> Tensor:
        """The rows of a whole tensor that are those of an optimiser's `weight`."""
        return self.part(self._names[id(weight)], whole)

    @torch.no_grad()
    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> Tensors:
        """All rows of what is kept per weight; counters as they are, for they are equal.

        In an order that is every process's: a state that was read from a file has any.
        """
        weights = _weights_of(optimizer)
        found: Tensors = {}
        for key, value in sorted(optimizer_tensors(optimizer).items()):
            weight = weights[int(key.partition(".")[0])]
            found[key] = self.whole(weight, value) if value.shape == weight.shape else value
        return found

    def load_optimizer_tensors(self, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        """This process's rows."""
        weights = _weights_of(optimizer)
        own: Tensors = {}
        for key, value in tensors.items():
            weight = weights[int(key.partition(".")[0])]
            same = value.shape == self.shapes[self._names[id(weight)]]
            own[key] = self.own(weight, value) if same else value
        load_optimizer_tensors(optimizer, own)


def _rows_of(sharded: DTensor) -> nn.Parameter:
    """This process's rows of a parameter, in the memory that FSDP gathers it from."""
    with torch.no_grad():
        return nn.Parameter(sharded.to_local(), requires_grad=sharded.requires_grad)


def _weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]
