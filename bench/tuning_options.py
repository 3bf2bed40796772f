"""The options of `bench search`, which follow from the recipe's fields, and what they ask for."""

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Annotated, Any, Literal, cast, get_origin

import tyro

from bench.launchers import check_launcher
from bench.option_types import CommaList, Flag
from bench.preflight import examine
from bench.space import (
    KINDS,
    SHARED,
    Parameter,
    Value,
    check_space,
    first_that_works,
    read_parameter,
    size_of,
    with_values,
)
from bench.spec import Cell, Plan, Suite
from bench.tuning import (
    SUITE,
    TRIALS,
    VALIDATION,
    Tuning,
    check_images,
    default_space,
    own_values,
    trial_protocol,
)
from cifar.config import (
    TYPICAL_LR,
    ModelConfig,
    PrecisionName,
    Recipe,
    TrainConfig,
    option_name,
    require,
)
from cifar.data.config import DATA_HELP, DataConfig, parse_data
from cifar.errors import ConfigError
from cifar.recipes import RECIPES, get_config
from cifar.train_options import for_another

arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """Options of `bench search` besides the fields that it searches, see `options_class`."""

    recipe: tyro.conf.Positional[Annotated[str | None, arg(metavar="[RECIPE]")]] = None
    """The named recipe to start from: what is not searched stays as it has it."""
    model: Annotated[str | None, arg(metavar="NAME")] = None
    """Model to train, e.g. resnet20; the recipe's own when not given."""
    data: Annotated[str | None, arg(metavar="SOURCE[:PATH]", help=DATA_HELP)] = None
    limit_train: Annotated[int | None, arg(metavar="N")] = None
    """Training images to use, those held out among them; all of them when not given."""
    trials: Annotated[int | None, arg(metavar="N")] = None
    """Settings to try, 30 when not given, or as many as there are; the first ten at random."""
    precision: PrecisionName | None = None
    """Number format; the recipe's own, or fp32, when not given."""
    channels_last: Flag = False
    """Keep images and convolution weights in NHWC order."""
    launcher: Annotated[str | None, arg(metavar="NAME")] = None
    """How processes are started: ddp, fsdp, zero1, zero2 or zero3; ddp when not given."""
    num_processes: Annotated[int | None, arg(metavar="N")] = None
    """Processes per trial, one per device."""
    devices: CommaList = ()
    """Train side by side, one process per device: GPUs by number or UUID, e.g. 0,1,2,3, or groups
    of cores, e.g. cpu:0-3,cpu:4-7. All GPUs of one model, on CPUs one trial at a time, when not
    given."""
    no_pruning: Flag = False
    """Train every trial to its end, however much worse than the others it is."""
    seed: Annotated[int | None, arg(metavar="N")] = None
    """Of what is drawn, and of all trainings; 0 when not given."""
    timeout: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Seconds after which a trial is ended; with --resume for what is missing."""
    dry_run: Flag = False
    """Show what is searched, a trial's command and the time for all; start nothing."""
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """Go on with a search, given by its run's id or folder; trials that ended count."""
    runs_dir: Annotated[str, arg(metavar="DIR")] = "runs"
    """Where runs are kept."""


AT_ANY_TIME = ("devices", "timeout", "dry_run", "resume", "runs_dir")
"""The options that change nothing of what is searched."""


@functools.cache
def options_class() -> type[SearchOptions]:
    """`SearchOptions`, and an option for every field that can be searched.

    Their help is the text below the field in `Recipe` and in `ModelConfig`.
    """
    told = _texts_below_fields(ModelConfig) | _texts_below_fields(Recipe)
    made = [(name, _option(name, told[name]), field(default=None)) for name in KINDS]
    return make_dataclass(
        "Options", made, bases=(SearchOptions,), frozen=True, kw_only=True, slots=True
    )


def _option(name: str, told: str) -> Any:
    """The type of a field's option."""
    kind, metavar = KINDS[name], "N" if name in SHARED else "SPACE"
    if kind not in (int, float):
        metavar = "NAME[,NAME...]" if get_origin(kind) is Literal else "NAMES[|NAMES...]"
    aliases = ("-b",) if name == "global_batch_size" else None
    described = arg(name=option_name(name), aliases=aliases, metavar=metavar, help=told)
    return Annotated[str | None, described]


