"""Which engine a launcher asked for to share a training out over processes. No torch in here.

`accelerate launch --config_file launch/NAME.yaml` says so in the environment, and so can a user of
torchrun. Accelerate itself may start plain data parallelism instead (it does on a CPU for FSDP),
so what is asked is read here and what runs is verified.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from cifar.errors import ConfigError, UnsupportedError

Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
"""DistributedDataParallel (of one process: the network as it is), FSDP2, DeepSpeed's ZeRO stages.

The names are those of the files in `launch/` and of the launchers of `bench`.
"""
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
ZERO_STAGES: dict[Strategy, int] = {"zero1": 1, "zero2": 2, "zero3": 3}

_REMEDY = f"launch with one of launch/{{{','.join(STRATEGIES)}}}.yaml"


def launched_strategy(environ: Mapping[str, str]) -> Strategy:
    """The strategy that this process was launched with.

    Raises:
        ConfigError: two engines at once, or a ZeRO stage that is none.
        UnsupportedError: an engine that this program does not have (Megatron, FSDP1, ...).
    """
    for engine in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_on(environ, engine):
            raise UnsupportedError(f"distributed_type: {engine!r}: not supported; {_REMEDY}")
    sharded, zero = _is_on(environ, "FSDP"), _is_on(environ, "DEEPSPEED")
    if sharded and zero:
        raise ConfigError(
            "ACCELERATE_USE_FSDP: 'true': ACCELERATE_USE_DEEPSPEED is true as well; set one of them"
        )
    if zero:
        return _zero_stage(environ)
    return "fsdp" if sharded else "ddp"


def _is_on(environ: Mapping[str, str], engine: str) -> bool:
    return environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1", "yes")


def _zero_stage(environ: Mapping[str, str]) -> Strategy:
    told = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's default
    for strategy, stage in ZERO_STAGES.items():
        if told == str(stage):
            return strategy
    raise ConfigError(f"zero_stage: {told!r}: must be 1, 2 or 3; {_REMEDY}")
