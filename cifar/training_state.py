"""What a run depends on besides its configuration: taken from a trainer, and put back into one."""

import contextlib
import dataclasses
from collections.abc import Iterator

from torch import Tensor

from cifar.checkpoint import ModelCard, Tensors, TrainState, check_same_shapes
from cifar.errors import CheckpointError, TrainingError
from cifar.meter import Meter
from cifar.pulse import PULSE
from cifar.selection import Selection
from cifar.trainer import Trainer


def card_of(trainer: Trainer, *, averaged: bool = False) -> ModelCard:
    """What the weights are, for the folder they are saved in (`averaged`: see `ModelCard`)."""
    return ModelCard(
        config=dataclasses.replace(trainer.config, model=trainer.model_config),
        averaged=averaged,
        dataset=trainer.dataset.name,
        fingerprint=trainer.fingerprint,
        classes=trainer.dataset.classes,
        image_size=tuple(trainer.dataset.train.images.shape[2:]),
        mean=trainer.normalization.mean,
        std=trainer.normalization.std,
        step=trainer.step,
        samples_seen=trainer.samples_seen,
    )


def tensor_groups(trainer: Trainer, state: TrainState) -> tuple[str, ...]:
    """The groups of tensors that belong to a state."""
    groups = ["model", "optimizer"]
    if trainer.average:
        groups.append("ema")
    if state.best:
        groups.append("best")
    return tuple(groups)


def state_of(
    trainer: Trainer, epoch_seconds: float = 0.0, selection: Selection | None = None
) -> tuple[dict[str, Tensors], TrainState]:
    """Everything that the rest of the run depends on: tensors by group, and counters.

    A collective call; the tensors are whole, whatever engine trains.

    Raises:
        TrainingError: a weight is not finite, so the state is not worth keeping.
    """
    trainer.synchronize_buffers()
    engine = trainer.engine
    tensors = {
        "model": trainer.weights(),
        "optimizer": engine.optimizer_tensors(trainer.optimizer),
    }
    if trainer.average:
        tensors["ema"] = engine.gather(trainer.average.weights)
    best = selection.best if selection else None
    if selection and best:
        tensors["best"] = selection.weights
    for name, tensor in tensors["model"].items():
        with PULSE.waiting():
            is_finite = bool(tensor.isfinite().all())
        if not is_finite:
            raise TrainingError(
                f"weights: {name} is not finite after step {trainer.step}: training stopped; "
                "lower --lr or change --precision"
            )
    return tensors, TrainState(
        format=1,
        step=trainer.step,
        total_steps=trainer.total_steps,
        fingerprint=trainer.fingerprint,
        meter=trainer.meter.state(),
        ema_updates=trainer.average.updates if trainer.average else 0,
        scaler=trainer.scaler.state_dict() if trainer.scaler is not None else None,
        epoch_seconds=epoch_seconds,
        best=best,
    )


def load_state(
    trainer: Trainer,
    tensors: dict[str, Tensors],
    state: TrainState,
    selection: Selection | None = None,
) -> None:
    """Take up a saved state.

    Raises:
        CheckpointError: it is of another model, data set, precision or length of run.
    """
    if state.fingerprint != trainer.fingerprint:
        raise CheckpointError(
            f"data: {trainer.dataset.name}: not the images this run was started with "
            f"(fingerprint {trainer.fingerprint}, must be {state.fingerprint}); put them back, or "
            "start a new run"
        )
    if state.total_steps != trainer.total_steps:
        raise CheckpointError(
            f"steps: {trainer.total_steps}: the run to resume has {state.total_steps}; "
            "resume with the same epochs and batch size"
        )
    engine = trainer.engine
    engine.load(tensors["model"], "model")
    engine.load_optimizer_tensors(trainer.optimizer, tensors["optimizer"])
    if trainer.average:
        check_same_shapes(trainer.bare.state_dict(), tensors["ema"], "ema")
        for name, average in trainer.average.weights.items():
            average.copy_(engine.part(name, tensors["ema"][name]))
        trainer.average.updates = state.ema_updates
    if trainer.scaler is not None:
        if not state.scaler:
            raise CheckpointError("checkpoint: scaler: absent; start a new run")
        trainer.scaler.load_state_dict(state.scaler)
    if selection and state.best:
        check_same_shapes(trainer.bare.state_dict(), tensors["best"], "best")
        selection.best = state.best
        selection.weights = {
            name: tensor.to(trainer.device) for name, tensor in tensors["best"].items()
        }
    trainer.meter.load(state.meter, first=trainer.is_main)
    trainer.step = state.step


@contextlib.contextmanager
def set_aside(trainer: Trainer) -> Iterator[None]:
    """Let the block take steps of training, synced or not; afterwards the trainer is as it was.

    Every process takes up its own copies again, so weights that were equal are equal again. State
    that an optimiser makes in its first step is set back to the zeros it starts from.
    """
    kept = {name: tensor.clone() for name, tensor in live_tensors(trainer).items()}
    step, meter, training = trainer.step, trainer.meter, trainer.module.training
    updates = trainer.average.updates if trainer.average else 0
    scaler = trainer.scaler.state_dict() if trainer.scaler is not None else {}
    trainer.meter = Meter(trainer.device)
    trainer.module.train()
    try:
        yield
    finally:
        for name, tensor in live_tensors(trainer).items():
            tensor.copy_(kept[name]) if name in kept else tensor.zero_()
        trainer.step, trainer.meter = step, meter
        trainer.module.train(training)
        if trainer.average:
            trainer.average.updates = updates
        if trainer.scaler is not None:
            trainer.scaler.load_state_dict(scaler)


def live_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """What a step changes, by name: weights, statistics, the optimiser's state; not copies.

    As far as this process has it.
    """
    engine = trainer.engine
    groups = {"model": engine.live(), "optimizer": engine.live_state(trainer.optimizer)}
    if trainer.average:
        groups["ema"] = trainer.average.weights
    return {
        f"{group}.{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
