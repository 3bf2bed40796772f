"""What the trainer and its input pipeline add, measured; slow, and only meaningful when idle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import ROOT

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def overhead(*options: str) -> dict[str, object]:
    script = Path(__file__).with_name("overhead.py")
    done = subprocess.run(
        [sys.executable, str(script), *options],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [(), ("--ema-decay", "0")])
def test_a_step_is_hardly_slower_than_a_bare_loop_s(options: tuple[str, ...]) -> None:
    found = overhead("step", "--model", "resnet20", "--pairs", "100", *options)
    ratio, low, high = found["ratio"]
    assert high - low < 0.06, "too noisy to tell: run it on an idle machine"
    assert ratio >= 0.97


def test_augmented_input_keeps_a_share_of_plain_input_s_rate() -> None:
    found = overhead("pipeline", "--pairs", "300")
    assert found["ratio"][0] >= 0.3
