"""What a search varies: the grammar of its options, values, the usual space, what is refused."""

from dataclasses import replace
from typing import get_origin

import pytest

from bench.space import (
    KINDS,
    Choice,
    Parameter,
    Range,
    check_space,
    combinations,
    first_that_works,
    read_parameter,
    reads,
    show,
    size_of,
    value_of,
    with_values,
)
from bench.tuning import Tuning, check_images, default_space, own_values
from cifar.errors import ConfigError
from cifar.recipes import get_config
from cifar.serialize import from_json, to_json

SGD = get_config("sgd")

# --- The grammar ---


@pytest.mark.parametrize(
    ("field", "text", "ends", "size", "told"),
    [
        ("lr", "0.01..1", (0.01, 1.0), None, "0.01 to 1, on a logarithmic scale"),
        ("lr", "1e-5 .. 1e-4", (1e-5, 1e-4), None, "1e-05 to 0.0001, on a logarithmic scale"),
        ("lr", "0.05..0.2", (0.05, 0.2), None, "0.05 to 0.2"),
        ("label_smoothing", "0..0.2", (0.0, 0.2), None, "0 to 0.2"),
        ("rand_operations", "1..3", (1, 3), 3, "1 to 3"),
        ("global_batch_size", "32..512", (32, 512), 481, "32 to 512, on a logarithmic scale"),
        ("global_batch_size", "64, 128,256", (64, 128, 256), 3, "64, 128 or 256"),
        ("lr", "0.10,0.2", (0.1, 0.2), 2, "0.1 or 0.2"),
        ("optimizer", "sgd,adamw", ("sgd", "adamw"), 2, "sgd or adamw"),
        ("augment", "crop flip|none", (("crop", "flip"), ()), 2, "crop flip or none"),
        ("augment", "crop  flip", (("crop", "flip"),), 1, "crop flip"),
        ("epochs", "5", (5,), 1, "5"),
        ("dropout", "0..0.5", (0.0, 0.5), None, "0 to 0.5"),
    ],
)
def test_a_field_is_a_range_or_a_list(field, text, ends, size, told) -> None:
    parameter = read_parameter(field, text)
    assert (parameter.ends, parameter.size, str(parameter)) == (ends, size, told)


BAD = {
    "lr: '1..0.1': is no range; give LOW..HIGH, the lower one first": ("lr", "1..0.1"),
    "lr: '1..1': is no range": ("lr", "1..1"),
    "lr: '': give numbers, as in 1": ("lr", "1.."),
    "lr: 'x': give numbers": ("lr", "x..1"),
    "lr: 'nan': give numbers": ("lr", "nan..1"),
    "lr: 'inf': give numbers": ("lr", "0.1,inf"),
    "lr: '0.1': give each value once": ("lr", "0.1,0.10"),
    "batch-size: '6.5': give whole numbers": ("global_batch_size", "6.5..8"),
    "batch-size: '': give whole numbers": ("global_batch_size", "64,"),
    "optimizer: 'sdg': choose from sgd, adam, adamw, muon": ("optimizer", "sgd,sdg"),
    "optimizer: 'sgd..adam': choose from": ("optimizer", "sgd..adam"),
    "augment: '': name augmentations, or write none": ("augment", "crop|"),
    "epochs: '5..9': is the same in all trials": ("epochs", "5..9"),
    "validation: '0.1,0.2': is the same in all trials": ("validation", "0.1,0.2"),
}


@pytest.mark.parametrize(("message", "option"), BAD.items())
def test_what_is_no_space_is_one_line(message, option) -> None:
    with pytest.raises(ConfigError) as info:
        read_parameter(*option)
    assert str(info.value).startswith(message)


def test_every_number_of_the_recipe_can_be_searched_and_little_else() -> None:
    numbers = {name for name, kind in KINDS.items() if kind in (int, float)}
    assert {"lr", "momentum", "mixup", "warmup_epochs", "sam_rho", "dropout"} <= numbers
    assert {"optimizer", "schedule", "crop_fill", "augment"} <= KINDS.keys() - numbers
    assert not {"name", "patience", "nesterov"} & KINDS.keys()
    assert get_origin(KINDS["augment"]) is tuple


# --- Values ---