def _texts_below_fields(cls: type) -> dict[str, str]:
    """The strings that stand below the fields of a dataclass in its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    lines = cast(ast.ClassDef, tree).body
    return {
        before.target.id: " ".join(text.value.value.split())
        for before, text in itertools.pairwise(lines)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def build_search(options: SearchOptions) -> tuple[Suite, Tuning]:
    """What all trials share, as the one cell of a suite, and what is searched.

    Raises:
        ConfigError: no recipe, nothing to search, or a name or value that cannot be meant.
        DataError: the data set is missing, damaged or of the wrong form.
    """
    given = [
        read_parameter(name, text) for name in KINDS if (text := getattr(options, name)) is not None
    ]
    shared = [each for each in given if each.size == 1]
    space = [each for each in given if each not in shared]
    train = _by_chosen_optimizer(_start(options, shared), given)
    processes = 1 if options.num_processes is None else options.num_processes
    require(processes >= 1, "num-processes", processes, "give 1 or more")
    images = examine(train.data).images
    left = check_images(train, (), images)
    if not space:
        usual = default_space(train, images=left, processes=processes)
        space = [each for each in usual if each.field not in {one.field for one in shared}]
    tuning = _tuning(options, space)
    own = {**own_values(train, space), **{each.field: each.ends[0] for each in shared}}
    train = first_that_works(train, [*shared, *space], processes, own)
    check_space(train, space, given, processes)
    check_images(train, batch_sizes(train, space), images)
    return _suite(options, train, processes), tuning


def batch_sizes(train: TrainConfig, space: Iterable[Parameter]) -> list[int]:
    """The sizes of a batch that are furthest apart, or the one that there is."""
    found = [each.ends for each in space if each.field == "global_batch_size"]
    return (
        [int(cast(int, size)) for size in found[0]] if found else [train.recipe.global_batch_size]
    )


def _start(options: SearchOptions, shared: Iterable[Parameter]) -> TrainConfig:
    """What the trials start from: the named recipe with the options that are no space.

    A fixed share of images that is held out is in it; other fixed fields may only go together with
    some of what is searched.
    """
    if options.recipe is None:
        raise ConfigError(f"recipe: none given: choose one of {', '.join(RECIPES)}")
    named = get_config(options.recipe)
    model = named.model
    if options.model is not None:
        model = replace(for_another(options.model, model), name=options.model)
    held_out: dict[str, Value] = {"validation": named.recipe.validation or VALIDATION}
    held_out |= {each.field: each.ends[0] for each in shared if each.field == "validation"}
    start = replace(
        named,
        model=model,
        recipe=replace(named.recipe, patience=0),
        data=DataConfig() if options.data is None else parse_data(options.data),
        limit_train=options.limit_train,
        precision=options.precision or named.precision or "fp32",
        channels_last=options.channels_last or named.channels_last,
        seed=0 if options.seed is None else options.seed,
    )
    return with_values(start, held_out)


def _by_chosen_optimizer(train: TrainConfig, given: Iterable[Parameter]) -> TrainConfig:
    """A configuration with the optimiser of all trials, and a learning rate that suits it.

    Raises:
        ConfigError: several optimisers are to be tried at one learning rate.
    """
    chosen = {each.field: each for each in given}
    optimizers = chosen.get("optimizer")
    if optimizers is None:
        return train
    names = tuple(map(str, optimizers.ends))
    require(
        len(names) == 1 or ("lr" in chosen and chosen["lr"].size != 1),
        "optimizer",
        ",".join(names),
        f"{train.recipe.lr:g} suits {train.recipe.optimizer}; search the learning rate as well, as "
        "by --lr 0.001..0.3",
    )
    if len(names) > 1 or names == (train.recipe.optimizer,):
        return train
    return with_values(train, {"lr": TYPICAL_LR[names[0]], "optimizer": names[0]})


def _tuning(options: SearchOptions, space: Iterable[Parameter]) -> Tuning:
    parameters = tuple(space)
    usual = min(TRIALS, size_of(parameters) or TRIALS)
    return Tuning(
        space=parameters,
        trials=usual if options.trials is None else options.trials,
        seed=0 if options.seed is None else options.seed,
        pruning=not options.no_pruning,
    )


def _suite(options: SearchOptions, train: TrainConfig, processes: int) -> Suite:
    launcher = "ddp" if options.launcher is None else options.launcher
    check_launcher(launcher)
    cell = Cell(train=train, launcher=launcher, num_processes=processes)
    plan = Plan(protocol=trial_protocol(options.timeout), cells=(cell,))
    return Suite(name=SUITE, description="settings that score better", plans=(plan,))
