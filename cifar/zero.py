"""DeepSpeed's ZeRO: the optimiser's state, the gradients and the weights are shared out.

Stage 1 shares out the first, 2 the first two, 3 all. DeepSpeed is started by itself and not through
Accelerate, whose `prepare` takes a step in every backward pass, ignores CPUs where it is told of
them, and would have the weights themselves in bf16. The network computes under the same autocast as
under DDP, on fp32 weights whose gradients are averaged in fp32
(https://www.deepspeed.ai/docs/config-json/).
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar.accelerator import autocast_module
from cifar.checkpoint import Tensors
from cifar.config import TrainConfig
from cifar.distributed import limit_collectives
from cifar.engine import SharingEngine
from cifar.errors import TrainingError, UnsupportedError
from cifar.strategy import ZERO_STAGES, Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator

_NEVER = 2**62
"""Steps between two lines that DeepSpeed prints of its progress."""
_BUCKETS = {
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}
"""DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py)."""
_ALIGNMENT = 2
"""What sizes of buckets must be multiples of."""


class ZeroEngine(SharingEngine):
    """A network in DeepSpeed's engine, with one of its ZeRO optimisers around the recipe's.

    The recipe's optimiser changes flat tensors that hold this process's share; its groups, and so
    the learning rate and the momentum, are the recipe's.
    """

    def __init__(
        self, accelerator: "Accelerator", module: nn.Module, config: TrainConfig, strategy: Strategy
    ) -> None:
        super().__init__(accelerator, module, config)
        self._config, self._strategy = config, strategy
        self._stage = ZERO_STAGES[strategy]
        self._deepspeed = import_deepspeed(strategy, accelerator.device)
        self._parameters = dict(module.named_parameters())

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Start DeepSpeed; from here on the optimiser has flat tensors for parameters."""
        optimizer.param_groups[:] = [each for each in optimizer.param_groups if each["params"]]
        self._numbered = [each for group in optimizer.param_groups for each in group["params"]]
        optimizer.state.clear()  # of the parameters that it no longer has
        autocast_module(self._accelerator, self.module, self._precision)
        self._engine, self._zero, _, _ = self._deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=zero_config(self._config, self._stage, dist.get_world_size(), self._elements()),
            dist_init_required=False,
        )
        limit_collectives(self._zero.dp_process_group, self._accelerator.device)
        self._base = optimizer
        self._flat: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else self._zero.single_partition_of_fp32_groups
        )
        for flat in self._flat:
            optimizer.state[flat].update(_first_state(optimizer, flat))
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # else only after the first step

    def _elements(self) -> int:
        """Of all weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def wrap(self) -> Any:
        """DeepSpeed's engine."""
        return self._engine

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Let DeepSpeed keep the gradients for the micro-batch that ends the step."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """As DeepSpeed goes backward: gradients are exchanged on the way."""
        self._engine.backward(loss)

    def clip(self, limit: float) -> None:
        """DeepSpeed does it in its step, see `zero_config`."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Have DeepSpeed change the shares and exchange the weights.

        Raises:
            TrainingError: the gradient was not finite, for which DeepSpeed leaves a step out.
        """
        assert optimizer is self._base
        self._engine.step()
        if self._zero.overflow:
            raise TrainingError(
                "gradient: not finite, so that DeepSpeed skipped a step: training stopped; lower "
                "--lr or change --precision"
            )

    def live(self) -> Tensors:
        """Whole weights in stages 1 and 2, a padded share of each in stage 3."""
        state: Tensors = dict(self.module.state_dict())
        if self._stage < 3:
            return state
        return state | {name: each.ds_tensor.data for name, each in self._sharing()}

    def _sharing(self) -> Iterator[tuple[str, Any]]:
        yield from self._parameters.items()

    @torch.no_grad()
    def gather(self, tensors: Tensors) -> Tensors:
        """In stage 3 every process's shares, one after the other."""
        if self._stage < 3:
            return tensors
        names = [name for name in self.shapes if name in tensors]
        return tensors | {name: _joined(tensors[name], self.shapes[name]) for name in names}

    def part(self, name: str, whole: Tensor) -> Tensor:
        """In stage 3 this process's share of the elements, padded with zeros."""
        if self._stage < 3 or name not in self.shapes:
            return whole
        parameter: Any = self._parameters[name]
        return _share(whole, parameter.ds_tensor.numel())

    def load(self, weights: Tensors, where: str) -> None:
        """Take them up in the flat tensors as well, which the optimiser changes."""
        super().load(weights, where)
        self._zero.refresh_fp32_params()

    def live_state(self, optimizer: torch.optim.Optimizer) -> Tensors:
        """The flat shares that the optimiser changes and what it keeps of each."""
        found = {f"{number}.weights": flat.detach() for number, flat in enumerate(self._flat)}
        for number, flat in enumerate(self._flat):
            for name, value in optimizer.state[flat].items():
                if isinstance(value, Tensor):
                    found[f"{number}.{name}"] = value
        return found

    @torch.no_grad()
    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> Tensors:
        """Gathered by DeepSpeed; a counter is the same for all weights."""
        state = optimizer.state[self._flat[0]]
        found: Tensors = {}
        for number, parameter in enumerate(self._numbered):
            for name, value in state.items():
                found[f"{number}.{name}"] = (
                    self._whole_state(parameter, name) if value.ndim else value.clone()
                )
        return found

    def _whole_state(self, parameter: Any, name: str) -> Tensor:
        from deepspeed import utils

        if self._stage < 3:
            return utils.safe_get_full_optimizer_state(parameter, name)  # type: ignore[no-any-return]
        own = utils.safe_get_local_optimizer_state(parameter, name)
        return _joined(own, parameter.ds_shape)

    @torch.no_grad()
    def load_optimizer_tensors(self, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        """This process's shares."""
        from deepspeed import utils

        for key, value in tensors.items():
            number, _, name = key.partition(".")
            parameter = self._numbered[int(number)]
            if value.ndim == 0:
                for flat in self._flat:
                    optimizer.state[flat][name].copy_(value)
            elif self._stage < 3:
                utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
            else:
                own = _share(value.to(parameter.device), parameter.ds_tensor.numel())
                utils.safe_set_local_optimizer_state(parameter, own, name)


def zero_config(
    config: TrainConfig, stage: int, num_processes: int, elements: int
) -> dict[str, Any]:
    """DeepSpeed's settings: what the recipe says, and its own defaults.

    Micro-batches are counted by the trainer. In stage 3 no parameter is too small to be shared out.
    Buckets are no larger than a network of so many `elements` can fill: DeepSpeed allocates them
    whole, which is 2 GB of fp32 by default.
    """
    most = elements + elements % _ALIGNMENT
    buckets = {name: min(size, most) for name, size in _BUCKETS.items()}
    return {
        "train_micro_batch_size_per_gpu": config.per_device_batch_size(num_processes),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.recipe.clip_norm,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **buckets},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        "timers": {"throughput": {"enabled": False}},  # which waits for the GPU in every step
    }


