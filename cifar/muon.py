"""Muon: steps along orthogonal matrices for convolutions, SGD for all other parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

_ITERATIONS = 4
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration in Jordan 2024; steep at 0, so that few suffice."""
_EPSILON = 1e-12


class Rows(Protocol):
    """Where weights lie whose optimiser has a process's rows of each of them."""

    def whole(self, weight: Tensor, rows: Tensor) -> Tensor:
        """All rows of a tensor like `weight`, of which this process has these."""

    def own(self, weight: Tensor, whole: Tensor) -> Tensor:
        """This process's rows of it."""


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, SGD with momentum for biases, norms and the classifier.

    A convolution's weight is a matrix `[out, in * height * width]`. Its step is the momentum made
    nearly orthogonal, so that no direction is learnt much faster than another
    (https://kellerjordan.github.io/posts/muon/), and has a length relative to that of the weight,
    which keeps its own: before a BatchNorm only a weight's direction matters (as in airbench,
    https://github.com/KellerJordan/cifar10-airbench). Matrices are multiplied in the weights'
    dtype. Weight decay is for the other parameters alone. Where every process has `rows` of the
    weights, each of them computes the steps of the whole matrices.
    """

    def __init__(
        self,
        convolutions: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        relative_step: float,
        muon_momentum: float,
        momentum: float,
        nesterov: bool,
        rows: Rows | None = None,
    ) -> None:
        """Of groups of parameters, as `torch.optim.SGD` takes them.

        `lr` is the highest learning rate of the others; a convolution's highest step, relative to
        its weight, is `relative_step`. Both follow the groups' `lr`.
        """
        steps = {"relative_step": relative_step / lr, "momentum": muon_momentum}
        rates = {"relative_step": None, "momentum": momentum}
        groups = [{**group, **steps, "weight_decay": 0.0} for group in convolutions]
        groups += [{**group, **rates} for group in others]
        super().__init__(groups, {"lr": lr, "nesterov": nesterov})
        self._rows = rows
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change all parameters that have a gradient."""
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            weights = [each for each in group["params"] if each.grad is not None]
            if not weights:
                continue
            directions = self._directions(weights, group)
            if group["relative_step"] is None:
                torch._foreach_add_(weights, directions, alpha=-group["lr"])
            else:
                self._turn(weights, directions, group["lr"] * group["relative_step"])

    def _directions(self, weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Gradients with weight decay and momentum, as `torch.optim.SGD` has them."""
        gradients = [each.grad for each in weights if each.grad is not None]
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        if not group["nesterov"]:
            return momenta
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))

    def _turn(self, weights: list[Tensor], directions: list[Tensor], relative_step: float) -> None:
        """Move every weight against its direction."""
        rows = self._rows
        if rows is None:
            for weight, new in zip(
                weights, _turned(weights, directions, relative_step), strict=True
            ):
                weight.copy_(new)
            return
        old = [rows.whole(weight, weight) for weight in weights]
        whole = [rows.whole(*pair) for pair in zip(weights, directions, strict=True)]
        for weight, new in zip(weights, _turned(old, whole, relative_step), strict=True):
            weight.copy_(rows.own(weight, new))


def _turned(weights: list[Tensor], directions: list[Tensor], relative_step: float) -> list[Tensor]:
    """Weights moved against their directions, made orthogonal; those of one shape together."""
    found = list(weights)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, weight in enumerate(weights):
        by_shape[weight.shape].append(number)
    for numbers in by_shape.values():
        old = torch.stack([weights[number].flatten(1) for number in numbers])
        step = orthogonalized(torch.stack([directions[number].flatten(1) for number in numbers]))
        length = torch.linalg.matrix_norm(old, keepdim=True)
        step *= relative_step * length / (torch.linalg.matrix_norm(step, keepdim=True) + _EPSILON)
        new = old - step
        new *= length / (torch.linalg.matrix_norm(new, keepdim=True) + _EPSILON)
        for number, matrix in zip(numbers, new, strict=True):
            found[number] = matrix.view(weights[number].shape)
    return found


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices `[N, rows, columns]` with their singular vectors and singular values near 1.

    Between 0.5 and 1.5 where they were not far smaller than the largest one; a matrix of zeros
    stays one.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / (torch.linalg.matrix_norm(found, keepdim=True) + _EPSILON)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(
            found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a
        )
    return found.mT if tall else found
