"""The named suites, their overrides, and the estimate of their cost."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from bench.estimate import BUILD_SECONDS, START_SECONDS, estimate_seconds
from bench.overrides import only, override
from bench.protocol import Protocol
from bench.published import PUBLISHED
from bench.record import Environment, Record
from bench.spec import expand, grid
from bench.suites import PROCESSES, REFERENCE, SUITES, get_suite, quick, reference
from bench.tuning import trial_protocol
from bench.unfinished import no_validation
from cifar.config import Recipe
from cifar.data.config import DataConfig
from cifar.errors import ConfigError
from cifar.progress import format_duration
from cifar.recipes import get_config


@pytest.mark.parametrize("name", SUITES)
def test_suites_expand_and_describe_themselves(name):
    suite = get_suite(name)
    assert suite.name == name
    assert suite.description
    assert SUITES[name].__doc__
    assert expand(suite)


def test_quick_trains_four_cells_on_the_same_samples_and_times_resnet18():
    tasks = expand(quick())
    plan = {(task.cell.train.model.label, task.cell.precision): task.protocol for task in tasks}
    budgets = {cell: protocol.train_samples for cell, protocol in plan.items()}
    assert budgets == {
        (model, precision): budget
        for model, budget in (("resnet20", 12_800), ("resnet18-w16", 12_800), ("resnet18", 0))
        for precision in ("fp32", "bf16")
    }
    assert not any(protocol.allow_emulated for protocol in plan.values())
    assert {str(task.cell.train.data) for task in tasks} == {"shapes"}


def test_quick_is_estimated_at_five_minutes_at_most():
    assert sum(estimate_seconds(task.cell, task.protocol) for task in expand(quick())) <= 300


@pytest.mark.parametrize("name", SUITES)
def test_no_suite_about_speed_measures_what_is_emulated(name):
    speed = [task.protocol for task in expand(get_suite(name)) if not task.protocol.train_samples]
    bf16 = {task.protocol for task in expand(get_suite(name)) if task.cell.precision == "bf16"}
    assert not any(protocol.allow_emulated for protocol in bf16.intersection(speed))


def test_depths_and_precisions_cover_their_grids():
    depths = Counter(task.cell.train.model.name for task in expand(get_suite("depths")))
    names = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    assert depths == dict.fromkeys(names, PROCESSES)
    cells = {task.cell for task in expand(get_suite("precisions"))}
    assert len(cells) == 2 * 4 * 2 * 2


def test_accuracy_trains_the_recipes_full_budget_on_real_images():
    for task in expand(get_suite("accuracy")):
        recipe = task.cell.train.recipe
        assert recipe.name == "default"
        assert task.protocol.train_samples == 10 * 781 * 64  # the last batch of 16 is dropped
        assert task.protocol.allow_emulated
        assert task.cell.train.data.source == "cifar10"


def test_latency_sweeps_batch_sizes_of_all_backends_within_seconds_each():
    tasks = expand(get_suite("latency"))
    assert {(t.cell.train.model.name, t.cell.precision) for t in tasks} == {
        (model, precision) for model in ("resnet20", "resnet18") for precision in ("fp32", "bf16")
    }
    (protocol,) = {task.protocol for task in tasks}
    assert protocol.inference_batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    assert protocol.inference_backends == ("compiled", "exported", "onnxruntime")
    assert (protocol.train_samples, protocol.allow_emulated) == (0, False)
    assert protocol.inference_seconds <= 5
    assert max(estimate(task.cell, protocol) for task in tasks) < protocol.timeout / 2


def test_unknown_suite_lists_the_suites():
    with pytest.raises(ConfigError, match=r"^suite: 'quik': choose one of quick, depths, "):
        get_suite("quik")


def test_override_changes_nothing_by_default():
    assert override(quick()) == quick()


def test_override_reaches_every_cell_and_protocol():
    suite = override(
        quick(),
        data=DataConfig(source="cifar10"),
        batch_size=64,
        accumulation_steps=2,
        channels_last=True,
        compile=True,
        seeds=2,
        launcher=("fsdp",),
        num_processes=(2,),
        train_samples=640,
        warmup_steps=1,
        timed_steps=3,
        repeats=2,
        timeout=60.0,
    )
    tasks = expand(suite)
    assert len(tasks) == 2 * 2 * len(expand(quick()))
    assert {task.cell.train.seed for task in tasks} == {0, 1}
    for task in tasks:
        train, protocol = task.cell.train, task.protocol
        assert (train.data.source, train.recipe.global_batch_size) == ("cifar10", 64)
        assert (train.accumulation_steps, train.channels_last, train.compile) == (2, True, True)
        assert (task.cell.launcher, task.cell.num_processes) == ("fsdp", 2)
        assert (protocol.train_samples, protocol.timeout) == (640, 60.0)
        assert (protocol.warmup_steps, protocol.timed_steps) == (1, 3)


def test_a_field_that_nothing_has_is_refused():
    with pytest.raises(TypeError, match="no such field: speed"):
        override(quick(), speed=1)


def test_a_recipe_brings_its_batch_size_unless_one_is_given():
    recipe = Recipe(name="other", lr=0.2, global_batch_size=96)
    alone = override(quick(), recipe=recipe, num_processes=(3,))
    assert {task.cell.train.recipe for task in expand(alone)} == {recipe}
    both = override(quick(), recipe=recipe, batch_size=32)
    assert {task.cell.train.recipe.global_batch_size for task in expand(both)} == {32}


def test_cells_that_an_override_makes_equal_are_measured_once():
    tasks = expand(override(get_suite("precisions"), channels_last=True))
    assert len(tasks) == 2 * 4 * 2 * PROCESSES


def test_override_refuses_what_a_cell_refuses():
    with pytest.raises(ConfigError, match="nearest that does: 63 or 66"):
        override(quick(), num_processes=(3,))
    with pytest.raises(ConfigError, match="compile-mode: 'reduce-overhead': needs --compile"):
        override(quick(), compile_mode="reduce-overhead")
    with pytest.raises(ConfigError, match="compile-mode: 'default': needs --compile"):
        override(quick(), compile_mode="default")


def test_a_compile_mode_is_that_of_all_cells_that_compile():
    tasks = expand(override(quick(), compile=True, compile_mode="reduce-overhead"))
    assert {task.cell.compiled for task in tasks} == {"compile-reduce-overhead"}
    before = [task.cell for task in expand(get_suite("precisions"))]
    suite = override(get_suite("precisions"), compile_mode="max-autotune")
    after = [task.cell for task in expand(suite)]
    assert [cell for cell in after if not cell.train.compile] == [
        cell for cell in before if not cell.train.compile
    ]
    assert Counter(cell.compiled for cell in after) == {
        "eager": 16 * PROCESSES,
        "compile-max-autotune": 16 * PROCESSES,
    }


ENVIRONMENT = Environment(
    cpu_model="CPU",
    cpu_count=2,
    memory_bytes=1,
    os="Linux",
    python="3.11",
    torch="2.15",
    accelerate="1.15",
    numpy="2.0",
    code_digest="0",
    threads=2,
    started="",
    host="here",
)


def finished(cell, protocol, seconds, **changes):
    record = Record(
        cell=cell,
        protocol=protocol,
        status="ok",
        started="",
        duration_s=seconds,
        environment=ENVIRONMENT,
    )
    return replace(record, **changes)


def estimate(cell, protocol, *history):
    return estimate_seconds(cell, protocol, history=history, host="here")


def test_estimate_grows_with_depth_budget_and_compilation():
    (small,), (large,) = grid(["resnet18"], ["fp32"]), grid(["resnet152"], ["fp32"])
    speed, trained = Protocol(), Protocol(train_samples=12_800)
    assert START_SECONDS < estimate(small, speed) < estimate(small, trained)
    assert estimate(small, speed) < estimate(large, speed)
    (compiled,) = grid(["resnet18"], ["fp32"], compile=(True,))
    assert estimate(small, speed) < estimate(compiled, speed)


def test_estimate_knows_images_of_four_times_the_pixels():
    protocol = Protocol(train_samples=12_800, inference_batch_sizes=())
    seconds = []
    for source in ("cifar100", "tiny-imagenet"):
        (cell,) = grid(["resnet18"], ["fp32"], data=DataConfig(source=source))
        seconds.append(estimate(cell, protocol) - START_SECONDS)
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=0.01)


def test_estimate_counts_timing_and_building_of_every_backend():
    (cell,) = grid(["resnet20"], ["fp32"])
    own = Protocol(inference_batch_sizes=(1, 8), inference_iterations=1, inference_warmup=0)
    none = replace(own, inference_batch_sizes=())
    two = replace(own, inference_backends=("compiled", "exported"))
    timing = estimate(cell, own) - estimate(cell, none)
    assert timing > 0
    expected = estimate(cell, own) + 2 * timing + 2 * 2 * BUILD_SECONDS
    assert estimate(cell, two) == pytest.approx(expected)


def test_estimate_counts_the_least_seconds_of_short_batches_and_of_the_throughput():
    (cell,) = grid(["resnet20-w4"], ["fp32"])
    brief = Protocol(
        inference_batch_sizes=(1,), inference_iterations=1, min_timed_seconds=0.0,
        throughput_seconds=0.0,
    )  # fmt: skip

    def inference(**changes):
        protocol = replace(brief, **changes)
        return estimate(cell, protocol) - estimate(
            cell, replace(protocol, inference_batch_sizes=())
        )

    alone = inference()
    assert inference(throughput_seconds=0.25) - alone == pytest.approx(0.25)
    assert inference(min_timed_seconds=3.0) - alone == pytest.approx(3.0, rel=0.01)
    most = inference(min_timed_seconds=3.0, inference_seconds=1.0)
    assert most - alone == pytest.approx(1.0, rel=0.01)


def test_estimate_takes_a_finished_record_of_the_same_cell():
    (cell,) = grid(["resnet18"], ["fp32"])
    history = [finished(cell, Protocol(), seconds) for seconds in (50.0, 70.0, 900.0)]
    assert estimate(cell, Protocol(), *history) == 70.0


def test_estimate_knows_what_is_not_supported_and_learns_no_speed_from_it():
    (cell,), (other,) = grid(["resnet18"], ["fp16"]), grid(["resnet34"], ["fp32"])
    record = finished(cell, Protocol(), 12.0, status="unsupported", reason="no fp16 here")
    assert estimate(cell, Protocol(), record, replace(record, duration_s=8.0)) == 10.0
    assert estimate(other, Protocol(), record) == estimate(other, Protocol())
    for status in ("failed", "oom", "timeout"):
        broken = replace(record, status=status)
        assert estimate(cell, Protocol(), broken) == estimate(cell, Protocol())


def test_estimate_counts_timed_steps_within_the_budget():
    (cell,) = grid(["resnet18"], ["fp32"], batch_sizes=(128,))
    budget = Protocol(train_samples=12_800, inference_batch_sizes=())
    more = replace(budget, timed_steps=40), replace(budget, timed_seconds=60.0)
    assert [estimate(cell, protocol) for protocol in more] == [estimate(cell, budget)] * 2
    # 2,000 test images are a forward pass each, 12,800 training ones three: 40,400 passes.
    speed = Protocol(timed_steps=20, warmup_steps=5, inference_batch_sizes=())
    # Two spans of one step of 4 s, two observed steps and 20 of 128 are 3 x 3,072 = 9,216 passes.
    ratio = (estimate(cell, budget) - START_SECONDS) / (estimate(cell, speed) - START_SECONDS)
    assert ratio == pytest.approx(40_400 / 9_216)


def test_estimate_counts_a_trial_s_epochs_and_learns_nothing_of_one_that_ended_early():
    (cell,), protocol = grid(["resnet18"], ["fp32"], batch_sizes=(128,)), trial_protocol()
    recipe = replace(cell.train.recipe, epochs=2, validation=0.1)
    trial = replace(cell, train=replace(cell.train, recipe=recipe, limit_train=1_000))
    speed = Protocol(timed_steps=20, warmup_steps=5, inference_batch_sizes=())
    # Two epochs of 900 images, three passes each, and 100 to score: 5,600; see above for 9,216.
    seconds = [estimate(*each) - START_SECONDS for each in ((trial, protocol), (cell, speed))]
    assert seconds[0] / seconds[1] == pytest.approx(5_600 / 9_216)
    whole = estimate(replace(trial, train=replace(trial.train, limit_train=None)), protocol)
    assert whole - START_SECONDS == pytest.approx(10 * seconds[0]), "the embedded 10,000"
    ended = finished(trial, protocol, 15.0)
    ended = replace(ended, measurements=(no_validation("pruned", "why"),))
    for each in (trial, protocol), (cell, speed):
        assert estimate(*each, ended) == estimate(*each)


def test_estimate_is_calibrated_by_other_records_of_this_machine():
    (cell,), (other,) = grid(["resnet18"], ["fp32"]), grid(["resnet34"], ["fp32"])
    plain = estimate(cell, Protocol())
    twice = START_SECONDS + 2 * (estimate(other, Protocol()) - START_SECONDS)
    record = finished(other, Protocol(), twice)
    calibrated = estimate(cell, Protocol(), record)
    assert calibrated - START_SECONDS == pytest.approx(2 * (plain - START_SECONDS))
    foreign = replace(record, environment=replace(ENVIRONMENT, host="elsewhere"))
    failed = replace(record, status="failed", reason="crash")
    assert estimate(cell, Protocol(), foreign, failed) == plain


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_one_process_each_needs_no_interval() -> None:
    suite = override(get_suite("depths"), repeats=1)
    assert {(task.protocol.repeats, task.protocol.target_interval) for task in expand(suite)} == {
        (1, None)
    }
    more = override(get_suite("depths"), repeats=20)
    assert {task.protocol.target_interval for task in expand(more)} == {0.01}


def test_reference_trains_every_recipe_for_all_of_its_epochs_at_three_seeds():
    tasks = expand(reference())
    assert len(tasks) == 3 * len(REFERENCE)
    for task in tasks:
        train, recipe = task.cell.train, task.cell.train.recipe
        assert replace(train, data=DataConfig(), seed=0, precision=None) == replace(
            get_config(recipe.name), precision=None
        )
        steps = task.protocol.train_samples / recipe.global_batch_size
        assert steps == recipe.epochs * (50_000 // recipe.global_batch_size)
    assert {task.cell.train.seed for task in tasks} == {0, 1, 2}


def test_reference_can_be_tried_as_its_description_says():
    (told,) = re.findall(r"bench run reference --train-samples (\d+) --seeds 1", reference.__doc__)
    tasks = expand(override(reference(), train_samples=int(told), seeds=1))
    assert len(tasks) == len(REFERENCE)


def test_a_part_of_a_suite_is_chosen_by_model_recipe_and_precision():
    found = expand(only(reference(), ["resnet9-muon", "resnet18-muon"]))
    assert {task.cell.train.recipe.name for task in found} == {"resnet9-muon", "resnet18-muon"}
    assert len(found) == 6
    found = expand(only(get_suite("precisions"), ["bf16"]))
    assert {task.cell.precision for task in found} == {"bf16"}
    (task,) = expand(only(quick(), ["resnet20", "bf16"]))
    assert task.cell.label == "resnet20 bf16 b64"
    words = "bf16, default, fp32, resnet18"
    with pytest.raises(ConfigError, match=f"only: 'resnet19': choose some of {words}"):
        only(quick(), ["resnet19"])
    with pytest.raises(ConfigError, match="only: 'resnet9,resnet26-small': no cell of reference"):
        only(reference(), ["resnet9", "resnet26-small"])


def test_every_published_figure_is_of_a_recipe_in_the_suite():
    assert PUBLISHED.keys() <= set(REFERENCE)
