"""Inference: latency, cold start and outputs of every backend, with fakes and for real."""

import copy
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training import ROOT, finish, make_trainer, reset_accelerate, start, tiny_recipe

from bench.measure import backends, batches, comparison, inference
from bench.measure import subject as subject_module
from bench.measure.backends import BACKENDS, Run, Source, compiling_apart, plain
from bench.measure.comparison import (
    EXACT,
    REDUCED,
    Comparison,
    Reference,
    floor_of,
    sample_images,
)
from bench.measure.inference import Trouble, evaluated_module, measure_inference
from bench.measure.outcome import measure_accuracy
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.record import Measurement
from cifar.config import RunConfig
from cifar.errors import UnsupportedError
from cifar.precision import allow_tf32
from cifar.teacher import EVENT

PROTOCOL = Protocol(
    inference_batch_sizes=(1, 8), inference_warmup=1, inference_iterations=4,
    min_timed_seconds=0.0, throughput_seconds=0.01, inference_backends=("exported",),
)  # fmt: skip
CPU = torch.device("cpu")
HAS_ONNX = all(map(importlib.util.find_spec, ("onnxruntime", "onnx", "onnxscript")))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    reset_accelerate()


def make_subject(protocol: Protocol = PROTOCOL, **config: object) -> Subject:
    return Subject(make_trainer(**{"precision": "fp32", **config}), protocol)


def source_of(subject: Subject, **changes: object) -> Source:
    trainer = subject.trainer
    trainer.module.eval()
    source = Source(module=trainer.module, precision="fp32", device=trainer.device)
    return replace(source, **changes)


def fake(change: Callable[[Tensor], Tensor]) -> backends.Factory:
    """The network in eager mode with its logits changed."""

    def factory(source: Source, images: Tensor) -> Run:
        run = plain(source)
        return lambda batch: change(run(batch))

    return factory


def put(monkeypatch: pytest.MonkeyPatch, factory: backends.Factory) -> None:
    monkeypatch.setitem(BACKENDS, "exported", factory)


def find(found: list[Measurement], name: str, **labels: object) -> Measurement:
    (one,) = [
        each
        for each in found
        if each.name == name and {"backend": None, **each.labels}.items() >= labels.items()
    ]
    return one


def test_every_backend_has_its_latency_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, fake(lambda logits: logits))
    found = list(measure_inference(make_subject()))
    for backend in (None, "exported"):
        for size in (1, 8):
            one = find(found, "inference_latency", backend=backend, batch_size=size)
            assert (one.status, len(one.samples[0])) == ("ok", 4)
            busy = find(found, "inference_throughput", backend=backend, batch_size=size)
            assert (busy.status, busy.unit, busy.better) == ("ok", "samples/s", "higher")
            assert busy.labels["samples_per_step"] % size == 0
    assert find(found, "output_agreement", backend="exported").samples == ((1.0,),)
    assert find(found, "output_max_difference", backend="exported").value < 1e-5
    assert find(found, "output_agreement", backend="exported").labels["samples"] == 50
    assert not [each for each in found if each.name == "output_agreement" and not each.labels]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_are_those_that_are_scored(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The moving average, where there is one, in the cell's own backend and in further ones."""
    subject = make_subject(recipe=tiny_recipe(ema_decay=0.5), precision=precision)
    trainer = subject.trainer
    for _ in range(3):
        trainer.train_step()
    kept = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    seen: list[Source] = []

    def watched(source: Source, images: Tensor) -> Run:
        seen.append(source)
        return plain(source)

    for name in ("eager", "exported"):
        monkeypatch.setitem(BACKENDS, name, watched)
    found = list(measure_inference(subject))
    assert trainer.average is not None and len(seen) == 4
    for source in seen:
        for name, tensor in source.module.state_dict().items():
            assert torch.equal(tensor, trainer.average.weights[name])
    assert any(not torch.equal(kept[name], trainer.average.weights[name]) for name in kept)
    assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.weights().items())
    assert find(found, "output_agreement", backend="exported").value >= 0.9
    scored = {each.name: each for each in measure_accuracy(with_budget(subject))}
    assert scored["top1"].labels["weights"] == "average"
    with torch.no_grad():
        test = trainer.dataset.test
        logits = plain(seen[0])(sample_images(trainer, len(test)))
    right = logits.argmax(1) == torch.from_numpy(test.labels)
    assert scored["top1"].value == pytest.approx(right.double().mean().item(), abs=1e-9)


