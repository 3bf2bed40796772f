"""The first inference of a fresh process."""

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import make_trainer, save_weights, tiny_recipe

import bench.cold
from bench.cold import STARTED, Cold, infer, ramp
from bench.measure import cold
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement
from cifar.network import Network

CPU = torch.device("cpu")


def measured(**config: object) -> dict[str, Measurement]:
    subject = Subject(make_trainer(**config), Protocol())
    return {each.name: each for each in cold.measure_cold(subject)}


def inferred(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **config: object
) -> tuple[Cold, torch.Tensor]:
    """What `infer` tells when it was started at 1.0 s and its moments are 10, 13 and 13.5 s.

    And the logits that the same weights give in fp32.
    """
    trainer = make_trainer(**config)
    save_weights(folder, trainer)
    moments = iter([10.0, 13.0, 13.5])
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr(bench.cold, "time", clock)
    monkeypatch.setenv(STARTED, "1.0")
    module = trainer.module.eval()
    with torch.no_grad():
        exact = type(module).forward(module, ramp((3, 16, 16), CPU, channels_last=False))
    return infer(folder, CPU), exact


def test_the_seconds_of_an_inference_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, exact = inferred(tmp_path / "weights", monkeypatch, precision="fp32")
    assert (found.start, found.first, found.second) == (12.0, 3.0, 0.5)
    assert found.logits == pytest.approx(exact[0].tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_inference_is_in_the_precision_and_the_layout_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    images: list[torch.Tensor] = []
    logits = Network.logits
    monkeypatch.setattr(
        Network, "logits", lambda self, image: images.append(image) or logits(self, image)
    )
    found, exact = inferred(
        tmp_path / "weights", monkeypatch, precision="bf16", channels_last=channels_last
    )
    assert (found.seen["autocast"], found.seen["input_dtype"]) == ("bfloat16", "bfloat16")
    nhwc = [not image.is_contiguous() for image in images]
    assert nhwc == [channels_last] * 3, "two that are timed and one that is observed"
    assert found.seen["input_channels_last"] is channels_last
    assert found.seen["weight_channels_last"] is channels_last
    difference = (torch.tensor(found.logits) - exact[0]).abs().max()
    assert 0 < difference < 0.1 * exact.abs().max()


def test_an_image_that_any_process_can_make() -> None:
    image = ramp((1, 1, 5), CPU, channels_last=False)
    assert image.tolist() == [[[[-1.0, -0.5, 0.0, 0.5, 1.0]]]]
    nhwc = ramp((3, 4, 4), CPU, channels_last=True)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nhwc, ramp((3, 4, 4), CPU, channels_last=False))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_dtype": "bfloat16"}, "input_dtype: bfloat16 where float32 was asked"),
        ({"input_channels_last": True}, "input_channels_last: True where False was asked"),
        ({}, "wrong outputs: a logit differs by 1 from fp32 eager's"),
    ],
)
def test_a_process_that_computes_something_else_has_no_numbers(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str
) -> None:
    real = cold._run

    def other(*words: object) -> Cold:
        found = real(*words)
        logits = found.logits if changes else [found.logits[0] + 1, *found.logits[1:]]
        return dataclasses.replace(found, seen=found.seen | changes, logits=logits)

    monkeypatch.setattr(cold, "_run", other)
    for each in measured(precision="fp32").values():
        assert (each.status, each.samples) == ("failed", ())
        assert each.reason.startswith(reason)


def test_what_disturbs_the_process_makes_the_record_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watching: list[str] = []

    @contextlib.contextmanager
    def watched(_: Subject, where: str) -> Iterator[None]:
        watching.append(where)
        yield
        watching.clear()

    def run(*_: object) -> Cold:
        assert watching == ["cold"]
        raise OSError("seen")

    monkeypatch.setattr(Subject, "watched", watched)
    monkeypatch.setattr(cold, "_run", run)
    assert {each.reason[-4:] for each in measured().values()} == {"seen"}


def test_a_fresh_process_infers_with_the_weights() -> None:
    found = measured(precision="bf16", channels_last=True, recipe=tiny_recipe(ema_decay=0.5))
    start, first, second = (
        found[name].value
        for name in ("cold_start", "cold_first_inference", "cold_second_inference")
    )
    assert start > first > 0
    assert start > second > 0
    assert found["cold_start"].labels["batch_size"] == 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('no room')", "the process that was to infer: no room"),
        ("print('{}')", "the process that was to infer: "),
        ("print('no number')", "the process that was to infer: Expecting value"),
    ],
)
def test_a_process_that_breaks_down_costs_these_numbers_alone(
    monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    run = subprocess.run
    monkeypatch.setattr(
        cold.subprocess, "run", lambda _, **options: run([sys.executable, "-c", program], **options)
    )
    found = measured()
    assert len(found) == 3
    for each in found.values():
        assert each.status == "failed"
        assert each.reason.startswith(reason)


def test_the_clock_starts_before_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold.time, "monotonic", lambda: 1.0)
    seen: list[str] = []

    def run(_: object, env: dict[str, str], **options: object) -> object:
        seen.append(env[STARTED])
        raise OSError("enough")

    monkeypatch.setattr(cold.subprocess, "run", run)
    assert {each.reason for each in measured().values()} == {
        "the process that was to infer: enough"
    }
    assert seen == ["1.0"]
