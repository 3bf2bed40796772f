"""Every way in which a step can differ from what was asked is forced on real steps, and told."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from conftest import make_dataset
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _get_current_dispatch_mode
from training import finish, reset_accelerate, save_weights, start, taught_by

from bench import judge, kernels, observe
from bench.job import CELL_FILE, RECORD_FILE, Job
from bench.judge import WRAPPERS, changes, mismatches, unproven
from bench.measure.subject import Subject
from bench.measure.training import measure_training
from bench.observe import Witness
from bench.placement import wrapper_of
from bench.protocol import Protocol
from bench.record_file import parse_record
from bench.spec import CAPTURE_STEPS, Cell, Task, grid
from cifar.config import CompileMode, Recipe, RunConfig
from cifar.data.config import parse_data
from cifar.data.loader import Batch
from cifar.losses import ComputeLoss, cross_entropy
from cifar.optim import build_optimizer
from cifar.serialize import to_json
from cifar.trainer import Trainer
from cifar.updates import SharpnessAware, descend

PROTOCOL = Protocol(warmup_steps=0, timed_steps=3, min_timed_seconds=0.0)
"""Step 1 is the first, 2 the observed one, 3 to 5 the window, 6 the other observed one; of a
compiled cell `CAPTURE_STEPS` come between the first two."""
IN_WINDOW = 4
LOSS = cross_entropy(0.0)
Act = Callable[[Trainer], object]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    cudnn = torch.backends.cudnn.allow_tf32
    yield
    for each in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
        each.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo without a code generator: graphs, guards and compiled regions are real."""
    monkeypatch.setattr("cifar.accelerator.check_compiler", lambda _: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()  # which compiles a function only so often
    yield
    torch._dynamo.reset()


def make_cell(precision: str = "fp32", **options: Any) -> Cell:
    options = {"recipe": Recipe(schedule="one-cycle"), **options}
    return grid(["resnet20-w4"], [precision], batch_sizes=(16,), **options)[0]


@pytest.fixture(autouse=True)
def kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 as torch computes it, whatever this CPU has kernels for."""
    monkeypatch.setattr("cifar.trainer.emulate_if_needed", lambda *_: False)


def make_subject(
    cell: Cell,
    protocol: Protocol = PROTOCOL,
    steps: int = 40,
    run: RunConfig = RunConfig(cpu=True),
    **trainer: Any,
) -> Subject:
    reset_accelerate()
    built = Trainer(cell.train, run, make_dataset(), train_samples=16 * steps, **trainer)
    return Subject(built, protocol)


def measured(subject: Subject) -> dict[str, Any]:
    list(measure_training(subject))
    return subject.witness.effective()


def told(cell: Cell, act: Act = lambda _: None, **trainer: Any) -> list[str]:
    """What is told of a cell whose trainer was tampered with before the first step."""
    subject = make_subject(cell, **trainer)
    act(subject.trainer)
    return mismatches(cell, measured(subject), "cpu")


def told_of_window(cell: Cell, act: Act, **trainer: Any) -> list[str]:
    """What is told when the trainer is tampered with in the middle of the timed window."""

    def tamper(trainer: Trainer) -> None:
        step = trainer.train_step
        then = IN_WINDOW + (CAPTURE_STEPS if cell.train.compile else 0)

        def train_step() -> None:
            step()
            if trainer.step == then:
                act(trainer)

        trainer.train_step = train_step

    return told(cell, tamper, **trainer)


def to_nhwc(trainer: Trainer) -> None:
    trainer.module.to(memory_format=torch.channels_last)


def wrap(trainer: Trainer) -> None:
    trainer.model = nn.Sequential(trainer.module)


def compile_it(trainer: Trainer) -> None:
    trainer.model = torch.compile(trainer.model)


def uncompile(trainer: Trainer) -> None:
    trainer.model = trainer.module


def cast(dtype: torch.dtype) -> Act:
    """Weights of another format, with an optimiser for them."""

    def act(trainer: Trainer) -> None:
        trainer.module.to(dtype)
        trainer.optimizer = build_optimizer(trainer.module, trainer.config.recipe)

    return act


def allow(backend: Any) -> Act:
    return lambda _: setattr(backend, "allow_tf32", True)


def scale_losses(trainer: Trainer) -> None:
    """By so much that the gradients of `steep` losses overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=0.999)
    trainer.scaler = trainer.accelerator.scaler = scaler


