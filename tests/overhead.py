"""What the trainer costs over a bare PyTorch loop, and the input pipeline over a plain index.

    python tests/overhead.py step --model resnet20 --pairs 200
    python tests/overhead.py step --model resnet20-w4 --batch-size 4 --turn 64 --pairs 60
    python tests/overhead.py pipeline

step: turns of one step, or of as many as --turn says, are interleaved in random order in one
  process: the trainer's, a bare loop's over one fixed batch, and a second bare loop's as the
  control. The trainer runs the recipe `sgd` but for its budget, batch size and learning rate, so
  its steps have augmentation, the schedule, the training metrics and the average of the weights
  (EMA) in them, of which a bare loop has none: it shares the recipe's loss alone; --ema-decay 0
  tells what is left without the average. Long turns hold what is done only now and then as well: on
  a CPU its counters are read every 10 steps and summed every 64, and it draws once per epoch.
pipeline: whole epochs of the recipe's augmented and of plain images take turns, each with the draws
  and the permutation that it makes at its start.

Prints the median of the ratios within a round (bare / trainer, plain / augmented: 1 means no
overhead) with a 95 % interval from order statistics.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

from cifar.process import ensure_environment

if __name__ == "__main__":
    ensure_environment()  # before torch is imported

import torch
import torch.nn.functional as F
from turns import Taken, middle, ratio, take_turns

from cifar.config import ModelConfig, RunConfig, TrainConfig
from cifar.data.loader import DeviceImages, Normalization, TrainLoader
from cifar.data.sources import load_dataset
from cifar.models import build_model
from cifar.optim import build_optimizer
from cifar.precision import is_emulated
from cifar.recipes import get_recipe
from cifar.trainer import Trainer

PRECISIONS = ("fp32", "bf16")
"""Those that the bare loop has."""


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """The shortest step in plain PyTorch: same model, loss, layout and precision, one batch."""
    config = trainer.config
    model = build_model(trainer.model_config).to(trainer.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.recipe)
    (batch,) = trainer.loader.micro_batches(0)
    autocast, smoothing = config.precision == "bf16", config.recipe.label_smoothing

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=autocast):
            logits = model(batch.images).float()
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: torch.device, steps: int = 1) -> float:
    """Of a step, the mean of so many."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def compare_steps(args: argparse.Namespace) -> dict[str, object]:
    recipe = dataclasses.replace(
        get_recipe("sgd"),
        epochs=1000,
        global_batch_size=args.batch_size,
        lr=1e-4,  # a bare loop learns one batch by heart
        ema_decay=args.ema_decay,
    )
    config = TrainConfig(
        model=ModelConfig(name=args.model),
        recipe=recipe,
        precision=args.precision,
        channels_last=args.channels_last,
    )
    trainer = Trainer(config, RunConfig(), load_dataset(config.data))

    def full_step() -> None:
        trainer.train_step()
        if trainer.step % trainer.check_every == 0:
            trainer.check()

    steps = {"trainer": full_step, "bare": bare_step(trainer), "control": bare_step(trainer)}
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    timed = {
        name: partial(seconds, step, trainer.device, args.turn) for name, step in steps.items()
    }
    return told(args, take_turns(timed, args.pairs))


def told(args: argparse.Namespace, taken: Taken) -> dict[str, object]:
    """What was compared, and the ratios that came of it.

    The trainer is compared with the mean of both bare loops' turns in the same round, which tells
    as much as a third more rounds would with one of them.
    """
    bare = [statistics.mean(pair) for pair in zip(taken["bare"], taken["control"], strict=True)]
    return {
        "model": args.model,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "channels_last": args.channels_last,
        "ema_decay": args.ema_decay,
        "threads": torch.get_num_threads(),
        "pairs": args.pairs,
        "steps_per_turn": args.turn,
        "bare_step_ms": statistics.median(bare) * 1e3,
        "ratio": ratio(bare, taken["trainer"]),
        "control": ratio(taken["bare"], taken["control"]),
        "added_ms": middle([(t - b) * 1e3 for b, t in zip(bare, taken["trainer"], strict=True)]),
    }


def compare_pipelines(args: argparse.Namespace) -> dict[str, object]:
    dataset = load_dataset(TrainConfig().data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = DeviceImages(dataset.train, Normalization.of(dataset.train), device)
    size, recipe = args.batch_size, get_recipe("sgd")
    loaders = {
        "plain": TrainLoader(
            images, dataclasses.replace(recipe, augment=()), per_device_batch_size=size
        ),
        "augmented": TrainLoader(images, recipe, per_device_batch_size=size),
    }
    epochs = {name: epochs_of(loader) for name, loader in loaders.items()}
    for epoch in epochs.values():
        epoch()
    taken = take_turns(
        {name: partial(seconds, epoch, device) for name, epoch in epochs.items()}, args.epochs
    )
    plain, augmented = taken["plain"], taken["augmented"]
    count = loaders["plain"].steps_per_epoch * size
    return {
        "batch_size": size,
        "epochs": args.epochs,
        "plain_images_per_s": count / statistics.median(plain),
        "augmented_images_per_s": count / statistics.median(augmented),
        "ratio": ratio(plain, augmented),
    }


def epochs_of(loader: TrainLoader) -> Callable[[], None]:
    """A function that makes all batches of the next epoch, and all that is drawn for them."""
    numbers = itertools.count(1)

    def epoch() -> None:
        loader.set_epoch(next(numbers))
        for step in range(loader.steps_per_epoch):
            for _batch in loader.micro_batches(step):
                pass

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "pipeline"])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--channels-last", action="store_true")
    own = get_recipe("sgd").ema_decay
    parser.add_argument("--ema-decay", type=float, default=own, help="the recipe's; 0: no average")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--turn", type=int, default=1, help="steps before another one's turn")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30, help="pipeline: of either kind")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_emulated(args.precision, device):
        parser.error(f"precision: {args.precision!r}: emulated here, which a bare loop is not")
    compare = compare_steps if args.what == "step" else compare_pipelines
    print(json.dumps(compare(args)))


if __name__ == "__main__":
    main()