def test_without_an_average_the_last_weights_are_run_and_scored() -> None:
    subject = make_subject(replace(PROTOCOL, inference_backends=()))
    assert evaluated_module(subject.trainer) is subject.trainer.module
    list(measure_inference(subject))
    assert subject.trainer.module.training
    (top1, *_) = measure_accuracy(with_budget(subject))
    assert top1.labels["weights"] == "last"


def with_budget(subject: Subject) -> Subject:
    """With a training budget, without which nothing is scored."""
    return Subject(subject.trainer, replace(subject.protocol, train_samples=96))


def test_the_first_inference_holds_the_build_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 13.0, 13.5])
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(moments))
    started = inference._begin(
        fake(lambda logits: logits), source_of(make_subject()), torch.zeros(2, 3, 16, 16)
    )
    assert (started.build_seconds, started.first_seconds, started.batch_size) == (3.0, 3.5, 2)


def test_the_first_inference_is_told_of_the_first_size(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, fake(lambda logits: logits))
    found = list(measure_inference(make_subject()))
    for backend in (None, "exported"):
        first = find(found, "first_inference", backend=backend)
        build = find(found, "inference_build", backend=backend)
        assert first.unit == "s"
        assert first.labels.items() >= {"batch_size": 1, "after_training": True}.items()
        assert 0 < build.value < first.value


class Goat:
    """A monitor that finds a disturbance in every window, and notes when it watches."""

    watching = False

    def __init__(self, device: torch.device) -> None: ...

    def __enter__(self) -> "Goat":
        Goat.watching = True
        return self

    def __exit__(self, *_: object) -> None:
        Goat.watching = False

    def look(self) -> None: ...

    def report(self) -> tuple[list[Measurement], list[str]]:
        steal = Measurement(name="window_steal", unit="1", better="lower", samples=((1.0,),))
        return [steal], ["a goat"]


def test_what_disturbs_timed_batches_makes_the_record_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject_module, "Monitor", Goat)
    put(monkeypatch, fake(lambda logits: logits))
    subject = make_subject(replace(PROTOCOL, inference_warmup=0))
    found = list(measure_inference(subject))
    assert subject.invalid == [
        f"inference {where}: a goat" for where in ("b1", "b8", "exported b1", "exported b8")
    ]
    assert not [each for each in found if each.name.startswith("window")], "names would clash"


def test_the_timed_batches_alone_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[bool] = []

    def run(images: Tensor) -> Tensor:
        watched.append(Goat.watching)
        return images

    monkeypatch.setattr(subject_module, "Monitor", Goat)
    subject = make_subject(replace(PROTOCOL, inference_warmup=3, throughput_seconds=0.0))
    monkeypatch.setattr(batches, "has_settled", lambda seconds, span: len(seconds) == 4)
    timed = batches.time_batches(run, torch.zeros(2), subject, "here")
    assert watched == [False] * 4 + [True] * 4
    assert len(timed.each) == 4 and subject.invalid == ["here: a goat"]
    assert (timed.row, timed.in_row) == (None, 0)


