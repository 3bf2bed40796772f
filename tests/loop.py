"""What bench reports against a loop written by hand, against timm's way, and without its marks.

    python tests/loop.py agree --model resnet20
    python tests/loop.py timm --model resnet18 --precision bf16 --channels-last
    python tests/loop.py cost --model resnet20
    python tests/loop.py agree --all

Contestants take turns in random order in one process, a window of a few steps each after one step
that is not timed. Printed are ratios of their seconds per sample, `above/below`: the median over
rounds and its exact 95 % interval; a line of JSON per part as soon as it is known. So 1.01 for
same_input/bench means that bench reports a throughput 1 % above the loop's. Rounds end at --pairs,
or once the ratio that matters and that of the control (a contestant against itself) are known to
within 1 %: looked at after 10, 20, 40, ... rounds, as a look after each would stop at the interval
that is narrow by chance; stderr tells what is seen then. Windows of a GPU are longer and follow a
warm-up, for bench lets it come to rest and empties its memory before; `bench_long` is bench with
windows twice as long, which would be faster if any of that were left in them.

The trainer's recipe is `sgd` at a small, constant learning rate and without its average of the
weights, which no loop here keeps; overhead.py tells what that average costs.

agree: `training` and `inference_loop` below, 40 lines at most, fused SGD as in the trainer.
    same_input    the loop on the trainer's own input pipeline: the same work, so it must agree
    loop          the median seconds per image of batches that are each waited for
  A CPU's first steps after something else are slower, by page faults and by threads that must wake
  up, and bench reads counters and observes a step before its window: short windows show bench too
  slow, as the few steps of no suite would.
input: what bench reports beside the same loop with less to do.
    plain_input   the loop on uint8 images that it indexes and normalises but does not augment
    fixed_batch   the loop on one batch that is there already: no input at all
  So same_input/plain_input is what augmentation costs, same_input/fixed_batch what all input does.
timm: benchmark.py of huggingface/pytorch-image-models: 10 warm-ups, then 40 steps on one random
  batch, targets drawn in the step, the device waited for after each; the mean. Its
  `samples_per_sec`, taken here, is over the whole run; its `step_time` leaves out clearing the
  gradients. It differs from bench by: no input (same_input/fixed_batch is what that takes); SGD
  that is not fused (slower for small models); on a GPU the wait, which idles it until the next step
  is launched; in inference the mean, which slow batches pull up, where bench reports the median.
  timm/fixed_batch tells what is left when neither has any input.
cost: windows of the same trainer's steps, measured by bench (`bench`), and with no mark but at
  their ends (`unmarked`). bench/unmarked is to stay below 1.01.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from cifar.process import ensure_environment

if __name__ == "__main__":
    ensure_environment()  # before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Interval, Taken, is_known, ratio, take_turns

from bench.measure.inference import measure_inference
from bench.measure.subject import Subject
from bench.measure.training import measure_training
from bench.protocol import Protocol
from bench.spec import grid
from cifar.config import RunConfig
from cifar.data.loader import Batch, DeviceImages
from cifar.data.sources import load_dataset
from cifar.models import build_model
from cifar.precision import is_emulated
from cifar.trainer import Trainer

MODELS, PRECISIONS, LAYOUTS = ("resnet18", "resnet20"), ("fp32", "bf16"), (False, True)
WITHIN = 0.01
"""How far the 95 % intervals of the ratios that matter may reach."""
FIRST_LOOK = 10
"""Rounds after which the ratios are looked at for the first time; then whenever these double."""
SIZES = {
    "cpu": {"batch_size": 64, "inference_batch_size": 64, "steps": 16},
    "cuda": {"batch_size": 64, "inference_batch_size": 128, "steps": 200},
}
"""Of training, of inference, and of a window in timed steps, by device."""
SIZES_ON_A_CPU = {"resnet18": {"batch_size": 8, "inference_batch_size": 16, "steps": 8}}
"""Those of a model whose steps are long."""
LATENCIES = {"cpu": (20, 3), "cuda": (200, 50)}
"""Batches of a window of inference: of single images, and of large batches. Before those of the
loop come half as many that are not timed, since bench observes some before its own: a CPU's first
ones are slower."""
WARM_UP = {"cpu": 2, "cuda": 20}
"""Steps of a loop that are not timed, before each window."""
Batches = Iterator[tuple[Tensor, Tensor]]
Contestants = dict[str, Callable[[], float]]
Parts = Iterator[tuple[str, dict[str, object]]]
"""What a mode found, one part after the other by name."""


def training(model: nn.Module, batches: Batches, bf16: bool) -> Callable[[int], float]:
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )

    def loop(steps: int) -> float:
        model.train()
        wait(device)
        start = time.perf_counter()
        for images, labels in itertools.islice(batches, steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        wait(device)
        return (time.perf_counter() - start) / steps

    return loop


@torch.inference_mode()
def inference_loop(model: nn.Module, images: Tensor, bf16: bool, batches: int) -> float:
    model.eval()
    seconds = []
    for _ in range(batches):
        start = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            model(images)
        wait(images.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / len(images)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Contest:
    """The trainer that bench measures, and models like its own for the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        (cell,) = grid(
            [args.model],
            [args.precision],
            channels_last=[args.channels_last],
            batch_sizes=[args.batch_size],
        )
        recipe = dataclasses.replace(
            cell.train.recipe, lr=1e-4, schedule="constant", ema_decay=0.0, label_smoothing=0.0
        )
        self.config = dataclasses.replace(cell.train, recipe=recipe)
        self.trainer = Trainer(
            self.config, RunConfig(), load_dataset(self.config.data), train_samples=10**9
        )
        self.warm_up = WARM_UP[self.trainer.device.type]
        self.bf16 = args.precision == "bf16"
        self.size = args.batch_size

    def model(self) -> nn.Module:
        model = build_model(self.trainer.model_config).to(self.trainer.device)
        return model.to(memory_format=torch.channels_last) if self.config.channels_last else model

    def bench_training(self, steps: int) -> float:
        """Seconds per sample of a window, from the throughput that bench reports.

        Its own warm-up, on a GPU, is that of a cell.
        """
        self.trainer.module.train()
        on_gpu = self.trainer.device.type == "cuda"
        protocol = Protocol(
            warmup_steps=5 if on_gpu else 0, timed_steps=steps, min_timed_seconds=0.0
        )
        found = {each.name: each for each in measure_training(Subject(self.trainer, protocol))}
        return 1 / value(found["train_throughput"].value)

    def bench_inference(self, size: int, batches: int) -> float:
        """Seconds per sample that bench reports."""
        protocol = Protocol(
            inference_batch_sizes=(size,),
            inference_warmup=1,
            inference_iterations=batches,
            inference_seconds=1e6,
            min_timed_seconds=0.0,
            throughput_seconds=0.0,
        )
        found = {each.name: each for each in measure_inference(Subject(self.trainer, protocol))}
        return value(found["inference_latency"].value)

    def unmarked(self, steps: int) -> float:
        """Seconds per sample of the trainer's steps with a clock at either end."""
        self.trainer.module.train()
        for _ in range(self.warm_up):
            self.trainer.train_step()
        wait(self.trainer.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step()
        wait(self.trainer.device)
        self.trainer.check()
        return (time.perf_counter() - start) / steps / self.size

    def looped(self, batches: Batches, steps: int) -> Callable[[], float]:
        """A window of the hand-written loop in seconds per sample, after steps that warm up."""
        loop = training(self.model(), batches, self.bf16)

        def window() -> float:
            loop(self.warm_up)
            return loop(steps) / self.size

        return window

    def same_input(self) -> Batches:
        loader = self.trainer.loader
        while True:
            for position in range(loader.steps_per_epoch):
                yield from map(pair, loader.micro_batches(position))

    def plain_input(self) -> Batches:
        trainer = self.trainer
        images = DeviceImages(
            trainer.dataset.train,
            trainer.normalization,
            trainer.device,
            channels_last=self.config.channels_last,
        )
        while True:
            order = torch.randperm(len(images), device=trainer.device)
            for samples in order.split(self.size)[: trainer.loader.steps_per_epoch]:
                yield pair(images.batch(samples))

    def fixed_batch(self) -> Batches:
        return itertools.repeat(next(self.same_input()))

    def test_images(self, size: int) -> Tensor:
        samples = torch.arange(size, device=self.trainer.device) % len(self.trainer.test_images)
        return self.trainer.test_images.batch(samples).images


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.images, batch.targets


def value(number: float | None) -> float:
    assert number is not None
    return number


def compete(
    contestants: Contestants, rounds: int, decisive: tuple[str, ...], further: tuple[str, ...] = ()
) -> dict[str, object]:
    """The ratios that are named `above/below`; rounds end when the decisive ones are known."""
    for run in contestants.values():
        run()

    def find(name: str, taken: Taken) -> Interval:
        above, below = name.split("/")
        return ratio(taken[above], taken[below])

    def known(taken: Taken) -> bool:
        intervals = {name: find(name, taken) for name in decisive}
        told = [f"{name} {m:.3f} [{a:.3f}, {b:.3f}]" for name, (m, a, b) in intervals.items()]
        print(f"{len(taken['bench'])} rounds:", *told, file=sys.stderr, flush=True)
        return all(is_known(each, WITHIN) for each in intervals.values())

    taken = take_turns(
        contestants, rounds, lambda taken: is_look(len(taken["bench"])) and known(taken)
    )
    return {
        "rounds": len(taken["bench"]),
        "known_within_1_percent": known(taken),
        "bench_ms_per_sample": 1e3 * statistics.median(taken["bench"]),
        **{name: find(name, taken) for name in (*decisive, *further)},
    }


def is_look(rounds: int) -> bool:
    """Whether the ratios are looked at after so many rounds: 10, 20, 40, ..."""
    times, rest = divmod(rounds, FIRST_LOOK)
    return times > 0 and rest == 0 and times & (times - 1) == 0


def agree(contest: Contest, args: argparse.Namespace) -> Parts:
    steps = args.steps
    contestants = {
        "bench": lambda: contest.bench_training(steps),
        "same_input": contest.looped(contest.same_input(), steps),
        "control": contest.looped(contest.same_input(), steps),
    }
    decisive: tuple[str, ...] = ("same_input/bench", "control/same_input")
    device = contest.trainer.device.type
    if device == "cuda":
        contestants["bench_long"] = lambda: contest.bench_training(2 * steps)
        decisive = (*decisive, "bench_long/bench")
    yield "train", compete(contestants, args.pairs, decisive)
    for size, batches in zip((1, args.inference_batch_size), LATENCIES[device], strict=True):
        contestants = latency_contestants(contest, size, batches)
        decisive = ("loop/bench", "control/loop")
        yield f"latency_b{size}", compete(contestants, args.pairs, decisive)


def inputs(contest: Contest, args: argparse.Namespace) -> Parts:
    batches = {
        "same_input": contest.same_input(),
        "control": contest.same_input(),
        "plain_input": contest.plain_input(),
        "fixed_batch": contest.fixed_batch(),
    }
    contestants = {name: contest.looped(each, args.steps) for name, each in batches.items()}
    contestants["bench"] = lambda: contest.bench_training(args.steps)
    decisive = ("same_input/plain_input", "same_input/fixed_batch", "control/same_input")
    further = ("plain_input/bench", "fixed_batch/bench")
    yield "train", compete(contestants, args.pairs, decisive, further)


def latency_contestants(contest: Contest, size: int, batches: int) -> Contestants:
    images = contest.test_images(size)

    def looped() -> Callable[[], float]:
        model = contest.model()

        def window() -> float:
            inference_loop(model, images, contest.bf16, -(-batches // 2))
            return inference_loop(model, images, contest.bf16, batches)

        return window

    return {
        "bench": lambda: contest.bench_inference(size, batches),
        "loop": looped(),
        "control": looped(),
    }


def timm_training(contest: Contest) -> float:
    """Seconds per sample by TrainBenchmarkRunner of timm's benchmark.py."""
    model, device = contest.model().train(), contest.trainer.device
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    images = torch.randn_like(contest.test_images(contest.size))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=contest.bf16):
            logits = model(images)
            targets = torch.empty(len(images), device=device, dtype=torch.long).random_(10)
            F.cross_entropy(logits, targets).backward()
        optimizer.step()
        wait(device)

    return timm_mean(step, device) / contest.size


@torch.no_grad()
def timm_inference(contest: Contest, size: int) -> float:
    """Seconds per sample by InferenceBenchmarkRunner of timm's benchmark.py."""
    model, device = contest.model().eval(), contest.trainer.device
    images = torch.randn_like(contest.test_images(size))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=contest.bf16):
            model(images)
        wait(device)

    return timm_mean(step, device) / size


def timm_mean(step: Callable[[], None], device: torch.device) -> float:
    for _ in range(10):
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(40):
        step()
    return (time.perf_counter() - start) / 40


def timm(contest: Contest, args: argparse.Namespace) -> Parts:
    contestants = {
        "bench": lambda: contest.bench_training(40),
        "timm": lambda: timm_training(contest),
        "control": lambda: timm_training(contest),
        "fixed_batch": contest.looped(contest.fixed_batch(), 40),
    }
    decisive = ("timm/bench", "control/timm")
    further = ("timm/fixed_batch", "fixed_batch/bench")
    yield "train", compete(contestants, args.timm_rounds, decisive, further)
    for size in (1, args.inference_batch_size):
        contestants = {
            "bench": functools.partial(contest.bench_inference, size, 40),
            "timm": functools.partial(timm_inference, contest, size),
            "control": functools.partial(timm_inference, contest, size),
        }
        yield f"latency_b{size}", compete(contestants, args.timm_rounds, decisive)


def cost(contest: Contest, args: argparse.Namespace) -> Parts:
    contestants = {
        "bench": lambda: contest.bench_training(args.steps),
        "unmarked": lambda: contest.unmarked(args.steps),
        "control": lambda: contest.unmarked(args.steps),
    }
    yield "train", compete(contestants, args.pairs, ("bench/unmarked", "control/unmarked"))


MODES = {"agree": agree, "input": inputs, "timm": timm, "cost": cost}


def sizes(model: str, device: str) -> dict[str, int]:
    return SIZES_ON_A_CPU.get(model, SIZES["cpu"]) if device == "cpu" else SIZES[device]


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The lines to print, each as soon as it is known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, size in sizes(args.model, device.type).items():
        setattr(args, name, getattr(args, name) or size)
    named = ("what", "model", "precision", "channels_last", "batch_size")
    line: dict[str, object] = {name: getattr(args, name) for name in named}
    if is_emulated(args.precision, device):
        reason = f"this {device.type.upper()} has no {args.precision} kernels and emulates them"
        yield {**line, "skipped": reason}
        return
    line |= {"steps": args.steps, "threads": torch.get_num_threads(), "device": device.type}
    line["torch"] = torch.__version__
    for part, found in MODES[args.what](Contest(args), args):
        yield {**line, "part": part, **found}


def measure_all(argv: list[str]) -> int:
    """The grid, a fresh process each: Accelerate keeps one precision per process.

    1 if any of them failed, be it by a signal, whose code is negative.
    """
    words = [word for word in argv if word != "--all"]
    codes = []
    for model, precision, nhwc in itertools.product(MODELS, PRECISIONS, LAYOUTS):
        cell = ["--model", model, "--precision", precision, *(["--channels-last"] * nhwc)]
        codes.append(subprocess.call([sys.executable, __file__, *words, *cell]))
    return int(any(codes))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=MODES)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--channels-last", action="store_true")
    by_device = f"by device: {SIZES}, on a CPU {SIZES_ON_A_CPU}"
    parser.add_argument("--batch-size", type=int, help=by_device)
    parser.add_argument("--inference-batch-size", type=int, help="by device")
    parser.add_argument("--steps", type=int, help="timed steps of a window, by device")
    parser.add_argument("--pairs", type=int, default=300, help="rounds at most, 6 at least")
    parser.add_argument("--timm-rounds", type=int, default=12, help="of 10 + 40 steps, 6 at least")
    parser.add_argument("--all", action="store_true", help=f"{MODELS} x {PRECISIONS} x layouts")
    args = parser.parse_args(argv)
    if args.all:
        return measure_all(argv)
    for line in measure(args):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
