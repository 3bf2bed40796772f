"""What a run depends on besides its configuration: taken from a trainer, and put back into one."""

import dataclasses

from cifar.checkpoint import ModelCard, Tensors, TrainState, check_same_shapes, load_into
from cifar.errors import CheckpointError, TrainingError
from cifar.optim import load_optimizer_tensors, optimizer_tensors
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


def tensor_groups(trainer: Trainer) -> tuple[str, ...]:
    """The groups of tensors in a state."""
    return ("model", "optimizer", "ema") if trainer.average else ("model", "optimizer")


def state_of(trainer: Trainer, epoch_seconds: float = 0.0) -> tuple[dict[str, Tensors], TrainState]:
    """Everything that the rest of the run depends on: tensors by group, and counters.

    Raises:
        TrainingError: a weight is not finite, so the state is not worth keeping.
    """
    trainer.synchronize_buffers()
    tensors = {"model": trainer.weights(), "optimizer": optimizer_tensors(trainer.optimizer)}
    if trainer.average:
        tensors["ema"] = trainer.average.weights
    for name, tensor in tensors["model"].items():
        if not bool(tensor.isfinite().all()):
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
    )


def load_state(trainer: Trainer, tensors: dict[str, Tensors], state: TrainState) -> None:
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
    load_into(trainer.module, tensors["model"], "model")
    load_optimizer_tensors(trainer.optimizer, tensors["optimizer"])
    if trainer.average:
        check_same_shapes(trainer.average.weights, tensors["ema"], "ema")
        for name, average in trainer.average.weights.items():
            average.copy_(tensors["ema"][name])
        trainer.average.updates = state.ema_updates
    if trainer.scaler is not None:
        if not state.scaler:
            raise CheckpointError("checkpoint: scaler: absent; start a new run")
        trainer.scaler.load_state_dict(state.scaler)
    trainer.meter.load(state.meter, first=trainer.is_main)
    trainer.step = state.step
