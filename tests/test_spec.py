"""Cells, protocols and their expansion."""

import math
import re
from dataclasses import replace

import pytest

from bench.protocol import Protocol
from bench.repeats import interleaved
from bench.spec import Cell, Plan, Suite, Task, expand, grid, seeded
from cifar.config import Distillation, ModelConfig, Recipe, Teacher, TrainConfig
from cifar.errors import ConfigError
from cifar.recipes import get_recipe
from cifar.serialize import from_json, to_json

TAUGHT = Distillation(teacher=Teacher(sha256="0" * 64, path="/teacher"))


def make_cell(**changes):
    return Cell(train=TrainConfig(precision="fp32", **changes))


def make_suite(protocol, *cells):
    return Suite(name="test", description="", plans=(Plan(protocol=protocol, cells=cells),))


def test_label_leaves_defaults_out():
    assert make_cell().label == "resnet18 fp32 b128"


def test_label_says_all_that_differs():
    train = TrainConfig(
        model=ModelConfig(name="resnet18-w16"),
        precision="bf16",
        channels_last=True,
        compile=True,
        compile_mode="max-autotune",
        seed=1,
    )
    cell = Cell(train=train, num_processes=2, launcher="fsdp")
    assert cell.label == "resnet18-w16 bf16 channels-last compile-max-autotune b128 x2 fsdp seed1"
    assert make_cell(accumulation_steps=4).label == "resnet18 fp32 b128 acc4"
    assert make_cell(distillation=TAUGHT).label == "resnet18 distilled fp32 b128"
    assert re.fullmatch(r"[A-Za-z0-9._-]+", cell.slug)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"channels_last": True},
        {"recipe": Recipe(lr=0.2)},
        {"model": ModelConfig(name="resnet34")},
        {"distillation": TAUGHT},
    ],
)
def test_digest_changes_with_the_contents(change):
    assert make_cell(**change).digest != make_cell().digest


def test_a_recipe_that_stops_early_is_no_cell_s():
    with pytest.raises(ConfigError, match=r"patience: 5: a cell trains for its whole budget"):
        make_cell(recipe=Recipe(validation=0.1, patience=5))


def test_digest_is_the_same_after_json():
    cell = make_cell(seed=3, distillation=TAUGHT)
    again = from_json(Cell, to_json(cell))
    assert again == cell
    assert again.digest == cell.digest


def test_digest_is_that_of_old_records():
    assert make_cell().digest == "9b6c71ad143bdbde"
    recipe = Recipe(optimizer="muon", lr=0.15, muon_step=0.02, crop_padding=2)
    assert make_cell(recipe=recipe).digest == "c1b7774c76dc1591"


NOT_READ = {
    "muon": (
        {"optimizer": "sgd"}, {"optimizer": "muon"}, {"muon_step": 0.02, "muon_momentum": 0.5}
    ),
    "crop": (
        {"augment": ("flip",)}, {"augment": ("crop",)}, {"crop_padding": 2, "crop_fill": "reflect"}
    ),
}  # fmt: skip
"""Settings of a recipe that does not read the last ones, of one that does, and these."""


