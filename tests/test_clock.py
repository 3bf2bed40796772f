"""Clocks by hand, with events and a device that are pretended; for real on a GPU."""

import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import make_trainer, never_waiting

from bench.measure import batches, clock
from bench.measure.clock import CudaClock, HostClock, make_clock, seconds_of, timed
from bench.measure.inference import measure_inference
from bench.measure.subject import Subject
from bench.protocol import Protocol
from cifar.config import RunConfig

GPU = torch.device("cuda")


class FakeGpu:
    """A device that works on while the program goes on; both keep their own time in seconds."""

    def __init__(self) -> None:
        self.program, self.stream = 0.0, 0.0

    def launch(self, seconds: float, cost: float = 0.001) -> None:
        """Work of so many seconds for the stream, which the program needs `cost` to hand over."""
        self.program += cost
        self.stream = max(self.stream, self.program) + seconds

    def synchronize(self, _device: object = None) -> None:
        self.program = max(self.program, self.stream)

    def event(self, *, enable_timing: bool) -> "FakeEvent":
        assert enable_timing, "no other events tell a time"
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.moment = gpu, -1.0

    def record(self) -> None:
        self.moment = max(self.gpu.stream, self.gpu.program)

    def synchronize(self) -> None:
        self.gpu.program = max(self.gpu.program, self.moment)

    def elapsed_time(self, later: "FakeEvent") -> float:
        """Milliseconds; of events that lie ahead an error, as with CUDA."""
        assert later.moment <= self.gpu.program, "not reached yet"
        return 1000 * (later.moment - self.moment)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    cuda = SimpleNamespace(Event=fake.event, synchronize=fake.synchronize)
    monkeypatch.setattr(clock, "torch", SimpleNamespace(cuda=cuda))
    told = SimpleNamespace(perf_counter=lambda: fake.program)
    for module in (clock, batches):
        monkeypatch.setattr(module, "time", told)
    return fake


def test_the_clock_is_the_device_s() -> None:
    assert isinstance(make_clock(GPU), CudaClock)
    assert isinstance(make_clock(torch.device("cpu")), HostClock)


def test_events_tell_seconds_of_the_stream_and_the_last_one_is_waited_for(gpu: FakeGpu) -> None:
    cuda = CudaClock()
    cuda.mark()
    for seconds in (0.5, 2.0):
        gpu.launch(seconds)
        cuda.mark()
    assert gpu.program == 0.002, "nothing has been waited for"
    assert cuda.seconds() == pytest.approx([0.501, 2.0])
    assert gpu.program == pytest.approx(2.501)


def test_timed_work_is_launched_without_waiting_in_between(gpu: FakeGpu) -> None:
    ahead: list[float] = []

    def work() -> None:
        gpu.launch(0.25)
        ahead.append(gpu.stream - gpu.program)

    assert timed(CudaClock(), work, 4) == pytest.approx([0.251, 0.25, 0.25, 0.25])
    assert ahead == pytest.approx([0.25, 0.499, 0.748, 0.997])


def test_a_batch_that_is_waited_for_takes_as_long_as_the_device_needs(gpu: FakeGpu) -> None:
    def run(images: torch.Tensor) -> torch.Tensor:
        gpu.launch(0.5)
        return images

    images = torch.zeros(1)
    assert batches._seconds_of(run, images, GPU) == pytest.approx(0.501)
    assert batches._seconds_of(run, images, GPU) == pytest.approx(0.501)


def test_work_that_is_waited_for_starts_on_an_idle_device(gpu: FakeGpu) -> None:
    gpu.launch(9.0)
    assert seconds_of(lambda: gpu.launch(0.5), GPU) == pytest.approx(0.501)


def waiting_subject(**protocol: float) -> Any:
    return SimpleNamespace(device=GPU, protocol=Protocol(**protocol))