@pytest.mark.parametrize(
    ("protocol", "seconds", "taken", "settled"),
    [
        # The medians of the last two and of those before: .3 and .1, .15 and .1, .1 and .1.
        ({"inference_warmup": 2}, [0.4, 0.2, 0.1, 0.1, 0.1, 0.1, 9.0], 6, True),
        ({"inference_warmup": 5}, [0.1] * 10 + [9.0], 10, True),
        ({"inference_warmup": 5}, [2.0, 1.0, 1.0, 9.0], 3, True),  # spans of a second hold one
        ({"inference_warmup": 1}, [1.0, 1.0, 9.0], 2, True),
        ({"inference_warmup": 0}, [1.0, 9.0], 1, True),
        ({"inference_warmup": 2}, [0.01 * 2**n for n in range(9)], 5, False),
        ({"inference_warmup": 2, "inference_seconds": 1.0}, [0.2, 0.4, 0.8, 9.0], 3, False),
    ],
)
def test_the_warm_up_ends_when_its_spans_agree_or_at_the_cap(
    monkeypatch: pytest.MonkeyPatch,
    protocol: dict[str, float],
    seconds: list[float],
    taken: int,
    settled: bool,
) -> None:
    told = iter(seconds)
    monkeypatch.setattr(batches, "_seconds_of", lambda *_: next(told))
    chosen = {"inference_seconds": 100.0, "warmup_steps": 1, "max_warmup_steps": 5, **protocol}
    if settled:
        chosen["max_warmup_steps"] = 30
    subject = make_subject(Protocol(**chosen))
    assert batches._warm_up(lambda x: x, torch.zeros(1), subject) == (taken, settled)


def test_batches_that_do_not_settle_make_the_record_invalid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "has_settled", lambda seconds, span: False)
    protocol = replace(PROTOCOL, inference_warmup=1, warmup_steps=1, max_warmup_steps=3)
    subject = make_subject(replace(protocol, inference_backends=(), inference_batch_sizes=(2,)))
    list(measure_inference(subject))
    unsettled = "inference b2: warm-up: batch time had not settled after 3 batches"
    assert subject.invalid[:1] == [unsettled]


