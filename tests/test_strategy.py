"""Which engine a launcher asked for."""

import pytest

from cifar.errors import ConfigError, UnsupportedError
from cifar.strategy import Strategy, launched_strategy


@pytest.mark.parametrize(
    ("environ", "strategy"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "false"}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "zero2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ddp"),
    ],
)
def test_the_strategy_is_what_the_launcher_says(
    environ: dict[str, str], strategy: Strategy
) -> None:
    assert launched_strategy(environ) == strategy


@pytest.mark.parametrize(
    ("environ", "error", "told"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, UnsupportedError, "'MEGATRON_LM': not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, UnsupportedError, "PARALLELISM_CONFIG"),
        (
            {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"},
            ConfigError,
            "ACCELERATE_USE_FSDP: 'true': ACCELERATE_USE_DEEPSPEED is true as well",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            ConfigError,
            "zero_stage: '0': must be 1, 2 or 3",
        ),
    ],
)
def test_an_engine_that_is_not_here_is_refused(
    environ: dict[str, str], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        launched_strategy(environ)