@pytest.mark.parametrize(
    ("protocol", "count"),
    [
        ({"inference_iterations": 3, "min_timed_seconds": 0.0}, 3),
        ({"inference_iterations": 3, "min_timed_seconds": 2.0}, 8),
        ({"inference_iterations": 9, "min_timed_seconds": 2.0}, 9),
        ({"inference_iterations": 9, "inference_seconds": 1.6}, 7),
        ({"inference_iterations": 9, "inference_seconds": 0.1}, 3),
    ],
)
def test_batches_fill_the_least_seconds_within_the_most(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, protocol: dict[str, float], count: int
) -> None:
    """Of a quarter of a second each."""
    work, images = lambda _: gpu.launch(0.25, cost=0.0), torch.zeros(1)
    seconds = batches._one_by_one(work, images, waiting_subject(**protocol))
    assert seconds == [0.25] * count


def test_short_batches_are_no_more_than_a_record_keeps(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MOST_FILLING", 5)
    work, images = lambda _: gpu.launch(2**-10, cost=0.0), torch.zeros(1)
    for least, count in ((3, 5), (8, 8)):
        subject = waiting_subject(inference_iterations=least)
        assert len(batches._one_by_one(work, images, subject)) == count


def test_a_busy_gpu_s_batches_take_no_launching(gpu: FakeGpu) -> None:
    """Each takes 1 ms to launch and 4 ms to compute, so 5 ms where it is waited for."""
    gpu.launch(9.0)

    def run(images: torch.Tensor) -> torch.Tensor:
        gpu.launch(0.004)
        return images

    told: list[float] = []
    row = batches._in_a_row(
        run, torch.zeros(1), 10, GPU, lambda: told.append(gpu.stream - gpu.program)
    )
    assert told[0] > 0.02, "looked at while it works"
    assert row == pytest.approx(0.001 + 10 * 0.004)
    assert batches._seconds_of(run, torch.zeros(1), GPU) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("device", "seconds", "each", "count"),
    [
        ("cuda", 0.5, [0.9, 0.01, 0.01], 50),
        ("cuda", 0.5, [1.0], 10),
        ("cpu", 0.5, [0.2, 0.2, 0.7], 3),
        ("cpu", 0.5, [9.0], 1),
        ("cuda", 0.0, [1.0], 0),
    ],
)
def test_batches_in_a_row_fill_their_seconds_at_the_pace_of_those_before(
    monkeypatch: pytest.MonkeyPatch, device: str, seconds: float, each: list[float], count: int
) -> None:
    monkeypatch.setattr(batches, "least", lambda mine, _: mine)
    subject = SimpleNamespace(
        device=torch.device(device), protocol=Protocol(throughput_seconds=seconds)
    )
    assert batches._fitting(each, subject) == count


@pytest.mark.gpu
def test_a_busy_gpu_infers_no_less_than_one_that_is_waited_for() -> None:
    """At batch 1 a small network's kernels are shorter than their launches."""
    trainer = make_trainer(run=RunConfig(), precision="fp32")
    protocol = Protocol(inference_batch_sizes=(1, 64))
    found = {
        (each.name, each.labels.get("batch_size")): each.value
        for each in measure_inference(Subject(trainer, protocol))
    }
    for size in (1, 64):
        busy, waited = found["inference_throughput", size], found["inference_latency", size]
        assert busy > 0.9 / waited


@pytest.mark.gpu
def test_the_clock_and_the_waiting_agree_with_wall_time() -> None:
    """Products that keep the device busy for a tenth of a second and more."""
    matrix = torch.randn(8192, 8192, device=GPU)

    def work(_: object = None) -> torch.Tensor:
        for _ in range(20):
            torch.mm(matrix, matrix)
        return matrix

    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    by_events = timed(CudaClock(), work, 5)
    wall = time.perf_counter() - start
    waited = [batches._seconds_of(work, matrix, GPU) for _ in range(5)]
    assert sum(by_events) == pytest.approx(wall, rel=0.05)
    assert sum(waited) == pytest.approx(wall, rel=0.2), "clocks rise and fall"


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that are set; each change is made, and then warned of, as torch does."""
    taken: list[str] = []

    def change(mode: str) -> None:
        taken.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", change)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return taken


def test_to_wait_is_an_error_within_the_block_alone(modes: list[str]) -> None:
    with never_waiting():
        assert modes == ["error"]
    assert modes == ["error", "default"]


def test_the_mode_is_set_back_where_the_block_breaks_down(modes: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), never_waiting():
        1 / 0  # noqa: B018 - raises
    assert modes == ["error", "default"]
