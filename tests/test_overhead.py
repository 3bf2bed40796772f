"""What the trainer and its input pipeline add, measured; slow, and only meaningful when idle."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from training import ROOT
from turns import is_known

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
WITHIN = 0.015
"""How far the 95 % interval of a ratio may reach, and the control's ratio from 1."""
NOISY = "too noisy to tell: run it on an idle machine"


@cache
def overhead(*options: str) -> dict[str, Any]:
    """What the script found; measured once."""
    script = Path(__file__).with_name("overhead.py")
    done = subprocess.run(
        [sys.executable, str(script), *options],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


RESNET20 = ("step", "--model", "resnet20", "--pairs", "200")
RESNET18 = ("step", "--model", "resnet18", "--pairs", "60")
"""Its steps take seconds on a CPU, and so vary less."""


@pytest.mark.parametrize(
    "options", [RESNET20, (*RESNET20, "--ema-decay", "0"), RESNET18], ids=" ".join
)
def test_a_step_is_hardly_slower_than_a_bare_loop_s(options: tuple[str, ...]) -> None:
    found = overhead(*options)
    for name in ("ratio", "control"):
        assert is_known(found[name], WITHIN), NOISY
    assert abs(found["control"][0] - 1) <= WITHIN, NOISY
    assert found["ratio"][0] >= 0.97


def test_a_short_step_takes_at_most_a_millisecond_more() -> None:
    """Of 10 to 20 ms on a CPU; the control tells what the machine's noise alone adds."""
    options = ("--model", "resnet20-w4", "--batch-size", "4", "--turn", "64", "--pairs", "60")
    found = overhead("step", *options)
    assert abs(found["control"][0] - 1) * found["bare_step_ms"] <= 0.2, NOISY
    added, low, high = found["added_ms"]
    assert high - low <= 1, NOISY
    assert added <= 1


def test_augmented_input_keeps_a_share_of_plain_input_s_rate() -> None:
    found = overhead("pipeline")
    assert found["ratio"][0] >= 0.3


def test_the_input_pipeline_delivers_20_times_what_resnet18_consumes() -> None:
    step, pipeline = overhead(*RESNET18), overhead("pipeline")
    consumed = 1e3 * step["batch_size"] / step["bare_step_ms"]
    assert pipeline["augmented_images_per_s"] >= 20 * consumed
