"""What the processes of a run exchange, and when. No torch in here."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from cifar.config.checks import option_name, require
from cifar.errors import UnsupportedError
from cifar.serialize import STRICT

BUCKET_MIB = 25.0
"""DistributedDataParallel's own, whose first bucket then holds 1 MiB, so that it leaves early."""
LEAST_BUCKET, MOST_BUCKET = 0.001, 65_536.0
MOST_LOCAL_STEPS = 65_536
_FOR_GRADIENTS = ("sync_batch_norm", "bucket_mib", "overlap", "compression")
"""What says how a step's exchange is done, and so nothing of steps without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """What several processes under DistributedDataParallel exchange, and when.

    Buckets and overlap change the speed alone, but for the last digits of sums over three processes
    or more; the others change what is learnt.
    """

    __pydantic_config__: ClassVar = STRICT

    sync_batch_norm: bool = False
    """Normalise by the global batch's statistics, so that 2 x 32 images train as 1 x 64 do; else
    every device normalises its own share. Changes what is learnt; costs two exchanges a layer, and
    on GPUs as many waits as torch's SyncBatchNorm has."""
    bucket_mib: float = BUCKET_MIB
    """MiB of gradients that are averaged together: less starts earlier, more means fewer exchanges.
    Changes the speed alone; at the default of 25 the first bucket holds 1 MiB."""
    overlap: bool = True
    """Average buckets during the backward pass; or (--no-overlap) all of them after it. Changes the
    speed alone."""
    compression: Literal["none", "bf16"] = "none"
    """Send gradients as they are, or rounded to bf16: half the traffic, and 8 bits of precision.
    Changes what is learnt."""
    local_steps: int = 1
    """Steps that every process takes by itself, on its share of every batch, before the weights and
    the optimiser's state are averaged (local SGD). Changes what is learnt; 1: gradients are
    averaged in every step."""

    def __post_init__(self) -> None:
        bucket, steps = self.bucket_mib, self.local_steps
        require(
            LEAST_BUCKET <= bucket <= MOST_BUCKET,
            option_name("bucket_mib"),
            bucket,
            f"give {LEAST_BUCKET:g} to {MOST_BUCKET:g}",
        )
        require(
            1 <= steps <= MOST_LOCAL_STEPS,
            option_name("local_steps"),
            steps,
            f"give 1 to {MOST_LOCAL_STEPS}",
        )
        for name in self.changed:
            remedy = (
                f"not with --local-steps {steps}, where no step exchanges anything; leave out one"
            )
            together = steps > 1 and name in _FOR_GRADIENTS
            require(not together, option_name(name), getattr(self, name), remedy)

    @property
    def changed(self) -> list[str]:
        """The fields that are not at their default."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]

    def check_launch(self, strategy: str, num_processes: int) -> None:
        """Refuse what only several processes under DistributedDataParallel do.

        `strategy` is what they were, or will be, launched with.

        Raises:
            ConfigError: there is only one process.
            UnsupportedError: it is another engine's to exchange gradients.
        """
        for name in self.changed:
            option, value = option_name(name), getattr(self, name)
            remedy = "is for several processes, which average something; start 2 or more"
            require(num_processes > 1, option, value, remedy)
            if strategy != "ddp":
                raise UnsupportedError(
                    f"{option}: {value!r}: is for ddp, not for {strategy}; launch with "
                    "launch/ddp.yaml, or leave it out"
                )

    @property
    def label(self) -> str:
        """What differs from the default, for tables: `bucket1 no-overlap`, `local4`; else empty."""
        texts: dict[str, Any] = {
            "sync_batch_norm": "sync-bn",
            "bucket_mib": f"bucket{self.bucket_mib:g}",
            "overlap": "no-overlap",
            "compression": f"{self.compression}-gradients",
            "local_steps": f"local{self.local_steps}",
        }
        return " ".join(texts[name] for name in self.changed)

    @property
    def gradient_hook(self) -> str:
        """The function of `cifar.exchange` that averages gradients; "none": DDP's own way."""
        compressed = self.compression == "bf16"
        if self.overlap:
            return "bf16_gradients" if compressed else "none"
        return "bf16_after_backward" if compressed else "after_backward"

    @property
    def bucket_bytes(self) -> int:
        """What DDP is told, in bytes."""
        return int(self.bucket_mib * 2**20)

    @property
    def batch_norm(self) -> str:
        """Over what BatchNorm takes its statistics where there are several devices."""
        return "synchronised" if self.sync_batch_norm else "per device"
