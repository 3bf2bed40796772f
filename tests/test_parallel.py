"""What several processes exchange: options, refusals, and what each changes in real runs of two."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_dataset
from test_anatomy import FakeClock
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import ROOT, TINY, finish, make_trainer, reset_accelerate, start, tiny_recipe

from bench.judge import mismatches
from bench.measure import anatomy, ranks
from bench.measure.anatomy import measure_anatomy
from bench.measure.ranks import measure_ranks
from bench.measure.subject import Subject
from bench.protocol import Protocol
from bench.spec import Cell
from cifar.config import Parallel, RunConfig, TrainConfig
from cifar.errors import ConfigError, UnsupportedError
from cifar.exchange import HOOKS, LocalSteps
from cifar.serialize import contents, digest
from cifar.sync_batch_norm import CpuSyncBatchNorm, batch_norm_of, synchronize_norms
from cifar.trainer import Trainer
from cifar.training_state import live_tensors

STEPS = 4
"""Of every training: an epoch of three and one more, in rounds of two local steps."""
EXCHANGES: dict[str, Parallel] = {
    "ddp": Parallel(),
    "bucket": Parallel(bucket_mib=0.05),
    "after": Parallel(overlap=False, bucket_mib=0.05),
    "bf16": Parallel(compression="bf16"),
    "bf16 after": Parallel(compression="bf16", overlap=False, bucket_mib=0.05),
    "local": Parallel(local_steps=2),
    "sync": Parallel(sync_batch_norm=True),
}


# --- Options ---


def test_defaults_enter_no_digest_and_have_no_label() -> None:
    assert contents(TrainConfig()) == {}
    assert digest(TrainConfig(parallel=Parallel())) == digest(TrainConfig())
    assert digest(TrainConfig(parallel=Parallel(local_steps=2))) != digest(TrainConfig())
    assert Parallel().label == ""
    whole = Parallel(sync_batch_norm=True, bucket_mib=0.5, overlap=False, compression="bf16")
    assert whole.label == "sync-bn bucket0.5 no-overlap bf16-gradients"
    assert Parallel(local_steps=4).label == "local4"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bucket_mib": 0.0}, "bucket-mib: 0.0: give 0.001 to 65536"),
        ({"bucket_mib": float("nan")}, "bucket-mib: nan: give"),
        ({"local_steps": 0}, "local-steps: 0: give 1 to 65536"),
        ({"local_steps": 4, "overlap": False}, "overlap: False: not with --local-steps 4"),
        ({"local_steps": 4, "compression": "bf16"}, "compression: 'bf16': not with --local-steps"),
        ({"local_steps": 4, "sync_batch_norm": True}, "sync-batch-norm: True: not with --local-"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        Parallel(**fields)


def test_a_configuration_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"^sync-batch-norm: True: not with --compile"):
        TrainConfig(compile=True, parallel=Parallel(sync_batch_norm=True))
    with pytest.raises(ConfigError, match=r"^local-steps: 2: not with --precision fp16"):
        TrainConfig(precision="fp16", parallel=Parallel(local_steps=2))


@pytest.mark.parametrize("parallel", [each for each in EXCHANGES.values() if each.label])
def test_one_process_and_other_engines_refuse_every_exchange(parallel: Parallel) -> None:
    with pytest.raises(
        ConfigError, match="is for several processes, which average something; start 2"
    ):
        parallel.check_launch("ddp", 1)
    with pytest.raises(UnsupportedError, match="is for ddp, not for zero3; launch with"):
        parallel.check_launch("zero3", 2)
    parallel.check_launch("ddp", 2)
    with pytest.raises(ConfigError, match="is for several processes"):
        make_trainer(parallel=parallel)
    train = TrainConfig(precision="fp32", parallel=parallel)
    assert Cell(train=train, num_processes=2).label == f"resnet18 fp32 b128 x2 {parallel.label}"
    with pytest.raises(UnsupportedError, match="is for ddp, not for fsdp"):
        Cell(train=train, num_processes=2, launcher="fsdp")


def test_every_hook_that_is_asked_for_exists() -> None:
    names = {each.gradient_hook for each in EXCHANGES.values()}
    assert names - {"none"} == set(HOOKS)


def test_rounds_end_after_so_many_steps_and_with_epochs_and_the_run() -> None:
    rounds = LocalSteps(4, steps_per_epoch=6, total_steps=15)
    assert [step for step in range(1, 16) if rounds.end_at(step)] == [4, 6, 8, 12, 15]
    assert [rounds.whole(steps) for steps in (1, 4, 5)] == [4, 4, 8]
    assert all(LocalSteps(1, 6, 15).end_at(step) for step in range(16))


@pytest.mark.parametrize("name", ["save_every", "check_every"])
def test_a_run_is_not_saved_within_a_round(name: str) -> None:
    rounds = LocalSteps(4, 6, 15)
    rounds.check_intervals(RunConfig(**{name: 8}))
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^{option}: 6: give a multiple of --local-steps 4"):
        rounds.check_intervals(RunConfig(**{name: 6}))


# --- BatchNorm ---


def test_norms_are_replaced_with_their_tensors() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(2)))
    before = dict(module.state_dict(keep_vars=True))
    assert batch_norm_of(module) == "per device"
    synchronize_norms(module, torch.device("cpu"))
    assert batch_norm_of(module) == "synchronised"
    after = module.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert batch_norm_of(nn.Linear(2, 2)) == ""
    synchronize_norms(gpus := nn.Sequential(nn.BatchNorm2d(4)), torch.device("cuda"))
    assert type(gpus[0]) is nn.SyncBatchNorm


def test_a_norm_that_does_more_and_a_network_without_any_are_refused() -> None:
    class Activated(nn.BatchNorm2d):
        pass

    with pytest.raises(UnsupportedError, match="the model's Activated does more than BatchNorm"):
        synchronize_norms(nn.Sequential(Activated(4), nn.BatchNorm2d(4)), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="no layer is a BatchNorm"):
        synchronize_norms(nn.Sequential(nn.Linear(4, 4)), torch.device("cpu"))


@pytest.mark.parametrize("training", [True, False])
def test_one_process_alone_normalises_as_batch_norm_does(training: bool) -> None:
    own, torchs = CpuSyncBatchNorm(4), nn.BatchNorm2d(4)
    images = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    results = [each.train(training)(images) for each in (own, torchs)]
    assert torch.equal(*results)
    assert torch.equal(own.running_var, torchs.running_var)


# --- Two processes ---


def norm_of_a_share(rank: int, count: int) -> dict[str, torch.Tensor]:
    """Output, running statistics and gradients of a norm over a rank's rows of eight images."""
    random = torch.Generator().manual_seed(0)
    images = 3 + 2 * torch.randn(8, 4, 5, 5, generator=random, dtype=torch.float32)
    wanted = torch.randn(8, 4, 5, 5, generator=random)
    share = slice(rank * 8 // count, (rank + 1) * 8 // count)
    norm = CpuSyncBatchNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    mine = images[share].requires_grad_()
    output = norm(mine)
    (output * wanted[share]).sum().backward()
    return {"output": output.detach(), "gradient": mine.grad, "weight": norm.weight.grad,
            "bias": norm.bias.grad, "mean": norm.running_mean, "var": norm.running_var}  # fmt: skip


def train(name: str) -> tuple[Trainer, list[float]]:
    """A trainer after its steps, and the global mean loss so far after each of them."""
    reset_accelerate()
    config = TrainConfig(model=TINY, recipe=tiny_recipe(ema_decay=0.5), parallel=EXCHANGES[name])
    on_gpu = os.environ.get("EXCHANGE_ON") == "cuda"
    trainer = Trainer(config, RunConfig(cpu=not on_gpu), make_dataset())
    losses = []
    for _ in range(STEPS):
        trainer.train_step()
        losses.append(trainer.meter.train_metrics().loss)
    return trainer, losses


def facts(name: str) -> dict[str, Any]:
    """What two processes learn by an exchange, and what DDP says of how."""
    trainer, losses = train(name)
    wrapped = trainer.wrapped
    assert isinstance(wrapped, DistributedDataParallel)
    told = wrapped._get_ddp_logging_data()
    tensors = {**trainer.weights(), **{f"ema.{k}": v for k, v in trainer.eval_weights().items()}}
    state = {f"state.{n}": each["momentum_buffer"]
             for n, each in enumerate(trainer.optimizer.state.values())}  # fmt: skip
    floats = {k: v.double().sum().item() for k, v in {**tensors, **state}.items() if v.ndim}
    return {
        "losses": losses,
        "sums": floats,
        "buckets": len(str(told["rebuilt_bucket_sizes"]).split(","))
        if "rebuilt_bucket_sizes" in told
        else 0,
        "hook": told.get("comm_hook", ""),
        "rounds": trainer.rounds.ended,
        "top1": trainer.evaluate().samples,
    }


def timed(name: str, rank: int) -> list[Any]:
    """What is measured of ranks whose steps take 1 s and 2 s, and an average another 4 s.

    On a clock that stands still otherwise: the ranks' steps, the straggler ratio, communication,
    and whether all is as it was.
    """
    trainer, _ = train(name)
    trainer.rounds = LocalSteps(trainer.config.parallel.local_steps, 1000, 1000)  # no epoch ends
    step, end = trainer.train_step, trainer.rounds.end_if_due

    def slow_step() -> None:
        FakeClock.now += 1.0 + rank
        step()

    def slow_end(number: int, *rest: Any) -> None:
        FakeClock.now += 4.0 * trainer.rounds.end_at(number)
        end(number, *rest)

    FakeClock.made = []
    ranks.make_clock = anatomy.make_clock = FakeClock
    trainer.train_step, trainer.rounds.end_if_due = slow_step, slow_end
    before = {key: tensor.clone() for key, tensor in live_tensors(trainer).items()}
    subject = Subject(trainer, Protocol(timed_steps=3, min_timed_seconds=0.0))
    found = {each.name: each for each in (*measure_ranks(subject), *measure_anatomy(subject))}
    after = live_tensors(trainer)
    same = all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    names = ("rank_step", "straggler_ratio", "step_communication")
    told = [found[each].samples or found[each].reason for each in names]
    return [*told, same and trainer.step == STEPS]


TWO = """
import json, os, sys
import accelerate
import torch
import torch.distributed as dist
from cifar.distributed import leave
from cifar.exchange import average_tensors
import test_parallel
from test_parallel import EXCHANGES, facts, norm_of_a_share, timed

test_parallel.reset_accelerate = accelerate.state.AcceleratorState._reset_state
found = {name: facts(name) for name in EXCHANGES}
rank = dist.get_rank()
if os.environ["EXCHANGE_ON"] == "cuda":
    everyone = [None, None]
    dist.all_gather_object(everyone, [found, {}])
    if rank == 0:
        print("RESULT", json.dumps(everyone))
    leave()
    sys.exit()
values = {name: tensor.tolist() for name, tensor in norm_of_a_share(rank, 2).items()}
tensors = [torch.tensor([1.0, 1 / 3]) * (1 + 2 * rank), torch.full((2,), 0.1)]
tensors.append(torch.ones(2, 2).half())
average_tensors(tensors)
found["average"] = [tensor.tolist() for tensor in tensors]
found["timed"] = {name: timed(name, rank) for name in ("ddp", "local", "sync")}
everyone = [None, None]
dist.all_gather_object(everyone, [found, values])
if rank == 0:
    print("RESULT", json.dumps(everyone))
leave()
"""


def run_two(folder: Path, device: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each of two processes found: by exchange, and of its share of a norm."""
    script = folder / "two.py"
    script.write_text(TWO)
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "EXCHANGE_ON": device}
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2, script,
                    environment=environment)  # fmt: skip
    code, out, err = finish(process)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_two(tmp_path_factory.mktemp("two"), "cpu")


@pytest.mark.multiprocess
class TestTwoProcesses:
    def test_all_state_is_equal_after_the_last_step_of_a_round(self, two: Any) -> None:
        (first, _), (second, _) = two
        for name in EXCHANGES:
            equal = {key: first[name]["sums"][key] == each
                     for key, each in second[name]["sums"].items()}  # fmt: skip
            # DDP leaves BatchNorm's statistics to each device; evaluation takes the first one's.
            own = {key for key, same in equal.items() if not same}
            assert all("running" in key for key in own), (name, own)
            assert bool(own) == (name not in ("local", "sync")), name

    def test_buckets_and_overlap_change_nothing_that_is_learnt(self, two: Any) -> None:
        (found, _), _ = two
        for name in ("bucket", "after"):
            assert found[name]["sums"] == found["ddp"]["sums"], name
            assert found[name]["buckets"] > found["ddp"]["buckets"] == 1
        assert found["after"]["hook"] == "after_backward"
        assert found["ddp"]["hook"] == ""

    def test_bf16_gradients_change_it_little_and_equally_at_any_time(self, two: Any) -> None:
        (found, _), _ = two
        assert found["bf16"]["sums"] == found["bf16 after"]["sums"]
        assert found["bf16"]["sums"] != found["ddp"]["sums"]
        assert found["bf16"]["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-2)
        assert found["bf16"]["losses"] != found["ddp"]["losses"]

    def test_local_steps_average_all_state_at_the_ends_of_rounds(self, two: Any) -> None:
        (found, _), _ = two
        assert found["local"]["rounds"] == 3, "after steps 2, 3 (of the epoch) and 4"
        assert found["ddp"]["rounds"] == 0
        # The first loss is of the common start; later ones of each process's own weights.
        assert found["local"]["losses"][0] == found["ddp"]["losses"][0]
        assert found["local"]["losses"][1] != found["ddp"]["losses"][1]
        assert found["local"]["losses"] == pytest.approx(found["ddp"]["losses"], rel=0.1)

    def test_synchronised_statistics_train_two_halves_as_one_batch(self, two: Any) -> None:
        (found, _), _ = two
        trainer, losses = train("ddp")
        assert found["sync"]["losses"] == pytest.approx(losses, rel=1e-5)
        for name, tensor in trainer.weights().items():
            if tensor.ndim:
                total = tensor.double().sum().item()
                close = pytest.approx(total, rel=1e-5, abs=1e-5)
                assert found["sync"]["sums"][name] == close, name
        assert found["ddp"]["losses"] != pytest.approx(losses, rel=1e-5), "per device"

    def test_a_norm_of_two_shares_by_autograd_of_the_whole(self, two: Any) -> None:
        whole = norm_of_a_share(0, 1)
        shares = [values for _, values in two]
        for name in ("output", "gradient"):
            joined = torch.tensor(shares[0][name] + shares[1][name])
            torch.testing.assert_close(joined, whole[name], rtol=1e-5, atol=1e-5)
        for name in ("weight", "bias"):  # each its own images'; DDP adds them up
            added = torch.tensor(shares[0][name]) + torch.tensor(shares[1][name])
            torch.testing.assert_close(added, whole[name], rtol=1e-5, atol=1e-5)
        for name in ("mean", "var"):
            assert shares[0][name] == shares[1][name]
            torch.testing.assert_close(torch.tensor(shares[0][name]), whole[name])

    def test_an_average_is_in_place_and_leaves_equal_values_alone(self, two: Any) -> None:
        (found, _), _ = two
        ones, equal, halves = found["average"]
        assert ones == pytest.approx([2.0, 2 / 3])
        assert equal == torch.full((2,), 0.1).tolist()
        assert halves == [[1.0, 1.0], [1.0, 1.0]]

    def test_every_sample_is_evaluated_once(self, two: Any) -> None:
        (found, _), _ = two
        assert {found[name]["top1"] for name in EXCHANGES} == {50}

    def test_ranks_are_timed_alone_and_an_average_counts_for_every_step_of_its_round(
        self, two: Any
    ) -> None:
        for found, _ in two:
            steps, ratio, communication, same = found["timed"]["local"]
            assert steps == [[1.0] * 3, [2.0] * 3]
            assert ratio == [[2.0 / 1.5]]
            assert communication == [[2.0] * 3, [2.0] * 3], "4 s after every other step"
            assert same
            assert found["timed"]["ddp"][:2] == [steps, ratio]
            assert found["timed"]["ddp"][3]
            waits = "BatchNorm over all processes waits for them in every layer"
            assert found["timed"]["sync"][:2] == [waits, waits]


# --- What a record says ---

OBSERVED = {
    "forward_passes": 1, "micro_batch_size": 64, "float32_matmul_precision": "highest",
    "onednn_matmul": "ieee", "onednn_convolution": "ieee",
    "device": "cpu", "num_processes": 2, "devices": 2, "backend": "gloo",
    "compile": False, "autocast": "off",
    "input_dtype": "float32", "weight_dtype": "float32", "input_channels_last": False,
    "weight_channels_last": False, "parameter_dtype": "float32", "tf32_matmul": False,
    "tf32_convolution": False, "loss_scaling": False, "timed_steps": 2, "samples_in_window": 256,
    "steps": 10, "samples_seen": 1280, "wrapper": "DistributedDataParallel", "cudagraph_skips": 0,
    "recompiles_in_window": 0, "skipped_steps_in_window": 0, "changed_in_window": "",
    "gradient_hook": "none", "bucket_bytes": 25 * 2**20, "batch_norm": "per device",
}  # fmt: skip
"""Of ten steps of 128 images in two processes under plain DDP."""


def cell_of(**fields: Any) -> Cell:
    train = TrainConfig(precision="fp32", parallel=Parallel(**fields))
    return Cell(train=train, num_processes=2)


def test_a_record_that_ran_another_exchange_says_so() -> None:
    assert mismatches(cell_of(), OBSERVED, "cpu") == []
    for fields, told in (
        ({"compression": "bf16"}, "gradient_hook: none where bf16_gradients was asked"),
        ({"bucket_mib": 1.0}, "bucket_bytes: 26214400 where 1048576 was asked"),
        ({"sync_batch_norm": True}, "batch_norm: per device where synchronised was asked"),
        ({"local_steps": 4}, "rounds: 0 in 10 steps where one every 4 was asked"),
    ):
        assert mismatches(cell_of(**fields), OBSERVED, "cpu") == [told]
    assert mismatches(cell_of(local_steps=4), {**OBSERVED, "rounds": 2}, "cpu") == []
    none = {**OBSERVED, "batch_norm": ""}
    assert mismatches(cell_of(), none, "cpu") == [], "a network without BatchNorm"


@pytest.mark.gpu
def test_torchs_own_synchronised_norm_trains_on_a_gpu() -> None:
    trainer = make_trainer(run=RunConfig())
    synchronize_norms(trainer.module, trainer.device)
    trainer.train_step()
    assert batch_norm_of(trainer.module) == "synchronised"
    assert trainer.meter.train_metrics().loss > 0


@pytest.mark.gpu
@pytest.mark.multiprocess
def test_two_gpus_exchange_as_two_cpus_do(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (found, _), (other, _) = run_two(tmp_path, "cuda")
    for name in EXCHANGES:
        same = {
            key for key, each in found[name]["sums"].items() if other[name]["sums"][key] == each
        }
        apart = found[name]["sums"].keys() - same
        assert all("running" in key for key in apart), name
        assert found[name]["top1"] == 50
    for name in ("bucket", "after"):
        assert found[name]["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-5)
    _, losses = train("ddp")
    assert found["sync"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert found["after"]["hook"] == "after_backward"