@pytest.mark.parametrize(
    ("field", "text", "drawn", "settled"),
    [
        ("lr", "0.01..1", 0.0123456, 0.0123),  # three digits
        ("lr", "0.01..1", 0.99987, 1.0),
        ("lr", "0.012345..1", 0.0123451, 0.012345),  # 0.0123 is less than the end
        ("dropout", "0..0.5", 0.1234, 0.125),  # steps of a hundredth of the range: 0.005
        ("momentum", "0.8..0.99", 0.98999, 0.99),
        ("momentum", "0.8..0.99", 0.80001, 0.8),
        ("global_batch_size", "32..512", 63.6, 64),
    ],
)
def test_a_drawn_number_is_one_that_people_can_read(field, text, drawn, settled) -> None:
    parameter = read_parameter(field, text)
    assert isinstance(parameter, Range)
    found = parameter.settle(drawn)
    assert found == settled and type(found) is type(settled)
    assert parameter.holds(found)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.1), ("lr", 1e-5), ("lr", 0.123456789), ("global_batch_size", 64), ("augment", ()),
     ("augment", ("crop", "flip")), ("optimizer", "adamw")],
)  # fmt: skip
def test_what_is_shown_is_read_as_the_same(field, value) -> None:
    assert read_parameter(field, show(value)).ends == (value,)


def test_values_go_where_they_belong_and_are_told_again() -> None:
    values = {"lr": 0.3, "augment": ("crop",), "dropout": 0.2, "global_batch_size": 128}
    train = with_values(SGD, values)
    assert (train.recipe.lr, train.recipe.augment) == (0.3, ("crop",))
    assert (train.model.dropout, train.recipe.global_batch_size) == (0.2, 128)
    assert {name: value_of(train, name) for name in values} == values
    assert train.recipe.momentum == SGD.recipe.momentum


def test_a_field_that_nothing_reads_is_told() -> None:
    assert not reads(SGD, "cutout_size") and not reads(SGD, "muon_step")
    assert reads(with_values(SGD, {"augment": ("cutout",)}), "cutout_size")
    assert reads(SGD, "dropout") and reads(SGD, "lr")


def space_of(**texts: str) -> list[Parameter]:
    return [read_parameter(field, text) for field, text in texts.items()]


def test_a_finite_space_is_counted_and_listed() -> None:
    space = space_of(global_batch_size="64,128", rand_operations="1..2")
    assert size_of(space) == 4
    found = [tuple(values.values()) for values in combinations(space)]
    assert found == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert size_of([*space, *space_of(lr="0.1..1")]) is None


# --- The usual space ---


def test_the_usual_space_lies_around_the_recipe() -> None:
    space = {each.field: str(each) for each in default_space(SGD, images=9_000, processes=1)}
    assert space == {
        "lr": "0.01 to 1, on a logarithmic scale",
        "weight_decay": "5e-05 to 0.005, on a logarithmic scale",
        "global_batch_size": "32, 64 or 128",
        "augment": "crop alternating-flip, crop alternating-flip cutout or "
        "crop alternating-flip trivial-augment",
    }


def test_the_usual_space_of_muon_has_its_step_besides() -> None:
    found = default_space(get_config("resnet9-muon"), images=9_000, processes=1)
    space = {each.field: str(each) for each in found}
    assert space["muon_step"] == "0.005 to 0.25, on a logarithmic scale"
    assert space["lr"] == "0.025 to 2.5, on a logarithmic scale"
    assert space["weight_decay"] == "0.00015 to 0.015, on a logarithmic scale"


def test_the_usual_space_has_no_batch_that_does_not_fit_and_no_decay_of_0() -> None:
    one_cycle = get_config("resnet9-one-cycle")
    found = default_space(one_cycle, images=1_500, processes=1)
    space = {each.field: str(each) for each in found}
    assert space["weight_decay"] == "1e-05 to 0.001, on a logarithmic scale"
    assert space["global_batch_size"] == "256 or 512", "1,024 leave less than two steps"
    fields = {each.field for each in default_space(one_cycle, images=600, processes=1)}
    assert "global_batch_size" not in fields, "256 alone is no choice"
    (sizes,) = (
        each for each in default_space(SGD, images=9_000, processes=64) if "batch" in each.field
    )
    assert str(sizes) == "64 or 128", "32 does not divide over 64 processes"


