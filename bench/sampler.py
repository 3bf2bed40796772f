"""What a search tries next, and which trial it ends early: Optuna's answers, from what was tried.

https://optuna.readthedocs.io: TPE draws the values, the median rule prunes. A study is made anew
for every question, from the trials so far, and the generator of a draw is seeded by the search's
seed and the trial's number: equal trials give equal answers, however often a search was stopped.
"""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bench.space import Parameter, Range, Values, combinations, read_value, show, size_of, value_of
from bench.tuning import Trial, Tuning
from cifar.config import TrainConfig
from cifar.errors import ConfigError, UserError
from cifar.serialize import digest

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

DRAWN_AT_RANDOM = 10
"""Trials before TPE knows enough to choose (Optuna's own number)."""
JUDGED_AFTER = 5
"""Finished trials that a median is taken of at the least (Optuna's own number)."""
FIRST_JUDGED_EPOCH = 2
"""After its first one a trial tells more of its warm-up and its batch than of where it will end."""
MOST_DRAWS = 100
"""Of one trial, for values that go together and were not tried yet."""

Make = Callable[[Values], TrainConfig]
"""From drawn values to what a trial trains; raises ConfigError if they do not go together."""


def require_optuna() -> None:
    """Raise a UserError if Optuna is not installed."""
    try:
        import optuna  # noqa: F401 - whether it is there
    except ImportError:
        raise UserError("search: 'optuna': is not installed; pip install optuna") from None


def propose(
    tuning: Tuning,
    make: Make,
    number: int,
    trials: Sequence[Trial] = (),
    running: Sequence[TrainConfig] = (),
) -> TrainConfig | None:
    """What the `number`th trial trains; None if nothing is left that was not tried.

    `trials` are those that ended, `running` what others train now.
    """
    tried = {digest(train) for train in (*(trial.train for trial in trials), *running)}

    def new(values: Values) -> TrainConfig | None:
        try:
            train = make(values)
        except ConfigError:
            return None
        return None if digest(train) in tried else train

    for attempt in range(MOST_DRAWS):
        seed = random.Random(f"{tuning.seed} {number} {attempt}").getrandbits(32)
        if (train := new(_draw(tuning, seed, trials, running))) is not None:
            return train
    if size_of(tuning.space) is None:
        return None
    return next(filter(None, map(new, combinations(tuning.space))), None)


def _draw(
    tuning: Tuning, seed: int, trials: Sequence[Trial], running: Sequence[TrainConfig]
) -> Values:
    """Values of one more trial."""
    from optuna.samplers import TPESampler

    study = _study(tuning, trials, running)
    study.sampler = TPESampler(seed=seed, n_startup_trials=DRAWN_AT_RANDOM)
    drawn = study.ask({each.field: _distribution(each) for each in tuning.space}).params
    return {each.field: _settled(each, drawn[each.field]) for each in tuning.space}


def verdict(tuning: Tuning, trials: Sequence[Trial], curve: Sequence[float], epochs: int) -> str:
    """Why to end a trial with this curve so far, of `epochs`; empty if it goes on.

    It is ended if the best that it has reached is below the median of what the finished trials had
    reached after as many epochs.
    """
    if not tuning.pruning or not curve:
        return ""
    from optuna.pruners import MedianPruner

    study = _study(tuning, trials)
    study.pruner = MedianPruner(n_startup_trials=JUDGED_AFTER, n_warmup_steps=FIRST_JUDGED_EPOCH)
    trial = study.ask()
    for epoch, top1 in enumerate(curve, 1):
        trial.report(top1, epoch)
    if not trial.should_prune():
        return ""
    finished = sum(trial.state == "finished" for trial in trials)
    return (
        f"pruned after epoch {len(curve)} of {epochs}: top-1 {max(curve):.2%} is below the median "
        f"of the {finished} trials that came to their end"
    )


def _study(tuning: Tuning, trials: Sequence[Trial], running: Sequence[TrainConfig] = ()) -> "Study":
    """A study of what was tried, in memory; what broke down tells nothing."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.is_answer:
            state = TrialState.COMPLETE if trial.state == "finished" else TrialState.PRUNED
            study.add_trial(_frozen(tuning, trial.train, state, trial.curve, trial.top1))
    for train in running:
        study.add_trial(_frozen(tuning, train, TrialState.RUNNING))
    return study


def _frozen(
    tuning: Tuning,
    train: TrainConfig,
    state: Any,
    curve: Sequence[float] = (),
    top1: float | None = None,
) -> "FrozenTrial":
    """A trial as Optuna knows it; steps are epochs."""
    from optuna.trial import create_trial

    return create_trial(
        state=state,
        value=top1,
        params={each.field: _written(each, train) for each in tuning.space},
        distributions={each.field: _distribution(each) for each in tuning.space},
        intermediate_values=dict(enumerate(curve, 1)),
    )


def _distribution(parameter: Parameter) -> "BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not isinstance(parameter, Range):
        return CategoricalDistribution(parameter.texts)
    low, high, log = parameter.low, parameter.high, parameter.logarithmic
    if parameter.whole:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _written(parameter: Parameter, train: TrainConfig) -> Any:
    """What a configuration has of a field, as Optuna knows it."""
    value = value_of(train, parameter.field)
    return value if isinstance(parameter, Range) else show(value)


def _settled(parameter: Parameter, drawn: Any) -> Any:
    """The value of a field that Optuna has drawn."""
    if isinstance(parameter, Range):
        return parameter.settle(drawn)
    return read_value(parameter.field, drawn)