def test_the_warm_up_goes_on_until_all_processes_have_settled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process has neither settled nor reached its cap before its third batch.

    The first answer is about the first batch, which alone settles nothing here either.
    """
    others = iter([0, 0, 0, 0, 1])
    mine: list[int] = []

    def agree(count: int, device: torch.device) -> int:
        mine.append(int(count))
        return min(count, next(others))

    monkeypatch.setattr(batches, "least", agree)
    monkeypatch.setattr(batches, "_seconds_of", lambda *_: 1.0)
    subject = make_subject()
    assert batches._warm_up(lambda x: x, torch.zeros(1), subject) == (3, True)
    assert mine == [0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits: -logits, "the same top-1 as fp32 eager on 0.0% of the images, 99% are due"),
        (lambda logits: 1.5 * logits, "a logit differs by"),
        (lambda logits: torch.full_like(logits, math.nan), "wrong outputs"),
    ],
)
def test_a_fast_wrong_backend_is_seen(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    put(monkeypatch, fake(change))
    found = list(measure_inference(make_subject()))
    for size in (1, 8):
        one = find(found, "inference_latency", backend="exported", batch_size=size)
        assert (one.status, one.samples) == ("failed", ())
        assert reason in one.reason
        busy = find(found, "inference_throughput", backend="exported", batch_size=size)
        assert (busy.status, busy.reason) == ("failed", one.reason)
        assert find(found, "inference_latency", backend=None, batch_size=size).status == "ok"


def test_outputs_that_are_not_finite_leave_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, fake(lambda logits: torch.full_like(logits, math.nan)))
    one = find(list(measure_inference(make_subject())), "output_max_difference", backend="exported")
    assert (one.status, one.reason) == ("failed", "wrong outputs: a logit is not finite")


def test_a_backend_that_is_wrong_at_one_size_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, fake(lambda logits: -logits if len(logits) == 8 else logits))
    found = list(measure_inference(make_subject()))
    latency = [find(found, "inference_latency", backend="exported", batch_size=n) for n in (1, 8)]
    assert [each.status for each in latency] == ["ok", "failed"]
    assert find(found, "output_agreement", backend="exported").value == 0.0, "the worst is told"


def test_what_is_missing_is_absent_and_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def missing(source: Source, images: Tensor) -> Run:
        tried.append(len(images))
        raise UnsupportedError("no such package")

    put(monkeypatch, missing)
    found = [e for e in measure_inference(make_subject()) if e.labels.get("backend")]
    assert {(e.name, e.status, e.reason) for e in found} == {
        ("inference_latency", "absent", "no such package"),
        ("inference_throughput", "absent", "no such package"),
    }
    assert (len(found), tried) == (4, [1])


def test_what_breaks_is_failed_with_one_line_and_tried_at_every_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(source: Source, images: Tensor) -> Run:
        if len(images) == 1:
            raise RuntimeError("no \x1b[96mkernel\x1b[0m\nand a long trace")
        return plain(source)

    put(monkeypatch, broken)
    found = list(measure_inference(make_subject()))
    one = find(found, "inference_latency", backend="exported", batch_size=1)
    assert (one.status, one.reason) == ("failed", "RuntimeError: no kernel")
    assert find(found, "inference_latency", backend="exported", batch_size=8).status == "ok"
    assert find(found, "first_inference", backend="exported").labels["batch_size"] == 8


def test_what_breaks_the_cells_own_backend_breaks_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Source, images: Tensor) -> Run:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(BACKENDS, "eager", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        list(measure_inference(make_subject()))


def test_trouble_in_another_process_stops_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject()
    source = source_of(subject)
    candidate = inference.Candidate(
        subject, source, "exported", Reference(subject.trainer, source), backend="exported"
    )
    monkeypatch.setattr(inference, "least", lambda code, device: min(code, 0))
    assert candidate._agree(None) == Trouble(status="absent", reason="absent in another process")
    mine = Trouble(status="absent", reason="mine")
    assert candidate._agree(mine) == mine
    monkeypatch.setattr(inference, "least", lambda code, device: code)
    assert candidate._agree(None) is None


def test_a_cell_that_trains_compiled_measures_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "compiled", fake(lambda logits: logits))
    monkeypatch.setattr("cifar.accelerator.check_compiler", lambda _: None)
    protocol = replace(PROTOCOL, inference_backends=("compiled",))
    found = list(measure_inference(make_subject(protocol, compile=True)))
    assert {each.labels.get("backend") for each in found} == {None}
    assert len([each for each in found if each.name == "inference_latency"]) == 2
    assert find(found, "output_agreement").value == 1.0


def test_bf16_eager_tells_its_difference_from_fp32() -> None:
    subject = make_subject(replace(PROTOCOL, inference_backends=()), precision="bf16")
    found = list(measure_inference(subject))
    difference = find(found, "output_max_difference").value
    trainer = subject.trainer
    trainer.module.eval()
    with torch.inference_mode():
        images = sample_images(trainer, 50)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = type(trainer.module).forward(trainer.module, images).float()
        exact = type(trainer.module).forward(trainer.module, images)
    assert difference == (rounded - exact).abs().max().item()
    assert difference > 0


def test_a_backend_that_lost_its_reduced_precision_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No hook sees into a shared library; its outputs are too good."""

    def forgetful(source: Source, images: Tensor) -> Run:
        return plain(replace(source, precision="fp32"))

    put(monkeypatch, forgetful)
    found = list(measure_inference(make_subject(precision="bf16")))
    for size in (1, 8):
        one = find(found, "inference_latency", backend="exported", batch_size=size)
        assert one.status == "failed"
        assert "computes fp32 where bf16 was asked" in one.reason
        assert find(found, "inference_latency", backend=None, batch_size=size).status == "ok"


@pytest.mark.parametrize(
    ("precision", "difference", "reduced"),
    [
        ("fp32", 0.0, True),
        ("tf32", 0.0, True),
        ("bf16", 3e-4, True),
        ("bf16", 1e-4, False),
        ("fp16", 0.0, False),
    ],
)
def test_what_counts_as_not_reduced(precision: str, difference: float, reduced: bool) -> None:
    result = Comparison(difference=2 * difference, agreement=1.0, scale=2.0)
    assert (comparison.not_reduced(result, precision) == "") is reduced


