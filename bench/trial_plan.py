"""What is known of a search, and which trial follows from it. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.record import Environment, Record
from bench.repeats import Fingerprints, is_from_here
from bench.runs import Run
from bench.sampler import propose
from bench.space import Values, show, value_of, with_values
from bench.spec import Task
from bench.tuning import Tuning, own_values, told_by, trial_task
from cifar.config import TrainConfig, option_name

ENOUGH_UNSUPPORTED = 3
"""Trials, when none has told anything else, after which no other one is tried."""


def tuning_of(run: Run) -> Tuning:
    """What a search is to do."""
    assert run.plan.tuning is not None, "the run of a search"
    return run.plan.tuning


def known_records(run: Run, here: Environment, fingerprints: Fingerprints) -> dict[int, Record]:
    """The last record of every trial that was made in the circumstances of here and now."""
    home = _anywhere(here)
    return {
        record.repeat: record
        for record in run.records()
        if record.environment
        and is_from_here(
            replace(record, environment=_anywhere(record.environment)), home, fingerprints
        )
    }


def _anywhere(environment: Environment) -> Environment:
    """An environment without its place: which of the GPUs and how many, and its share of the cores.

    It changes no accuracy, nor do their power and clocks, and it depends on how many trials ran at
    the same time.
    """
    place = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    variables = {name: value for name, value in environment.worker_env.items() if name not in place}
    kinds = tuple(sorted(set(environment.gpu_names)))
    return replace(
        environment,
        worker_env=variables,
        gpu_names=kinds,
        gpu_power_limits=(),
        gpu_application_clocks=(),
        cpu_count=1,
        threads=1,
        side_by_side=1,
    )


class TrialPlan:
    """What is known of a search, and the trial that follows from it."""

    def __init__(self, run: Run, known: Mapping[int, Record]) -> None:
        self.tuning = tuning_of(run)
        (self._base,) = run.plan.tasks
        self._tried: set[int] = set()
        """The numbers of trials that were started in this process."""
        self.trials = {number: told_by(record) for number, record in known.items()}

    @property
    def left(self) -> int:
        """Trials that were neither answered nor started."""
        return self.tuning.trials - len(self.answered | self._tried)

    @property
    def answered(self) -> set[int]:
        """The numbers of trials that need not be run again."""
        return {number for number, trial in self.trials.items() if trial.is_answer}

    def next(self, running: Sequence[TrainConfig]) -> Task | None:
        """The trial to start beside those that run; None if there is none left.

        One that broke down before is started anew with the values that it had.
        """
        done = self.answered | self._tried
        number = next((each for each in range(self.tuning.trials) if each not in done), None)
        if number is None or self._is_hopeless:
            return None
        broken = self.trials.get(number)
        train = broken.train if broken else self._propose(number, running)
        if train is None:
            return None
        self._tried.add(number)
        return trial_task(self._base, number, train)

    def _propose(self, number: int, running: Sequence[TrainConfig]) -> TrainConfig | None:
        """The first trial is the recipe itself, if its own values are among those searched."""
        space = self.tuning.space
        own = own_values(self._base.cell.train, space)
        if number == 0 and all(each.holds(own[each.field]) for each in space):
            return self._base.cell.train
        return propose(self.tuning, self._make, number, list(self.trials.values()), running)

    def _make(self, values: Values) -> TrainConfig:
        train = with_values(self._base.cell.train, values)
        train.per_device_batch_size(self._base.cell.num_processes)
        return train

    @property
    def _is_hopeless(self) -> bool:
        """Whether this machine cannot run any trial, as far as several of them tell."""
        states = [trial.state for trial in self.trials.values() if trial.is_answer]
        return set(states) == {"unsupported"} and len(states) >= ENOUGH_UNSUPPORTED

    def add(self, record: Record) -> None:
        """A trial ended."""
        self.trials = {**self.trials, record.repeat: told_by(record)}

    def label(self, train: TrainConfig) -> str:
        """A trial's values for people: `lr 0.05, batch-size 128`."""
        return ", ".join(
            f"{option_name(each.field)} {show(value_of(train, each.field))}"
            for each in self.tuning.space
        )