def test_own_values_are_the_recipe_s() -> None:
    space = default_space(SGD, images=9_000, processes=1)
    assert own_values(SGD, space) == {
        "lr": 0.1, "weight_decay": 5e-4, "global_batch_size": 64,
        "augment": ("crop", "alternating-flip"),
    }  # fmt: skip
    assert all(each.holds(value_of(SGD, each.field)) for each in space)
    assert not Range(field="lr", low=0.2, high=1.0).holds(0.1)
    assert not Choice(field="augment", texts=("crop", "none")).holds(("flip",))


# --- What is refused ---


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"lr": "0..1"}, "lr: 0.0: give a positive number"),
        ({"label_smoothing": "0..1"}, "label-smoothing: 1.0: give 0 <= value < 1"),
        ({"dropout": "0,1"}, "dropout: 1.0: give 0 <= p < 1"),
        ({"augment": "crop|corp"}, "augment: 'corp': choose from"),
        ({"augment": "crop|flip crop"}, "augment: 'flip crop': name crop first"),
        ({"global_batch_size": "63,64"}, "batch-size: 63: does not divide over 2 processes"),
        ({"cutout_size": "4,8"}, "cutout-size: '4,8': is of no use without cutout in --augment"),
        ({"muon_step": "0.01..0.1"}, "muon-step: '0.01,0.1': is of no use without --optimizer"),
    ],
)
def test_an_end_that_no_recipe_may_have_is_refused(texts, message) -> None:
    space = space_of(**texts)
    with pytest.raises(ConfigError) as info:
        check_space(SGD, space, space, 2)
    assert str(info.value).startswith(message)


def test_ends_that_go_together_with_something_are_good() -> None:
    space = space_of(schedule="one-cycle,cosine", warmup_epochs="0,1", optimizer="sgd,muon",
                     muon_step="0.01..0.1", augment="none|cutout", cutout_size="4,8")  # fmt: skip
    check_space(SGD, space, space, 1)
    first = first_that_works(SGD, space[:2], 1)
    assert (first.recipe.schedule, first.recipe.warmup_epochs) == ("one-cycle", 0.0)
    own = {"schedule": "cosine", "warmup_epochs": 1.0}
    assert first_that_works(SGD, space[:2], 1, own).recipe.warmup_epochs == 1.0
    with pytest.raises(ConfigError, match="one-cycle has its own warm-up"):
        check_space(SGD, space_of(schedule="one-cycle", warmup_epochs="0,1"), (), 1)


def trained_on(images: int, share: float = 0.1, batch: int = 64, limit: int | None = None) -> int:
    recipe = replace(SGD.recipe, validation=share)
    train = replace(SGD, recipe=recipe, limit_train=limit)
    return check_images(train, [batch], images)


def test_images_are_left_to_train_on_and_to_judge_by() -> None:
    assert trained_on(1_000) == 900
    assert trained_on(1_000, limit=200) == 180
    assert trained_on(130, share=0.014) == 128, "128 / 64 are two steps; 1.82 are 2 held out"
    for options, message in (
        ({"share": 0.0}, "validation: 0.0: leaves 0 of 1000 training images to judge"),
        ({"share": 0.9999}, "validation: 0.9999: leaves 1000 of 1000"),
        ({"limit": 1_001}, "limit-train: 1001: give at most 1000"),
        ({"batch": 451}, "batch-size: 451: is less than two steps in an epoch of 900 images"),
    ):
        with pytest.raises(ConfigError) as info:
            trained_on(1_000, **options)
        assert str(info.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": ()}, "space: '': nothing to search: give a range such as --lr 0.01..1"),
        ({"trials": 0}, "trials: 0: give 1 to 10000"),
        ({"trials": 3}, "trials: 3: there are only 2 settings to try; give at most that many"),
    ],
)
def test_a_search_of_nothing_is_refused(fields, message) -> None:
    known = {"space": tuple(space_of(global_batch_size="64,128")), "trials": 2}
    with pytest.raises(ConfigError) as info:
        Tuning(**known | fields)
    assert str(info.value).startswith(message)


def test_a_search_survives_json_unchanged() -> None:
    space = space_of(lr="0.01..1", global_batch_size="64,128", augment="crop|none", jitter="0..1")
    tuning = Tuning(space=tuple(space), trials=7, seed=3, pruning=False)
    assert from_json(Tuning, to_json(tuning)) == tuning
    text = to_json(tuning).replace('"low": 0.01', '"low": 2.0')
    with pytest.raises(ConfigError, match=r"lr: '2..1': is no range"):
        from_json(Tuning, text)