def test_comparison_by_hand() -> None:
    reference = torch.tensor([[1.0, -2.0], [0.0, 4.0], [3.0, 1.0], [0.5, 0.0]])
    logits = torch.tensor([[1.0, -2.5], [0.0, 4.0], [3.0, 1.0], [-0.25, 0.0]])
    result = Comparison.of(logits, reference)
    assert (result.difference, result.agreement, result.scale) == (0.75, 0.75, 4.0)


@pytest.mark.parametrize(
    ("precision", "agreement", "difference", "wrong"),
    [
        ("fp32", 0.99, 1e-4, False),
        ("fp32", 0.98, 0.0, True),
        ("fp32", 1.0, 2e-4, True),
        ("bf16", 0.9, 0.25, False),
        ("tf32", 0.9, 0.02, False),
        ("fp16", 0.89, 0.0, True),
        ("bf16", 1.0, 0.3, True),
    ],
)
def test_the_floor_depends_on_the_precision(
    precision: str, agreement: float, difference: float, wrong: bool
) -> None:
    result = Comparison(difference=2 * difference, agreement=agreement, scale=2.0)
    assert bool(result.fault(floor_of(precision))) == wrong


def rounded_to_tf32(numbers: Tensor) -> Tensor:
    """To ten bits of mantissa, as TensorFloat-32 keeps of an fp32 operand."""
    bits = numbers.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_tf32_behind_an_fp32_name_is_found_out() -> None:
    subject = make_subject()
    with torch.inference_mode():
        reference = Reference(subject.trainer, source_of(subject))
        network = copy.deepcopy(source_of(subject).module)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.data = rounded_to_tf32(layer.weight.data)
                layer.register_forward_pre_hook(lambda _, inputs: (rounded_to_tf32(inputs[0]),))
        comparison = reference.compare(network, 8)
        floor = reference.floor(comparison, "fp32", 8)
    assert comparison.difference > 0
    assert "a logit differs by" in comparison.fault(floor)
    assert floor == EXACT, "eager fp32 shows no such difference"
    assert comparison.fault(floor_of("tf32")) == ""


