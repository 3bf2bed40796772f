"""How a network, its gradients and its optimiser's state lie on the processes of a training.

An engine wraps the network for training, and says what of it this process holds. `Engine` holds all
of it: one process alone, or each under DistributedDataParallel. `cifar.fsdp` and `cifar.zero` share
it out. What is saved or evaluated is gathered from them, so that nothing else depends on which of
them trains.
"""

import contextlib
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cifar.accelerator import autocast_module, wrap_module
from cifar.checkpoint import Tensors, check_same_shapes, load_into
from cifar.config import TrainConfig
from cifar.distributed import broadcast_from_first, reduce_sum
from cifar.exchange import register_hook
from cifar.muon import Rows
from cifar.optim import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine:
    """All of a network on every process.

    `module` is the network; its parameters may be those that a training step reads, not those that
    the optimiser changes: `named_parameters` are. `bare` is a network of the same layers without
    anything around it but autocast, to infer with weights that are given to it; in engines that
    share the weights out it has none of its own.
    """

    shares_out = False
    """Whether a process holds less than everything."""
    rows: Rows | None = None
    """Where it holds rows of every weight."""

    def __init__(self, accelerator: "Accelerator", module: nn.Module, config: TrainConfig) -> None:
        assert config.precision is not None, "resolved"
        self.module = self.bare = module
        self._accelerator, self._precision = accelerator, config.precision
        self._parallel = config.parallel

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser of this process changes, with the gradient that it reads."""
        yield from self.module.named_parameters()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over the optimiser of these parameters, before the first step."""

    def wrap(self) -> Any:
        """What a step calls; made anew when parameters have been frozen or set free."""
        self._wrapped = wrap_module(self._accelerator, self.module, self._precision)
        register_hook(self._wrapped, self._parallel)
        return self._wrapped

    def accumulating(self) -> AbstractContextManager[None]:
        """For the micro-batches before the last one of a step: their gradients stay where they are.

        Whatever that is, a step must end with a backward pass outside of it.
        """
        no_sync = getattr(self._wrapped, "no_sync", None)
        return contextlib.nullcontext() if no_sync is None else no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, averaged over the processes, to those that are there."""
        loss.backward()  # type: ignore[no-untyped-call]

    def after_unscaling(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
    ) -> None:
        """Have all processes agree on whether fp16 gradients have overflowed."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The length of a gradient whose parts, one per parameter, this process holds."""
        length: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
        return length

    def clip(self, limit: float) -> None:
        """Shorten the gradient to this length where it is longer."""
        nn.utils.clip_grad_norm_(self.module.parameters(), limit)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the parameters along their gradients."""
        optimizer.step()

    def live(self) -> Tensors:
        """The weights and buffers that training changes in place, as far as this process has them.

        Views by name; of a weight that is shared out it is this process's part.
        """
        return self.module.state_dict()

    def gather(self, tensors: Tensors) -> Tensors:
        """Tensors like those of `live`, whole on every process; a collective call."""
        return tensors

    def part(self, name: str, whole: Tensor) -> Tensor:  # noqa: ARG002 - elsewhere it matters
        """What this process has of a weight or buffer of that name."""
        return whole

    def load(self, weights: Tensors, where: str) -> None:
        """Take up whole weights; `where` says in messages what they are.

        Raises:
            CheckpointError: they are of another model.
        """
        load_into(self.module, weights, where)

    def live_state(self, optimizer: torch.optim.Optimizer) -> Tensors:
        """The optimiser's tensors that a step changes in place, as this process has them."""
        return optimizer_tensors(optimizer)

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> Tensors:
        """The optimiser's state, whole: see `cifar.optim.optimizer_tensors`; a collective call."""
        return optimizer_tensors(optimizer)

    def load_optimizer_tensors(self, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        """Take up a whole state."""
        load_optimizer_tensors(optimizer, tensors)


class SharingEngine(Engine):
    """What engines that share out the weights or the optimiser's state have in common."""

    shares_out = True

    def __init__(self, accelerator: "Accelerator", module: nn.Module, config: TrainConfig) -> None:
        super().__init__(accelerator, module, config)
        broadcast_from_first(module.state_dict().values())
        self.shapes = {name: each.shape for name, each in module.named_parameters()}
        self.bare = autocast_module(accelerator, weightless(module), self._precision)

    def load(self, weights: Tensors, where: str) -> None:
        """Copy this process's parts."""
        check_same_shapes(self.bare.state_dict(), weights, where)
        with torch.no_grad():
            for name, own in self.live().items():
                own.copy_(self.part(name, weights[name]))


def weightless(module: nn.Module) -> nn.Module:
    """A copy of a network whose parameters have no memory; its buffers have their own."""
    bare = copy.deepcopy(module)
    for layer in bare.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return bare


def global_norm(parts: list[Tensor]) -> Tensor:
    """The length of a vector whose elements lie on all processes; a collective call."""
    squares = torch.stack(torch._foreach_norm(parts)).square().sum()
    return reduce_sum(squares).sqrt()
