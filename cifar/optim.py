"""Parameter groups, optimisers, the learning rate as a function of the step, weight averaging."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from cifar.config import Recipe
from cifar.config.recipe import CYCLED_MOMENTUM
from cifar.muon import Muon, Rows
from cifar.roles import Roles

ONE_CYCLE_RISE, TRIANGLE_RISE = 0.3, 0.1
"""Share of the steps in which these schedules rise."""
_FIRST, _LAST = 25.0, 25e4
"""What the highest learning rate is divided by at one-cycle's beginning and end."""
NO_ROLES = Roles()


class Parametrized(Protocol):
    """A module, or whatever else has a process's parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that a module gives them."""


def parameter_groups(
    module: Parametrized, recipe: Recipe, roles: Roles = NO_ROLES
) -> list[dict[str, Any]]:
    """All parameters that are trained, those with the same weight decay and `lr_share` together.

    The latter is by how much a group's learning rate differs from the recipe's: of the head by its
    `head_lr`, elsewhere by `backbone_lr`, and of BatchNorm's biases by `norm_bias_lr` as well.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rule = _rule(name, parameter, recipe, roles)
            groups.setdefault(rule, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_share": share}
        for (decay, share), parameters in groups.items()
    ]


def _rule(name: str, parameter: nn.Parameter, recipe: Recipe, roles: Roles) -> tuple[float, float]:
    """A parameter's weight decay, and its share of the learning rate."""
    decays = recipe.decay_norm_and_bias or parameter.ndim > 1
    decay = recipe.weight_decay if decays else 0.0
    if name in roles.head:
        return decay / recipe.head_lr, recipe.head_lr
    if name in roles.norm_biases:
        return decay / recipe.norm_bias_lr, recipe.norm_bias_lr * recipe.backbone_lr
    return decay, recipe.backbone_lr


_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def eager(cls: type[Optimizer]) -> type[Optimizer]:
    """An optimiser's class without what torch puts around its methods for compiled steps.

    Those wrappers import torch's compiler, which takes as long as all the rest of torch; here no
    optimiser's step is compiled.
    """
    methods = {name: inspect.unwrap(getattr(cls, name)) for name in _WRAPPED}
    methods["step"] = torch.no_grad()(inspect.unwrap(cls.step))
    return cast(type[Optimizer], type(cls.__name__, (cls,), methods))


_SGD, _Muon = eager(torch.optim.SGD), eager(Muon)
_ADAMS = {"adam": eager(torch.optim.Adam), "adamw": eager(torch.optim.AdamW)}


def build_optimizer(
    module: Parametrized, recipe: Recipe, roles: Roles = NO_ROLES, rows: Rows | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser, in the fused form that torch has for CPU and GPU alike.

    `roles`: see `parameter_groups`; Muon gives the head's convolutions a plain step. `rows`: see
    `cifar.muon.Muon`.
    """
    groups = parameter_groups(module, recipe, roles)
    if recipe.optimizer in _ADAMS:
        adam = _ADAMS[recipe.optimizer]
        return adam(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)
    if recipe.optimizer == "muon":
        classifier = [p for name, p in module.named_parameters() if name in roles.head]
        return build_muon(groups, recipe, rows, classifier)
    optimizer = _SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        fused=True,
    )
    if recipe.momentum:
        # Else fused SGD leaves them uninitialised when fp16 overflows in the very first step.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_muon(
    groups: list[dict[str, Any]],
    recipe: Recipe,
    rows: Rows | None = None,
    classifier: Sequence[nn.Parameter] = (),
) -> Muon:
    """Muon for the convolutions among the groups' parameters, SGD for the others.

    The `classifier` is of the others, though it be a convolution, as SqueezeNet's is: the length of
    its weights tells how sure the network is.
    """
    plain = set(map(id, classifier))

    def chosen(convolutions: bool) -> Iterator[dict[str, Any]]:
        for group in groups:
            wanted = [
                parameter
                for parameter in group["params"]
                if (parameter.ndim == 4 and id(parameter) not in plain) == convolutions
            ]
            yield {**group, "params": wanted}

    return _Muon(
        chosen(True),
        chosen(False),
        lr=recipe.lr,
        relative_step=recipe.muon_step,
        muon_momentum=recipe.muon_momentum,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        rows=rows,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of a step, or its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


def lr_at(step: int, total_steps: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Learning rate of the 0-based optimiser step `step`, whatever the number of processes.

    One-cycle: `torch.optim.lr_scheduler.OneCycleLR` with its defaults (Smith 2018,
    https://arxiv.org/abs/1708.07120). Triangle: linear from 0 for 10 %, then linear to 0, the best
    fall for a short budget in Li et al. 2020 (https://arxiv.org/abs/1905.04753). Cosine:
    https://arxiv.org/abs/1608.03983. Step: a tenth after 50 %, a hundredth after 75 % of what
    follows the warm-up (He et al. 2015, https://arxiv.org/abs/1512.03385).
    """
    if recipe.schedule == "one-cycle":
        return _one_cycle(step, total_steps, recipe.lr / _FIRST, recipe.lr, recipe.lr / _LAST)
    if recipe.schedule == "triangle":
        warmup = max(1, round(TRIANGLE_RISE * total_steps))
    else:
        warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    if recipe.schedule == "step":
        return recipe.lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if recipe.schedule in ("linear", "triangle"):
        return recipe.lr * (1 - progress)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(step: int, total_steps: int, first: float, middle: float, last: float) -> float:
    """From `first` to `middle` in the rise and on to `last`, along half a cosine each."""
    top, end = ONE_CYCLE_RISE * total_steps - 1, total_steps - 1
    if step <= top:
        return _along_cosine(first, middle, step / top)
    return _along_cosine(middle, last, (step - top) / (end - top))


def _along_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * progress))


def schedule_momentum(
    optimizer: torch.optim.Optimizer, step: int, total_steps: int, recipe: Recipe
) -> None:
    """Give an optimiser the momentum of a 0-based step, where the schedule has one of its own.

    One-cycle's falls by `CYCLED_MOMENTUM` while the learning rate rises, and rises again while that
    falls; of Adam it is the first beta.
    """
    if recipe.schedule != "one-cycle":
        return
    least = recipe.momentum - CYCLED_MOMENTUM
    momentum = _one_cycle(step, total_steps, recipe.momentum, least, recipe.momentum)
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif group.get("relative_step") is None:  # Muon's convolutions have their own
            group["momentum"] = momentum


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as `<parameter number>.<name>`, e.g. `0.momentum_buffer`."""
    return {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take up a state from `optimizer_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        like = parameters[int(number)]
        # Fused optimisers pair numbers by their place in memory, so layouts must agree.
        same = value.shape == like.shape
        state.setdefault(int(number), {})[name] = (
            torch.empty_like(like).copy_(value) if same else value
        )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class WeightAverage:
    """Exponential moving average of all weights and BatchNorm statistics.

    What is counted instead, batches, is in `weights` as it stands: those are the trained ones' own.
    The decay is warmed up as min(decay, (1 + n) / (10 + n)) after n updates, so that the first
    weights, which are random, do not linger (TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        """Average these tensors, which training changes in place."""
        self.decay = decay
        self.updates = 0
        floating = [name for name, tensor in weights.items() if tensor.is_floating_point()]
        self._values = [weights[name] for name in floating]
        self._averages = [value.clone() for value in self._values]
        self.weights = weights | dict(zip(floating, self._averages, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