def test_fp32_may_be_off_twice_as_far_as_eager_is_at_its_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, whose library takes another algorithm for another batch size."""
    reference = Reference(make_subject().trainer, source_of(make_subject()))
    reference.logits = torch.tensor([[8.0, 0.0]]).expand(50, 2)
    asked: list[int] = []

    def exact(images: Tensor) -> Tensor:
        asked.append(len(images))
        return torch.tensor([[8.0 + 2**-7 * (len(images) == 8), 0.0]]).expand(len(images), 2)

    monkeypatch.setattr(reference, "exact", exact)
    near, far = (Comparison(difference=d, agreement=1.0, scale=8.0) for d in (8e-4, 0.02))
    assert reference.floor(near, "fp32", 8) == EXACT
    assert reference.floor(far, "bf16", 8) == REDUCED
    assert asked == [], "measured where it matters"
    floor = reference.floor(far, "fp32", 8)
    assert (floor.agreement, floor.difference) == (0.99, 2 * 2**-10)
    assert reference.floor(far, "fp32", 8) == floor
    assert asked == [8] * 7, "once for a size"
    assert reference.floor(far, "fp32", 25) == EXACT, "never less"
    assert asked[7:] == [25] * 2


def test_a_reference_that_is_not_finite_allows_no_more() -> None:
    reference = Reference(make_subject().trainer, source_of(make_subject()))
    reference.logits = torch.full((50, 10), math.nan)
    found = Comparison(difference=math.nan, agreement=1.0, scale=1.0)
    assert reference.floor(found, "fp32", 50) == EXACT


def test_inference_in_another_format_than_asked_has_failed() -> None:
    subject = make_subject(replace(PROTOCOL, inference_backends=()))
    for layer in subject.trainer.module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, inputs: (inputs[0].to(memory_format=torch.channels_last),)
            )
    found = [each for each in measure_inference(subject) if each.name == "inference_latency"]
    assert len(found) == len(PROTOCOL.inference_batch_sizes)
    for each in found:
        assert each.status == "failed"
        assert each.reason == "input_channels_last: True where False was asked"


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo without a code generator, in any mode."""
    real = torch.compile
    for module in (backends, "cifar.accelerator"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.check_compiler", lambda _: None)
    monkeypatch.setattr("cifar.accelerator.check_compile_mode", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda m, mode, **o: real(m, backend="eager", **o))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def replayed(source: Source, images: Tensor) -> Run:
    """Compiled code that is run as it is twice, the second time recorded, then replayed.

    What a replay returns calls no kernel by name.
    """
    run, calls = backends.compiled(source, images), []
    kept: dict[int, Tensor] = {}

    def replay(batch: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) <= 2:
            return run(batch)
        key = hash(batch.cpu().numpy().tobytes())
        if key not in kept:  # what a graph computes, out of the profiler's sight
            with torch.profiler.record_function(EVENT):
                kept[key] = run(batch).clone()
        return kept[key]

    return replay


def unseen(subject: Subject) -> list[str]:
    return [each for each in subject.invalid if "not seen" in each]


COMPILED = replace(PROTOCOL, inference_backends=("compiled",), inference_batch_sizes=(8,))


@pytest.mark.usefixtures("quick_compiler")
def test_formats_in_cuda_graphs_are_seen_as_they_are_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "compiled", replayed)

    def subject_in(mode: str, precision: str) -> Subject:
        reset_accelerate()
        return make_subject(COMPILED, compile=True, compile_mode=mode, precision=precision)

    for precision in ("fp32", "bf16"):
        subject = subject_in("reduce-overhead", precision)
        latency = find(list(measure_inference(subject)), "inference_latency", batch_size=8)
        assert (latency.status, unseen(subject)) == ("ok", [])
    subject = subject_in("default", "fp32")  # in which nobody expects a graph
    list(measure_inference(subject))
    assert unseen(subject) == [
        f"inference b8: {name} of a convolution was not seen in the compiled code"
        for name in ("input_dtype", "weight_dtype")
    ]