@pytest.mark.parametrize(("without", "within", "settings"), NOT_READ.values(), ids=NOT_READ)
def test_what_a_recipe_does_not_read_does_not_enter_its_digest(without, within, settings):
    def digest_of(**changes):
        return make_cell(recipe=Recipe(lr=0.2, **changes)).digest

    for name, value in settings.items():
        assert digest_of(**without, **{name: value}) == digest_of(**without)
        assert digest_of(**within, **{name: value}) != digest_of(**within)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cell(train=TrainConfig()), "precision: None: choose one of fp32, tf32"),
        (lambda: grid(["resnet18"], ["fp8"]), "precision: 'fp8': choose one of fp32"),
        (lambda: grid(["resnet19"], ["fp32"]), "model: 'resnet19': choose one of"),
        (lambda: replace(make_cell(), num_processes=0), "num-processes: 0: give 1 or more"),
        (lambda: replace(make_cell(), num_processes=3), "nearest that does: 126 or 129"),
        (lambda: grid(["resnet18"], ["fp32"], seeds=0), "seeds: 0: give 1 to 10000"),
        (lambda: Protocol(min_timed_seconds=-1.0), "min-timed-seconds: -1.0: give 0 or more"),
        (lambda: Protocol(min_timed_seconds=math.inf), "min-timed-seconds: inf: give at most"),
        (
            lambda: Protocol(training_alone=True, metrics=("anatomy",)),
            "metrics: 'anatomy': not with training-alone",
        ),
        (lambda: Protocol(timed_steps=0), "timed-steps: 0: give 1 or more"),
        (lambda: Protocol(warmup_steps=-1), "warmup-steps: -1: give 0 or more"),
        (lambda: Protocol(train_samples=-1), "train-samples: -1: give 0 or more"),
        (lambda: Protocol(repeats=0), "repeats: 0: give 1 or more"),
        (
            lambda: Protocol(target_interval=0.01, repeats=6),
            "target-interval: 0.01: needs repeats, at most how many processes to start: 7 or more",
        ),
        (lambda: Protocol(timeout=0), "timeout: 0: give a positive number"),
        (lambda: Protocol(timeout=float("inf")), "timeout: inf: give a positive"),
        (lambda: Protocol(inference_seconds=float("nan")), "inference-seconds: nan: give a"),
        (lambda: Protocol(inference_batch_sizes=(0,)), "inference-batch-sizes: '0': give"),
        (lambda: Protocol(inference_batch_sizes=(8, 8)), "inference-batch-sizes: '8,8': give"),
        (
            lambda: expand(make_suite(Protocol(train_samples=1663), make_cell())),
            "train-samples: 1663: give 0 (speed only) or at least 1664, for the first step",
        ),
        (lambda: Protocol(warmup_steps=16), "warmup-steps: 16: give at most 15"),
        (lambda: Protocol(inference_warmup=16), "inference-warmup: 16: give at most 15: two spans"),
        (lambda: Protocol(throughput_seconds=-1.0), "throughput-seconds: -1.0: give 0 or more"),
        (lambda: Protocol(timed_seconds=1800.0), "timed-seconds: 1800.0: give less than"),
        (lambda: Protocol(metrics=("anatomy", "nope")), "metrics: 'anatomy,nope': choose from"),
        (
            lambda: Protocol(inference_backends=("compiled", "compiled")),
            "inference-backends: 'compiled,compiled': choose from compiled, exported, onnxruntime, "
            "each once",
        ),
        (lambda: expand(make_suite(Protocol())), "suite: 'test': has no cells"),
        (
            lambda: expand(make_suite(Protocol(repeats=10_001), make_cell())),
            "processes: 10001: are more than 10000; give fewer",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_field_and_value(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_protocol_digest_ignores_repeats_and_time_limit():
    assert Protocol(repeats=9, target_interval=0.1, timeout=1.0).digest == Protocol().digest
    assert Protocol(timed_steps=21).digest != Protocol().digest
    assert Protocol(allow_emulated=False).digest != Protocol().digest


def test_expand_runs_all_cells_before_it_repeats_any():
    one, two = make_cell(), make_cell(seed=1)
    tasks = expand(make_suite(Protocol(repeats=2), one, two))
    assert [(task.cell, task.repeat) for task in tasks] == [(one, 0), (two, 0), (one, 1), (two, 1)]


def test_cells_are_measured_in_a_random_order_that_every_repeat_draws_anew():
    cells = [make_cell(seed=seed) for seed in range(4)]
    tasks = expand(make_suite(Protocol(repeats=400), *cells))
    order = interleaved(tasks)
    assert order == interleaved(tasks)
    assert set(order) == set(tasks)
    assert [task.repeat for task in order] == [task.repeat for task in tasks]
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    for cell in cells:
        places = [[task.cell for task in each].index(cell) for each in rounds]
        # 100 expected of each place: 70 is 3.5 standard deviations away.
        assert all(70 <= places.count(place) <= 130 for place in range(4))


def test_cells_that_are_not_repeated_are_measured_as_they_are_given():
    tasks = expand(make_suite(Protocol(), *(make_cell(seed=seed) for seed in range(9))))
    assert interleaved(tasks) == tasks


def test_the_order_of_metrics_does_not_matter():
    one, other = (
        Protocol(metrics=each) for each in (("pipeline", "anatomy"), ("anatomy", "pipeline"))
    )
    assert one == other and one.digest == other.digest


def test_expand_removes_duplicates_but_not_other_protocols():
    suite = Suite(
        name="test",
        description="",
        plans=(
            Plan(protocol=Protocol(), cells=(make_cell(), make_cell())),
            Plan(protocol=Protocol(timeout=5.0), cells=(make_cell(),)),
            Plan(protocol=Protocol(train_samples=2560), cells=(make_cell(),)),
        ),
    )
    tasks = expand(suite)
    assert [task.protocol.train_samples for task in tasks] == [0, 2560]
    assert len({task.slug for task in tasks}) == 2


def test_task_slugs_tell_repeats_apart():
    tasks = [Task(cell=make_cell(), protocol=Protocol(), repeat=repeat) for repeat in (0, 1)]
    assert tasks[0].slug != tasks[1].slug
    assert tasks[0].slug.startswith("resnet18-fp32-b128-")


def test_grid_is_the_product_in_a_fixed_order():
    cells = grid(
        ["resnet18", "resnet20"],
        ["fp32", "bf16"],
        channels_last=(False, True),
        batch_sizes=(64, 128),
        seeds=2,
    )
    assert len(set(cells)) == len(cells) == 32
    assert [cell.label for cell in cells[:5]] == [
        "resnet18 fp32 b64",
        "resnet18 fp32 b64 seed1",
        "resnet18 fp32 b128",
        "resnet18 fp32 b128 seed1",
        "resnet18 fp32 channels-last b64",
    ]
    assert cells[-1].label == "resnet20 bf16 channels-last b128 seed1"


def test_grid_starts_from_the_recipe():
    (cell,) = grid(["resnet20"], ["fp32"], recipe=Recipe(lr=0.3), batch_sizes=(32,))
    assert (cell.train.recipe.lr, cell.train.recipe.global_batch_size) == (0.3, 32)
    (timed,) = grid(["resnet20"], ["fp32"])
    assert timed.train.recipe == get_recipe("sgd")


def test_seeded_replaces_the_seed():
    cells = seeded((make_cell(seed=7),), 3)
    assert [cell.train.seed for cell in cells] == [0, 1, 2]
