"""How a training step changes the weights: once along the gradient, or along a flatter one's."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cifar.config import Recipe

Update = Callable[[Any, Callable[[], None]], None]
"""(trainer, forward_backward) -> None: fill gradients by `forward_backward`, once or more often
(the metrics count the first time), and change the weights."""


class Learner(Protocol):
    """What an update needs of a `cifar.trainer.Trainer`."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The length of the gradient that these are the parts of."""

    def optimizer_step(self) -> None:
        """Apply the gradients."""


_EPSILON = 1e-12


def build_update(recipe: Recipe) -> Update:
    """The update of a recipe."""
    return SharpnessAware(recipe.sam_rho) if recipe.sam_rho else descend


def descend(trainer: Learner, forward_backward: Callable[[], None]) -> None:
    """One step along the gradient."""
    trainer.optimizer.zero_grad(set_to_none=True)
    forward_backward()
    trainer.optimizer_step()


class SharpnessAware:
    """SAM: a step along the gradient at the worst weights nearby, `rho` up the slope from here.

    Around any optimiser. Under fp16 the loss's scale cancels out of the way up, and a step whose
    first gradient overflows has NaN for its second one, so it is skipped; on several processes all
    climb the same way, along the gradient of the global batch. BatchNorm's running statistics are
    those of the weights themselves: the second pass leaves them alone.
    Foret et al. 2020 (https://arxiv.org/abs/2010.01412).
    """

    def __init__(self, rho: float) -> None:
        self._rho = rho

    def __call__(self, trainer: Learner, forward_backward: Callable[[], None]) -> None:
        """Take one step; see `Update`."""
        trainer.optimizer.zero_grad(set_to_none=True)
        forward_backward()
        weights: list[Tensor] = [w for w in trainer.parameters() if w.grad is not None]
        here = [each.detach().clone() for each in weights]
        self._climb(trainer, weights)
        trainer.optimizer.zero_grad(set_to_none=True)
        with statistics_kept(trainer.module):
            forward_backward()
        with torch.no_grad():
            torch._foreach_copy_(weights, here)
        trainer.optimizer_step()

    @torch.no_grad()
    def _climb(self, trainer: Learner, weights: list[Tensor]) -> None:
        gradients = [each.grad for each in weights if each.grad is not None]
        way = torch._foreach_mul(gradients, self._rho / (trainer.norm(gradients) + _EPSILON))
        torch._foreach_add_(weights, list(way))


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """While entered, BatchNorm in training normalises by the batch and leaves no trace of it."""
    norms = [
        each
        for each in module.modules()
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