@pytest.mark.usefixtures("quick_compiler")
def test_another_format_in_a_cuda_graph_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 where bf16 was asked: the logits agree, so nothing else tells."""
    monkeypatch.setitem(
        BACKENDS,
        "compiled",
        lambda source, images: replayed(replace(source, precision="fp32"), images),
    )
    subject = make_subject(COMPILED, compile=True, compile_mode="reduce-overhead", precision="bf16")
    latency = find(list(measure_inference(subject)), "inference_latency", batch_size=8)
    assert (latency.status, latency.reason) == (
        "failed",
        "input_dtype: float32 where bfloat16 was asked; "
        "weight_dtype: float32 where bfloat16 was asked",
    )


@pytest.mark.usefixtures("quick_compiler")
def test_cuda_graphs_that_are_skipped_in_inference_have_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def skipping(source: Source, images: Tensor) -> Run:
        counters["inductor"]["cudagraph_skips"] += 1
        return backends.compiled(source, images)

    monkeypatch.setitem(BACKENDS, "compiled", skipping)
    subject = make_subject(COMPILED, compile=True, compile_mode="reduce-overhead")
    latency = find(list(measure_inference(subject)), "inference_latency", batch_size=8)
    assert (latency.status, latency.reason) == (
        "failed",
        "compile_mode: CUDA graphs skipped 1 times: reduce-overhead was asked",
    )


def test_the_same_images_are_compared_at_every_size() -> None:
    subject = make_subject()
    seen: list[Tensor] = []
    with torch.inference_mode():
        reference = Reference(subject.trainer, source_of(subject))
        run = plain(source_of(subject))

        def watched(images: Tensor) -> Tensor:
            seen.append(images)
            return run(images)

        assert reference.compare(watched, 8).difference < 1e-5
    assert [len(each) for each in seen] == [8] * 7
    assert torch.equal(torch.cat(seen)[:50], sample_images(subject.trainer, 50))
    assert torch.equal(seen[-1][2], seen[0][0]), "after the last image comes the first"


def test_a_large_test_split_is_compared_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "COMPARED_SAMPLES", 20)
    subject = make_subject()
    reference = Reference(subject.trainer, source_of(subject))
    assert reference.samples == len(reference.logits) == 20


def test_the_reference_is_fp32_without_tf32() -> None:
    subject = make_subject(precision="bf16")
    subject.trainer.config = replace(subject.trainer.config, precision="tf32")
    allow_tf32(True)
    seen: list[tuple[torch.dtype, bool]] = []
    inner = next(m for m in subject.trainer.module.modules() if isinstance(m, nn.Conv2d))
    inner.register_forward_hook(
        lambda _m, _i, out: seen.append((out.dtype, torch.backends.cudnn.allow_tf32))
    )
    Reference(subject.trainer, source_of(subject, precision="bf16")).logits  # noqa: B018
    assert seen == [(torch.float32, False)]
    assert torch.backends.cudnn.allow_tf32 is True
    allow_tf32(False)


def test_the_plain_network_has_the_same_weights_and_no_wrapper() -> None:
    subject = make_subject(precision="bf16")
    module = subject.trainer.module
    assert "forward" in module.__dict__, "Accelerate wraps it"
    source = source_of(subject)
    exact, rounded = plain(source), plain(replace(source, precision="bf16"))
    assert "forward" not in exact.__dict__ and "forward" in module.__dict__
    assert [p.data_ptr() for p in exact.parameters()] == [
        p.data_ptr() for p in rounded.parameters()
    ]
    images = sample_images(subject.trainer, 4)
    with torch.no_grad():
        assert torch.equal(rounded(images), module(images))
        assert not torch.equal(exact(images), module(images))
        assert rounded(images).dtype == torch.float32


def test_more_shapes_than_torch_keeps_are_compiled_and_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default torch goes on in eager mode after 8 shapes of the same code."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(1)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, mode, **o: real(m, backend=count, **o))
    monkeypatch.setattr(backends, "check_compiler", lambda _: None)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    source = Source(module=net, precision="fp32", device=CPU)
    before = counters["stats"]["unique_graphs"]
    with torch.inference_mode(), compiling_apart():
        for size in range(2, 13):
            images = torch.ones(size, 3, 2, 2)
            run = BACKENDS["compiled"](source, images)
            assert torch.allclose(run(images), net(images))
    assert len(graphs) == 11
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("name", ["compiled", "exported"])
def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    protocol = replace(PROTOCOL, inference_backends=(name,))
    found = [e for e in measure_inference(make_subject(protocol)) if e.labels.get("backend")]
    assert {each.status for each in found} == {"absent"}
    assert "no-such-compiler" in found[0].reason


def test_onnxruntime_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "onnx" or None)
    with pytest.raises(
        UnsupportedError, match=r"^inference-backends: .*: onnx is not installed; install it$"
    ):
        BACKENDS["onnxruntime"](source_of(make_subject()), torch.zeros(1, 3, 16, 16))


def test_onnxruntime_refuses_a_reduced_precision() -> None:
    source = source_of(make_subject(), precision="bf16")
    with pytest.raises(UnsupportedError, match="precision: 'bf16'"):
        BACKENDS["onnxruntime"](source, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1")])
def test_onnxruntime_on_a_gpu_uses_tf32_only_if_asked(precision: str, tf32: str) -> None:
    source = Source(module=nn.Identity(), precision=precision, device=torch.device("cuda", 1))
    assert backends._provider(source) == (
        "CUDAExecutionProvider",
        {"device_id": "1", "use_tf32": tf32},
    )


def test_cold_caches_are_empty_and_leave_nothing() -> None:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with backends.cold_caches():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert list(folder.iterdir()) == []
    assert not folder.exists()
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


ONE_SIDED = """
import sys
from training import make_trainer
from bench.measure import backends
from bench.measure.inference import measure_inference
from bench.measure.subject import Subject
from bench.protocol import Protocol
from cifar.distributed import leave

