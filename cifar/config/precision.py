"""Number formats. A new one is a row in `PRECISIONS` and its name in `PrecisionName`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Number formats of a run: weights are fp32 in all of them.

    `autocast` is the dtype that convolutions and matrix products run in, None for fp32; `tf32` lets
    fp32 ones use TensorFloat-32 units; `loss_scaling` multiplies the loss to keep fp16 gradients
    from vanishing (https://arxiv.org/abs/1710.03740).
    """

    mixed_precision: Literal["no", "fp16", "bf16"]
    autocast: Literal["float16", "bfloat16"] | None = None
    tf32: bool = False
    loss_scaling: bool = False


PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
"""The keys of `PRECISIONS`, as options and configurations accept them."""

PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(mixed_precision="no"),
    "tf32": Precision(mixed_precision="no", tf32=True),
    "bf16": Precision(mixed_precision="bf16", autocast="bfloat16"),
    "fp16": Precision(mixed_precision="fp16", autocast="float16", loss_scaling=True),
}