def import_deepspeed(strategy: Strategy, device: torch.device) -> Any:
    """The package, told which device it is for.

    Raises:
        UnsupportedError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UnsupportedError(
            f"strategy: '{strategy}': the package deepspeed is not installed; install "
            "cifar-resnet-bench[deepspeed]"
        )
    os.environ["DS_ACCELERATOR"] = device.type  # it would look for one, and warn of finding none
    import deepspeed

    logging.getLogger("DeepSpeed").addFilter(_is_news)
    if device.type == "cpu":
        # Compiled for half a minute at the first start; of use to inference alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """All but the warning that the optimiser is not one of DeepSpeed's, as `zero_config` allows."""
    return "untested optimizer" not in record.getMessage()


def _first_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """What an optimiser keeps of a parameter before its first step, so that it can be taken up."""
    zeros = torch.zeros_like(flat)
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        step = torch.zeros((), dtype=torch.float32, device=flat.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return {"momentum_buffer": zeros} if optimizer.defaults["momentum"] else {}


def _share(whole: Tensor, size: int) -> Tensor:
    """This process's `size` elements of a tensor, in order, zeros after its end."""
    padded = whole.new_zeros(size * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded.narrow(0, size * dist.get_rank(), size)


def _joined(share: Tensor, shape: torch.Size) -> Tensor:
    """All processes' shares as a tensor; a collective call."""
    joined = share.new_empty(share.numel() * dist.get_world_size())
    dist.all_gather_into_tensor(joined, share.contiguous())
    return joined[: shape.numel()].view(shape)