def in_doubles(_model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return LOSS(_model, replace(batch, images=batch.images.double()))


def with_another_pass(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    model(batch.images[:6])
    return LOSS(model, batch)


def steep(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    loss, logits = LOSS(model, batch)
    return loss * 1000, logits


def past_autocast(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Accelerate has put autocast around the instance's forward, not around the class's."""
    return LOSS(partial(type(model).forward, model), batch)


def under_autocast(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return LOSS(model, batch)


def asked(**values: tuple[object, object]) -> list[str]:
    return [f"{name}: {seen} where {wanted} was asked" for name, (seen, wanted) in values.items()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_asked_is_observed(precision: str, channels_last: bool) -> None:
    cell = make_cell(precision, channels_last=(channels_last,))
    effective = measured(make_subject(cell))
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    expected = {
        "device": "cpu",
        "wrapper": "ResNet",
        "autocast": "off" if precision == "fp32" else "bfloat16",
        "input_dtype": dtype,
        "weight_dtype": dtype,
        "parameter_dtype": "float32",
        "input_channels_last": channels_last,
        "weight_channels_last": channels_last,
        "compile": False,
        "timed_steps": 3,
        "samples_in_window": 48,
        "recompiles_in_window": 0,
        "changed_in_window": "",
        "steps": 6,
        "samples_seen": 96,
    }
    assert {name: effective[name] for name in expected} == expected
    assert mismatches(cell, effective, "cpu") == []


def test_another_device_is_told() -> None:
    """As of a launcher that was told to train on the CPU of a machine with a GPU."""
    effective = measured(make_subject(make_cell(), steps=4))
    assert mismatches(make_cell(), effective, "cuda") == asked(device=("cpu", "cuda"))


def test_native_instructions_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (False, True):
        monkeypatch.setattr(observe, "is_native", lambda name, _, n=native: n or name != "bf16")
        assert measured(make_subject(make_cell("bf16"), steps=4))["native_dtype"] is native
    assert measured(make_subject(make_cell(), steps=4))["native_dtype"] is True


def test_a_1x1_convolution_is_not_asked_for_its_memory_format() -> None:
    (cell,) = grid(["resnet50-w4"], ["fp32"], channels_last=(True,), batch_sizes=(16,))
    assert mismatches(cell, measured(make_subject(cell, steps=4)), "cpu") == []


def test_another_memory_format_is_told() -> None:
    formats = {"input_channels_last": (True, False), "weight_channels_last": (True, False)}
    assert told(make_cell(), to_nhwc) == asked(**formats)
    (text,) = told_of_window(make_cell(), to_nhwc)
    assert text == (
        "changed in the timed window: input_channels_last: False before, True after, "
        "weight_channels_last: False before, True after"
    )


def test_cast_weights_are_told() -> None:
    assert told(make_cell("bf16"), cast(torch.bfloat16)) == asked(
        parameter_dtype=("bfloat16", "float32")
    )
    assert told(make_cell(), cast(torch.float64), compute_loss=in_doubles) == asked(
        input_dtype=("float64", "float32"),
        weight_dtype=("float64", "float32"),
        parameter_dtype=("float64", "float32"),
    )


@pytest.mark.parametrize(
    ("precision", "loss", "seen", "wanted"),
    [
        ("bf16", past_autocast, ("off", "float32"), ("bfloat16", "bfloat16")),
        ("fp32", under_autocast, ("bfloat16", "bfloat16"), ("off", "float32")),
    ],
)
def test_autocast_of_another_kind_is_told(
    precision: str, loss: ComputeLoss, seen: tuple[str, str], wanted: tuple[str, str]
) -> None:
    past = loss is past_autocast  # and past the model
    bypassed = {"forward_passes": (0, 1), "micro_batch_size": ("unobserved", 16)} if past else {}
    assert told(make_cell(precision), compute_loss=loss) == asked(
        **bypassed,
        autocast=(seen[0], wanted[0]),
        input_dtype=(seen[1], wanted[1]),
        weight_dtype=(seen[1], wanted[1]),
    )


def test_another_number_of_passes_and_another_micro_batch_are_told() -> None:
    whole = make_cell()
    cell = replace(whole, train=replace(whole.train, accumulation_steps=2))
    effective = measured(make_subject(cell))
    assert (effective["forward_passes"], effective["micro_batch_size"]) == (2, 8)
    assert mismatches(cell, effective, "cpu") == []
    others = asked(forward_passes=(2, 1), micro_batch_size=(8, 16))
    assert mismatches(whole, effective, "cpu") == others
    assert told(cell, compute_loss=with_another_pass) == asked(
        forward_passes=(4, 2), micro_batch_size=("6, 8, 6, 8", 8)
    )


def test_the_second_pass_of_sam_is_asked_for() -> None:
    cell = make_cell(recipe=Recipe(sam_rho=0.05))
    assert told(cell) == []
    assert told(make_cell(), update=SharpnessAware(0.05)) == asked(forward_passes=(2, 1))


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (("highest", "none", "none"), {}),
        (("highest", "ieee", "ieee"), {}),
        (
            ("medium", None, "none"),
            {
                "tf32_matmul": (True, False),
                "float32_matmul_precision": ("medium", "highest"),
                "onednn_matmul": ("bf16", "ieee"),
            },
        ),
        (
            ("highest", "tf32", "none"),
            {
                "float32_matmul_precision": ("mixed", "highest"),
                "onednn_matmul": ("tf32", "ieee"),
            },
        ),
        (("highest", "none", "bf16"), {"onednn_convolution": ("bf16", "ieee")}),
    ],
)
def test_what_a_cpu_computes_fp32_in_is_told(
    setting: tuple[str, str | None, str], seen: dict[str, tuple[object, object]]
) -> None:
    def switch(_: Trainer) -> None:
        precision, matmul, convolution = setting
        torch.set_float32_matmul_precision(precision)
        if matmul is not None:
            torch.backends.mkldnn.matmul.fp32_precision = matmul
        torch.backends.mkldnn.conv.fp32_precision = convolution

    assert told(make_cell(), switch) == asked(**seen)


@pytest.mark.parametrize(
    ("name", "backend", "also"),
    [
        ("tf32_matmul", torch.backends.cuda.matmul, {"float32_matmul_precision": "high"}),
        ("tf32_convolution", torch.backends.cudnn, {}),
    ],
)
def test_tf32_is_told_of_both_kinds_of_operation(
    name: str, backend: Any, also: dict[str, str]
) -> None:
    further = {each: (value, "highest") for each, value in also.items()}
    assert told(make_cell(), allow(backend)) == asked(**{name: (True, False)}, **further)
    (text,) = told_of_window(make_cell(), allow(backend))
    assert text.startswith(f"changed in the timed window: {name}: False before, True after")


def test_nvidia_s_variable_overrides_the_tf32_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    both = asked(tf32_matmul=(True, False), tf32_convolution=(True, False))
    assert told(make_cell()) == both
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert told(make_cell(), allow(torch.backends.cudnn)) == []


def test_loss_scaling_and_the_steps_it_skips_are_told() -> None:
    scaling, skips = told(make_cell(), scale_losses, compute_loss=steep)
    assert [scaling] == asked(loss_scaling=(True, False))
    assert skips.startswith("skipped 3 of 3 steps in the timed window")


def test_one_skipped_step_is_how_a_scale_is_sought() -> None:
    effective = {**measured(make_subject(make_cell(), steps=8)), "skipped_steps_in_window": 1}
    assert mismatches(make_cell(), effective, "cpu") == []
    effective |= {"skipped_steps_in_window": 2}
    assert len(mismatches(make_cell(), effective, "cpu")) == 1
    effective |= {"timed_steps": 2000, "samples_in_window": 32_000}
    assert mismatches(make_cell(), effective, "cpu") == []


def test_the_wrong_number_of_processes_is_told_and_a_missing_wrapper() -> None:
    cell = make_cell()
    assert told(replace(cell, num_processes=2)) == asked(
        num_processes=(1, 2),
        devices=(1, 2),
        backend=("none", "gloo"),
        wrapper=("ResNet", "DistributedDataParallel"),
        micro_batch_size=(16, 8),
    )
    (text,) = told_of_window(cell, wrap)
    assert text == "changed in the timed window: wrapper: ResNet before, Sequential after"


def test_a_label_that_comes_or_goes_is_a_change() -> None:
    before = {"device": "cpu", "loss_scale": 8.0, "gradient_hook": "none"}
    after = {"device": "cpu", "recompiles": 3, "batch_norm": "per device"}
    assert changes(before, after) == (
        "gradient_hook: none before, unobserved after, "
        "batch_norm: unobserved before, per device after"
    )
    assert changes(before, {**before, "loss_scale": 4.0}) == ""


SHARED_OUT = {"weights_held": 0.5, "weights_updated": 0.5}


@pytest.mark.parametrize(
    ("launcher", "seen", "phrase"),
    [
        *((name, {}, "") for name in WRAPPERS),
        ("ddp", {"weights_held": 1.0, "weights_updated": 1.0}, ""),
        ("zero2", {"weights_held": 1.0}, ""),
        ("fsdp", {"wrapper": WRAPPERS["ddp"]}, "wrapper: DistributedDataParallel where FSDP2 was"),
        ("zero3", {"wrapper": "ZeRO-2"}, "wrapper: ZeRO-2 where ZeRO-3 was asked"),
        ("fsdp", {"weights_held": 1.0}, "weights_held: 1.0 where a share was asked"),
        ("zero3", {"weights_held": 1.0}, "weights_held: 1.0 where a share was asked"),
        ("zero1", {"weights_updated": 1.0}, "weights_updated: 1.0 where a share was asked"),
        ("zero2", {"backend": "nccl"}, "backend: nccl where gloo was asked"),
        ("ddp", {"devices": 1}, "devices: 1 where 2 was asked"),
        ("fsdp", {"num_processes": 1}, "num_processes: 1 where 2 was asked"),
    ],
)
def test_another_engine_than_the_launchers_is_told(
    launcher: str, seen: dict[str, object], phrase: str
) -> None:
    one = make_cell()
    two = {"num_processes": 2, "devices": 2, "backend": "gloo", "wrapper": WRAPPERS[launcher]}
    own_way = {"batch_norm": "per device", "gradient_hook": "none", "bucket_bytes": 25 * 2**20}
    half = {"micro_batch_size": 8}
    effective = measured(make_subject(one)) | two | own_way | half | SHARED_OUT | seen
    told = mismatches(replace(one, launcher=launcher, num_processes=2), effective, "cpu")
    assert len(told) == bool(phrase) and "".join(told).startswith(phrase)


class DeepSpeedEngine(nn.Linear):
    """Stands in for DeepSpeed's, which was configured with stage 2."""

    def zero_optimization_stage(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("optimizer", "shares_weights", "seen"),
    [
        (SimpleNamespace(partition_gradients=False), False, "ZeRO-1"),
        (SimpleNamespace(partition_gradients=True), False, "ZeRO-2"),
        (SimpleNamespace(), True, "ZeRO-3"),
        (SimpleNamespace(), False, "ZeRO-0"),
    ],
)
def test_the_stage_is_what_deepspeeds_optimizer_does(
    optimizer: SimpleNamespace, shares_weights: bool, seen: str
) -> None:
    engine = DeepSpeedEngine(1, 1)
    engine.optimizer = optimizer
    if shares_weights:
        engine.weight.ds_tensor = torch.zeros(1)
    trainer: Any = SimpleNamespace(model=engine, wrapped=engine, module=engine)
    assert wrapper_of(trainer) == seen


def test_one_process_of_an_engine_runs_the_engine_too() -> None:
    cell, effective = make_cell(), measured(make_subject(make_cell()))
    assert mismatches(replace(cell, launcher="fsdp"), effective, "cpu") == asked(
        backend=("none", "gloo"), wrapper=("ResNet", "FSDP2")
    )


def test_samples_that_an_update_leaves_out_are_told() -> None:
    def update(trainer: Trainer, forward_backward: Callable[[], None]) -> None:
        descend(trainer, (lambda: None) if trainer.step == IN_WINDOW else forward_backward)

    assert told(make_cell(), update=update) == asked(
        samples_in_window=(32, 48), samples_seen=(80, 96)
    )


def test_a_step_that_does_not_run_the_network_is_told() -> None:
    def update(trainer: Trainer, forward_backward: Callable[[], None]) -> None:
        trainer.optimizer_step()

    texts = told(make_cell(), update=update)
    assert "input_dtype: unobserved where float32 was asked" in texts
    assert "samples_in_window: 0 where 48 was asked" in texts


@pytest.mark.usefixtures("quick_compiler")
def test_compiled_code_where_eager_was_asked_is_told() -> None:
    assert "compile: True where False was asked" in told(make_cell(), compile_it)


@pytest.mark.usefixtures("quick_compiler")
def test_eager_code_where_compiled_was_asked_is_told() -> None:
    cell = make_cell(compile=(True,))
    assert told(cell) == []
    assert told(cell, uncompile) == asked(compile=(False, True))
    (text,) = told_of_window(cell, uncompile)
    assert text == "changed in the timed window: compile: True before, False after"


@pytest.mark.usefixtures("quick_compiler")
def test_what_the_replay_of_a_graph_does_not_show_is_told_of_its_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = make_cell("bf16", compile=(True,))
    witness = Witness(make_subject(cell, steps=4).trainer)
    with witness.recording():
        witness._trainer.train_step()
    monkeypatch.setattr(kernels, "_CONVOLUTION", "nothing")
    with witness.recording():
        witness._trainer.train_step()
    seen = witness._observe_step()
    assert seen["input_dtype"] == seen["weight_dtype"] == "bfloat16"


@pytest.mark.usefixtures("quick_compiler")
def test_a_format_that_compiled_code_never_shows_is_not_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_CONVOLUTION", "nothing")
    cell = make_cell(compile=(True,), channels_last=(True,))
    effective = measured(make_subject(cell, steps=4))
    assert mismatches(cell, effective, "cpu") == []
    names = ("input_dtype", "weight_dtype", "input_channels_last", "weight_channels_last")
    assert unproven(cell.train, effective) == [
        f"{name} of a convolution was not seen in the compiled code" for name in names
    ]


@pytest.mark.usefixtures("quick_compiler")
def test_formats_in_compiled_code_are_observed() -> None:
    cell = make_cell("bf16", compile=(True,), channels_last=(True,))
    effective = measured(make_subject(cell, steps=4))
    assert effective["input_dtype"] == effective["weight_dtype"] == "bfloat16"
    assert effective["input_channels_last"] is effective["weight_channels_last"] is True
    assert mismatches(cell, effective, "cpu") == []


@pytest.mark.usefixtures("quick_compiler")
def test_layouts_that_the_compiler_chose_are_no_mismatch() -> None:
    """Inductor turns wide convolutions of contiguous nets to channels-last by itself."""
    assert told(make_cell(compile=(True,)), to_nhwc) == []


@pytest.mark.usefixtures("quick_compiler")
def test_a_teacher_s_formats_are_not_taken_for_the_student_s(tmp_path: Path) -> None:
    other = make_subject(make_cell()).trainer
    distillation = taught_by(save_weights(tmp_path / "teacher", other))
    cell = make_cell(compile=(True,))

    def in_bf16(trainer: Trainer) -> None:
        trainer.teacher.network = replace(trainer.teacher.network, precision="bf16")

    taught = replace(cell, train=replace(cell.train, distillation=distillation))
    assert told(taught, in_bf16) == []


@pytest.mark.usefixtures("quick_compiler")
def test_a_recompilation_in_the_window_is_told() -> None:
    def another_shape(trainer: Trainer) -> None:
        trainer.model(torch.zeros(3, 3, 16, 16))

    (text,) = told_of_window(make_cell(compile=(True,)), another_shape)
    assert text == "recompiled 1 times in the timed window"


@pytest.mark.usefixtures("quick_compiler")
def test_a_recompilation_in_the_warm_up_is_told() -> None:
    def another_shape(trainer: Trainer) -> None:
        step = trainer.train_step

        def train_step() -> None:
            step()
            if trainer.step == 2:
                trainer.model(torch.zeros(3, 3, 16, 16))

        trainer.train_step = train_step

    cell = make_cell(compile=(True,))
    assert told(cell, another_shape) == ["recompiled 1 times before the timed window"]
    sam = make_cell(compile=(True,), recipe=Recipe(sam_rho=0.05))
    assert told(sam) == []


@pytest.mark.parametrize(("breaks", "is_told"), [(0, True), (2, False)])
def test_blocks_that_are_compiled_apart_for_graph_breaks_are_no_recompilation(
    breaks: int, is_told: bool
) -> None:
    seen = {"recompiles_before_window": 3, "graph_breaks": breaks}
    phrases = list(judge._early_recompiles(make_cell(compile=(True,)).train, seen))
    assert phrases == ["recompiled 3 times before the timed window"] * is_told


@pytest.mark.parametrize("mode", get_args(CompileMode))
def test_the_compiler_s_mode_is_seen_in_its_switches(mode: CompileMode) -> None:
    compiled = torch.compile(nn.Linear(2, 2), mode=mode)
    assert observe._compile_mode(compiled) == mode
    with torch._inductor.config.patch({"max_autotune": True}):
        assert observe._compile_mode(torch.compile(nn.Linear(2, 2))).startswith("max-autotune")


@pytest.mark.usefixtures("quick_compiler")
def test_another_mode_of_the_compiler_is_told() -> None:
    def tune(trainer: Trainer) -> None:
        switches = {"max_autotune": True, "triton.cudagraphs": True}
        trainer.model.get_compiler_config = lambda: switches

    assert told(make_cell(compile=(True,)), tune) == asked(compile_mode=("max-autotune", "default"))


@pytest.mark.usefixtures("quick_compiler")
def test_cuda_graphs_that_the_compiler_left_out_are_told() -> None:
    """The counter is Inductor's; here something else counts in the first step."""
    counters["inductor"]["cudagraph_skips"] += 5  # of another model
    cell = make_cell(compile=(True,))
    subject = make_subject(cell, steps=4)

    def skip(*_: object) -> None:
        counters["inductor"]["cudagraph_skips"] += 2
        handle.remove()

    handle = subject.trainer.module.register_forward_pre_hook(torch._dynamo.disable(skip))
    effective = measured(subject)
    assert effective["cudagraph_skips"] == 2

    def judged(mode: str, **changes: object) -> list[str]:
        other = replace(cell, train=replace(cell.train, compile_mode=mode))
        seen = {**effective, **changes}
        return mismatches(other, seen, seen["device"])

    skipped = "compile_mode: CUDA graphs skipped 2 times: {} was asked"
    assert judged("default") == judged("max-autotune") == []
    assert judged("reduce-overhead") == [skipped.format("reduce-overhead")]
    assert judged("reduce-overhead", cudagraph_skips=0) == []
    assert judged("max-autotune", device="cuda") == [skipped.format("max-autotune")]
    assert judged("default", device="cuda") == []


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.usefixtures("quick_compiler")
def test_graph_breaks_are_counted() -> None:
    def broken(trainer: Trainer) -> None:
        trainer.module.layer2.register_forward_hook(lambda *_: torch._dynamo.graph_break())

    cell = make_cell(compile=(True,))
    subject = make_subject(cell, steps=4)
    broken(subject.trainer)
    assert measured(subject)["graph_breaks"] > 0


@pytest.mark.slow
def test_code_of_the_true_compiler_is_observed() -> None:
    cell = make_cell(compile=(True,), channels_last=(True,))
    effective = measured(make_subject(cell, steps=4))
    assert effective["compile"] is True
    assert effective["input_dtype"] == effective["weight_dtype"] == "float32"
    assert mismatches(cell, effective, "cpu") == []
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_what_was_asked_is_observed_on_a_gpu(precision: str, compiled: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 0) and precision in ("bf16", "tf32"):
        pytest.skip(f"this GPU has no {precision}")
    cell = make_cell(precision, channels_last=(True,), compile=(compiled,))
    effective = measured(make_subject(cell, run=RunConfig()))
    assert mismatches(cell, effective, "cuda") == unproven(cell.train, effective) == []
    asked = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    assert effective["input_dtype"] == effective["weight_dtype"] == asked
    assert effective["device"] == "cuda"
    assert effective["native_dtype"] is True
    assert ("loss_scale" in effective) == (precision == "fp16")
    torch._dynamo.reset()


@pytest.mark.gpu
def test_cuda_graphs_run_where_they_are_asked_for() -> None:
    cell = make_cell(compile=(True,))
    cell = replace(cell, train=replace(cell.train, compile_mode="reduce-overhead"))
    effective = measured(make_subject(cell, run=RunConfig()))
    assert effective["cudagraph_skips"] == 0
    assert mismatches(cell, effective, "cuda") == unproven(cell.train, effective) == []
    assert effective["input_dtype"] == effective["weight_dtype"] == "float32"
    torch._dynamo.reset()


def test_nothing_watches_inside_the_window() -> None:
    watched: dict[int, bool] = {}

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        hooks = [layer for layer in model.modules() if layer._forward_hooks]
        watched[subject.trainer.step + 1] = bool(hooks)
        assert _get_current_dispatch_mode() is None
        return LOSS(model, batch)

    subject = make_subject(make_cell(), steps=8, compute_loss=loss)
    measured(subject)
    assert [step for step, seen in watched.items() if seen] == [2, 6]


def test_observed_steps_train_as_others_do() -> None:
    cell = make_cell("bf16")
    observed, other = make_subject(cell, steps=8), make_subject(cell, steps=8).trainer
    measured(observed)
    for _ in range(observed.trainer.step):
        other.train_step()
    for name, tensor in observed.trainer.weights().items():
        assert torch.equal(tensor, other.weights()[name]), name


@pytest.mark.parametrize(("steps", "timed"), [(4, 1), (6, 3)])
def test_a_small_budget_is_never_exceeded(steps: int, timed: int) -> None:
    subject = make_subject(make_cell(), steps=steps)
    effective = measured(subject)
    assert subject.trainer.step == effective["steps"] == steps
    assert effective["timed_steps"] == timed
    assert effective["changed_in_window"] == ""
    assert mismatches(make_cell(), effective, "cpu") == []


TAMPERED = """
import os, sys
from pathlib import Path
import torch
from bench import worker
class Tampered(worker.Trainer):
    def _build_model(self, *words):
        super()._build_model(*words)
        if os.environ["RANK"] == "1":
            self.module.to(memory_format=torch.channels_last)
worker.Trainer = Tampered
sys.exit(worker.main(Path(sys.argv[1])))
"""


@pytest.mark.multiprocess
def test_what_differs_in_another_process_fails_the_record(npz: Path, tmp_path: Path) -> None:
    cell = make_cell(num_processes=2, data=parse_data(f"npz:{npz}"))
    protocol = replace(PROTOCOL, inference_batch_sizes=(1,), inference_iterations=1)
    (tmp_path / CELL_FILE).write_text(to_json(Job(task=Task(cell=cell, protocol=protocol))))
    script = tmp_path / "tampered.py"
    script.write_text(TAMPERED)
    words = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, tmp_path)
    code, _, err = finish(start(*words))
    assert code != 0, err
    record = parse_record((tmp_path / RECORD_FILE).read_text())
    assert record.status == "failed", err
    assert record.reason.startswith("rank 1: input_channels_last: True where False was asked")
    assert record.effective["wrapper"] == "DistributedDataParallel"
    assert record.effective["input_channels_last"] is False
    assert record.effective["samples_in_window"] == 48


PLAIN = """
import os, sys
from pathlib import Path
from bench import worker
if os.environ["RANK"] == "1":
    os.environ["LOCAL_RANK"] = "0"
sys.exit(worker.main(Path(sys.argv[1])))
"""


@pytest.mark.multiprocess
def test_a_cell_that_asked_for_fsdp_and_got_ddp_on_one_device_is_a_failed_record(
    npz: Path, tmp_path: Path
) -> None:
    cell = make_cell(num_processes=2, launcher="fsdp", data=parse_data(f"npz:{npz}"))
    protocol = replace(PROTOCOL, inference_batch_sizes=(1,), inference_iterations=1)
    (tmp_path / CELL_FILE).write_text(to_json(Job(task=Task(cell=cell, protocol=protocol))))
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    words = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, tmp_path)
    _, _, err = finish(start(*words))
    record = parse_record((tmp_path / RECORD_FILE).read_text())
    assert record.status == "failed", err
    for phrase in (
        "devices: 1 where 2 was asked",
        "wrapper: DistributedDataParallel where FSDP2 was asked",
        "weights_held: 1.0 where a share was asked",
    ):
        assert phrase in record.reason
