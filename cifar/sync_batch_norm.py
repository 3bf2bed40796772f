"""BatchNorm over the batches of all processes: torch's on GPUs, and the same for CPUs, where torch
has none."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar.distributed import is_distributed, reduce_sum
from cifar.errors import UnsupportedError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class CpuSyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for CPUs, which that refuses, as DDP refuses it on them."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - the base class's name
        assert input.ndim >= 2, "[B, C, ...]"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class's name
        """`[B, C, ...]` normalised by mean and variance over all processes while training."""
        if not self.training or not is_distributed():
            return super().forward(input)
        output, mean, variance = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance)
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None, "tracked"
        assert self.running_var is not None, "tracked"
        assert self.num_batches_tracked is not None, "tracked"
        self.num_batches_tracked += 1
        factor = self.momentum
        if factor is None:  # a mean over all batches so far
            factor = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


class _Normalize(torch.autograd.Function):
    """Training-mode BatchNorm whose sums run over all processes, forward and backward.

    One gather of every process's mean and variance forward, which are combined as in Chan et al.
    1979 (parallel variance), and one sum of two values per channel backward.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the mean and the unbiased variance of all processes' `images`."""
        channels = images.shape[1]
        over = [0, *range(2, images.ndim)]
        own_variance, own_mean = torch.var_mean(images.float(), over, correction=0)
        own_count = own_mean.new_tensor([images.numel() / channels])
        everyone = _gathered(torch.cat([own_mean, own_variance, own_count]))
        means, variances, counts = torch.split(everyone, [channels, channels, 1], 1)
        count = counts.sum()
        share = counts / count
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        output = F.batch_norm(images, mean, variance, weight, bias, eps=eps)
        ctx.save_for_backward(images, weight, mean, variance, count)
        ctx.eps = eps
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return output, mean, unbiased

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        """Gradients of images, weight and bias; the latter two of this process's images alone."""
        images, weight, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As if the statistics were constants; then their own share in the gradient.
        own, of_scale, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, images, scale, mean, variance, None, None, False, ctx.eps, [True] * 3
        )
        sums = reduce_sum(torch.cat([of_bias, of_scale])) / count
        mean_gradient, mean_along = sums.chunk(2)
        inverse = (variance + ctx.eps).rsqrt()
        slope = -scale * inverse * inverse * mean_along
        offset = -scale * inverse * mean_gradient - slope * mean
        shape = (1, -1, *[1] * (images.ndim - 2))
        whole = torch.addcmul(own + offset.view(shape), images, slope.view(shape))
        return whole.to(images.dtype), of_scale if weight is not None else None, of_bias, None


def _gathered(mine: Tensor) -> Tensor:
    """Every process's values `[N]`, as `[processes, N]`."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def synchronize_norms(module: nn.Module, device: torch.device) -> None:
    """Replace every BatchNorm inside a module by one over all processes, with the same tensors.

    Raises:
        UnsupportedError: it has none, or one that does more than normalise.
    """
    unlike = Counter(type(each).__name__ for each in _norms(module) if type(each) not in _NORMS)
    if unlike or not _norms(module):
        told = f"the model's {next(iter(unlike))} does more than" if unlike else "no layer is a"
        raise UnsupportedError(
            f"sync-batch-norm: True: {told} BatchNorm; leave it out, or take another model"
        )
    kind = nn.SyncBatchNorm if device.type == "cuda" else CpuSyncBatchNorm
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, _NORMS):
                setattr(parent, name, _synchronized(norm, kind))


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


def _synchronized(norm: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    new = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new._parameters.update(norm._parameters)
    new._buffers.update(norm._buffers)
    return new.train(norm.training)


def batch_norm_of(module: nn.Module) -> str:
    """Over what the BatchNorms of a module take their statistics; "" if it has none."""
    everywhere = (nn.SyncBatchNorm, CpuSyncBatchNorm)
    told = {
        "synchronised" if isinstance(each, everywhere) else "per device" for each in _norms(module)
    }
    return " and ".join(sorted(told))
