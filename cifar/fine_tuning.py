"""All of a network but its classifier, frozen while that is trained alone."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Backbone:
    """The parameters of a network outside of its head, and its BatchNorms.

    While it is frozen no gradient is computed for it, so that no optimiser changes, decays or
    counts it, and its BatchNorms normalise by their running statistics and leave those as they are.
    """

    def __init__(self, module: nn.Module, head: Collection[str]) -> None:
        self._parameters = [
            parameter
            for name, parameter in module.named_parameters()
            if name not in head and parameter.requires_grad
        ]
        self._norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.is_frozen = False

    def freeze(self, frozen: bool) -> None:
        """Freeze it, or let it be trained from here on."""
        self.is_frozen = frozen
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)
            parameter.grad = None

    def set_norms(self) -> None:
        """Put the BatchNorms in the mode that is due in training; an evaluation changes it."""
        if self._norms and self._norms[0].training == self.is_frozen:
            for norm in self._norms:
                norm.training = not self.is_frozen
