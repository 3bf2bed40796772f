"""Which engine a launcher asked for to share a training out over processes. No torch in here.

`accelerate launch --config_file launch/NAME.yaml` says so in the environment, and so can a user of
torchrun. Accelerate itself may start plain data parallelism instead (it does on a CPU for FSDP),
so what is asked is read here and what runs is verified.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from cifar.config import TrainConfig
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


_SETTINGS = {
    "FSDP_VERSION": ("2",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none",),
    "ACCELERATE_GRADIENT_CLIPPING": ("auto", "0", "0.0", "none"),
}
"""What a launcher's settings of its engine must be, for this program has one way of each."""


def check_settings(environ: Mapping[str, str]) -> None:
    """Raise an UnsupportedError for settings of an engine that would not be followed."""
    strategy = launched_strategy(environ)
    for name, neutral in _SETTINGS.items():
        theirs = "fsdp" if name.startswith("FSDP") else "zero"
        value = environ.get(name, neutral[0])
        if strategy.startswith(theirs) and value.lower() not in neutral:
            raise UnsupportedError(
                f"{name}: {value!r}: not supported; leave it out of the configuration that "
                f"accelerate was launched with, as launch/{strategy}.yaml does"
            )


def check_suits(strategy: Strategy, config: TrainConfig, precision: str) -> None:
    """Raise an UnsupportedError for what an engine would leave out or do differently."""
    recipe, zero = config.recipe, strategy in ZERO_STAGES
    moving = config.compile_mode != "default"  # CUDA graphs read weights where they were
    flat = "lays weights out contiguously"
    whole = "holds no whole matrix on the process that changes it"
    for refused, option, value, why in (
        (strategy != "ddp", "channels-last", config.channels_last, flat),
        (zero, "compile", config.compile, "runs Python of its own between the layers"),
        (strategy == "fsdp", "compile-mode", moving and config.compile_mode, "moves the weights"),
        (zero, "optimizer", recipe.optimizer == "muon" and "muon", whole),
        (zero, "sam-rho", recipe.sam_rho, "has gone on from the weights when SAM comes back"),
        (zero, "frozen-epochs", recipe.frozen_epochs, "shares out what needs a gradient once"),
        (zero, "precision", precision == "fp16" and "fp16", "scales the loss by rules of its own"),
    ):
        if refused and value:
            remedy = "use another one" if isinstance(value, str) else "leave it out"
            others = "ddp" if option in ("channels-last", "compile-mode") else "ddp or fsdp"
            raise UnsupportedError(
                f"{option}: {value!r}: not with {strategy}, which {why}; {remedy}, or launch "
                f"with {others}"
            )