def measure():
    trainer = make_trainer(precision="fp32")
    second = trainer.place.index == 1

    def factory(source, images):
        if second and len(images) == 1:
            raise RuntimeError("only here")
        run = backends.plain(source)
        return lambda batch: -run(batch) if second and len(images) == 2 else run(batch)

    backends.BACKENDS["exported"] = factory
    protocol = Protocol(
        inference_batch_sizes=(1, 2, 4), inference_iterations=3, inference_backends=("exported",)
    )
    for each in measure_inference(Subject(trainer, protocol)):
        if not second and each.labels.get("backend") and each.name == "inference_latency":
            print(each.labels["batch_size"], each.status, len(each.samples), each.reason)

measure()
leave()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_one_process_alone_meets_keeps_both_together(tmp_path: Path) -> None:
    program = tmp_path / "one_sided.py"
    program.write_text(ONE_SIDED)
    config = ROOT / "launch" / "ddp.yaml"
    process = start(
        "accelerate.commands.launch", "--config_file", config, "--num_processes", 2,
        "--main_process_port", 0, "--mixed_precision", "no", program,
        environment={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )  # fmt: skip
    code, out, err = finish(process)
    assert code == 0, err
    assert out.splitlines() == [
        "1 failed 0 failed in another process",
        "2 failed 0 failed in another process",
        "4 ok 2 ",
    ]


def check_for_real(name: str, precision: str) -> None:
    """Twice, because the second build finds other caches than the first, cold one."""
    protocol = replace(PROTOCOL, inference_batch_sizes=(1, 2), inference_backends=(name,))
    subject = make_subject(protocol, precision=precision, recipe=tiny_recipe(ema_decay=0.5))
    found = list(measure_inference(subject))
    mine = [each for each in found if each.labels.get("backend") == name]
    assert {(each.status, each.reason) for each in mine} == {("ok", "")}
    assert [each.name for each in mine] == [
        *["inference_latency", "inference_throughput"] * 2, "first_inference", "inference_build",
        "output_max_difference", "output_agreement",
    ]  # fmt: skip
    assert find(mine, "output_agreement").value >= (0.99 if precision == "fp32" else 0.9)
    assert 0 < find(mine, "output_max_difference").value < 0.1


@pytest.mark.skipif(not HAS_ONNX, reason="onnxruntime, onnx or onnxscript is not installed")
def test_onnxruntime_runs_for_real() -> None:
    check_for_real("onnxruntime", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["compiled", "exported"])
def test_compilers_run_for_real(name: str, precision: str) -> None:
    check_for_real(name, precision)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["compiled", "exported"])
def test_compilers_run_on_a_gpu(name: str, precision: str) -> None:
    protocol = replace(PROTOCOL, inference_batch_sizes=(1, 8), inference_backends=(name,))
    trainer = make_trainer(run=RunConfig(), precision=precision)
    found = list(measure_inference(Subject(trainer, protocol)))
    mine = [each for each in found if each.labels.get("backend") == name]
    if mine[0].status == "absent":
        pytest.skip(mine[0].reason)
    assert {(each.status, each.reason) for each in mine} == {("ok", "")}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_inference_in_cuda_graphs_is_proven_on_a_gpu(mode: str) -> None:
    trainer = make_trainer(
        run=RunConfig(), precision="bf16", compile=True, compile_mode=mode, channels_last=True
    )
    subject = Subject(trainer, replace(PROTOCOL, inference_backends=()))
    found = list(measure_inference(subject))
    latencies = [each for each in found if each.name == "inference_latency"]
    assert {(each.status, each.reason) for each in latencies} == {("ok", "")}
    assert unseen(subject) == []
