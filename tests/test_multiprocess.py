"""Several processes on one machine, started as a user starts them: accelerate launch, torchrun."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_dataset
from safetensors.torch import load_file
from torch import Tensor
from training import (
    ROOT,
    TINY,
    TINY_OPTIONS,
    cifar,
    complaints,
    finish,
    free_port,
    make_trainer,
    metrics,
    reset_accelerate,
    save_weights,
    start,
    taught_by,
    tiny_recipe,
)

from cifar.checkpoint import list_checkpoints, load_weights
from cifar.config import Distillation, RunConfig, TrainConfig
from cifar.trainer import Trainer

pytestmark = pytest.mark.multiprocess

ACCELERATE = ("accelerate.commands.launch", "--config_file", ROOT / "launch" / "ddp.yaml",
              "--main_process_port", 0, "--mixed_precision", "no", "-m", "cifar")  # fmt: skip
OPTIONS = ("train", "--cpu", *TINY_OPTIONS)


def launch(processes: int, *words: object) -> subprocess.Popen[str]:
    first, *rest = ACCELERATE
    return start(first, "--num_processes", processes, *rest, *words)


def torchrun(processes: int, *words: object) -> subprocess.Popen[str]:
    return start("torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m",
                 "cifar", *words)  # fmt: skip


def train(npz: Path, folder: Path, *options: object) -> tuple[object, ...]:
    return (*OPTIONS, "--data", f"npz:{npz}", "--output-dir", folder, *options)


@pytest.fixture
def toy(npz: Path) -> Path:
    """Three batches of 32 an epoch; 49 test images, which divide over neither 2 nor 3."""
    arrays = dict(np.load(npz))
    np.savez(npz, **{k: v[:49] if k.startswith("test") else v for k, v in arrays.items()})
    return npz


def assert_evaluates_alike(folder: Path, npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process scores the final weights as the run's processes together have."""
    capsys.readouterr()
    assert cifar("evaluate", folder, "--cpu", "--data", f"npz:{npz}", "--json") == 0
    alone, last = json.loads(capsys.readouterr().out), metrics(folder)[-1]
    assert last["test_samples"] == alone["samples"] == 49
    assert (last["test_top1"], last["test_top5"]) == (alone["top1"], alone["top5"])
    assert last["test_loss"] == pytest.approx(alone["loss"], rel=1e-6)


STOPPED = """
import os, signal, sys, time
from cifar import checkpoint
from cifar.commands import main
from cifar.trainer import Trainer
write = checkpoint.write_checkpoint
def write_checkpoint(*words):
    time.sleep(3)  # long enough for the launcher to end this process, were the other one gone
    write(*words)
checkpoint.write_checkpoint = write_checkpoint
original = Trainer.train_step
def train_step(self):
    original(self)
    if self.step == 4 and self.place.index == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
Trainer.train_step = train_step
sys.exit(main())
"""


RESUMED = """
import os, sys
from cifar import session
from cifar.commands import main
list_checkpoints = session.list_checkpoints
def stale(root):
    found = list_checkpoints(root)
    return found if os.environ["RANK"] == "0" else found[:-1]
session.list_checkpoints = stale
sys.exit(main())
"""
"""The second process's view of the folder lags behind, as on a network file system."""


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        pytest.param((), ", BatchNorm per device, in ", marks=pytest.mark.slow),
        pytest.param(
            ("--local-steps", 2, "--ema-decay", "0.5"),
            ", BatchNorm per device, local2, in ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--sync-batch-norm", "--compression", "bf16", "--no-overlap", "--bucket-mib", "0.05"),
            ", BatchNorm synchronised, sync-bn bucket0.05 no-overlap bf16-gradients, in ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_stopped_and_resumed_train_like_two_that_were_not(
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    exchange: tuple[object, ...],
    told: str,
) -> None:
    """The signal reaches the second process alone; both stop after the same step."""
    options = ("--num-processes", 2, "--dropout", "0.2", *exchange)
    code, out, err = finish(launch(2, *train(toy, tmp_path / "a", *options)))
    assert code == 0, err
    assert out.count("epoch 1/2") == out.count("epoch 2/2") == out.count("weights in") == 1
    assert "2 x cpu, global batch 32, steps 0..6" + told in out and complaints(err) == []
    lines = metrics(tmp_path / "a")
    assert [(line["step"], line["samples_seen"]) for line in lines] == [(3, 96), (6, 192)]
    assert all(0 < line["train_loss"] < 10 for line in lines)
    assert (lines[0]["train_top1"] * 96).is_integer()
    assert_evaluates_alike(tmp_path / "a", toy, capsys)
    card, straight = load_weights(tmp_path / "a")
    assert card.step == 6 and not any(name.startswith("module.") for name in straight)

    (tmp_path / "stopped.py").write_text(STOPPED)
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                    tmp_path / "stopped.py", *train(toy, tmp_path / "b", *options),
                    environment={"CIFAR_RESTARTED": "1"})  # fmt: skip
    code, _, err = finish(process)
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith("cifar: stopped by signal 10 after step 4;")
    assert list_checkpoints(tmp_path / "b" / "checkpoints")[-1].name == "step-000000004"
    (tmp_path / "resumed.py").write_text(RESUMED)
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                    tmp_path / "resumed.py", "train", "--resume", tmp_path / "b",
                    environment={"CIFAR_RESTARTED": "1"})  # fmt: skip
    code, _, err = finish(process)
    assert code == 0, err
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    _, resumed = load_weights(tmp_path / "b")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.slow
def test_three_processes_share_a_batch_and_evaluate_every_sample_once(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = finish(torchrun(3, *train(toy, tmp_path / "a", "-b", 33, "--epochs", 1)))
    assert code == 0, err
    assert metrics(tmp_path / "a")[-1]["samples_seen"] == 66
    assert_evaluates_alike(tmp_path / "a", toy, capsys)


ALIKE: dict[str, dict[str, Any]] = {
    "plain": {},
    "sam": {"sam_rho": 0.5},
    "clip": {"clip_norm": 0.5},
    "sam, clip": {"sam_rho": 0.5, "clip_norm": 0.5},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0, "label_smoothing": 0.1},
    "muon": {"optimizer": "muon"},
    "ema": {"ema_decay": 0.5},
    "teacher": {},
}
"""Recipes whose steps should not depend on how a batch is shared out."""


def learned(name: str, teacher: Path, *, parts: int) -> dict[str, Tensor]:
    """The parameters to publish after three steps of a recipe, in so many parts of a batch each."""
    chosen = taught_by(teacher) if name == "teacher" else Distillation()
    config = TrainConfig(
        model=TINY,
        recipe=tiny_recipe(**ALIKE[name]),
        distillation=chosen,
        accumulation_steps=parts,
    )
    trainer = Trainer(config, RunConfig(cpu=True), make_dataset())
    for _ in range(3):
        trainer.train_step()
    names = [name for name, _ in trainer.module.named_parameters()]
    return {name: trainer.eval_weights()[name].detach() for name in names}


LEARNING = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from cifar.distributed import leave
from cifar.meter import Meter
from test_multiprocess import ALIKE, learned
folder = Path(sys.argv[1])
for name in ALIKE:
    weights = learned(name, folder / "teacher", parts=1)
    save_file(weights, folder / f"{name}-{os.environ['RANK']}.safetensors")
assert Meter(torch.device("cpu")).slowest(1.0 + int(os.environ["RANK"])) == 2.0
leave()
"""


def test_two_processes_learn_what_one_does_from_the_two_halves_of_every_batch(
    tmp_path: Path,
) -> None:
    """One by accumulation, so that BatchNorm normalises by the same halves.

    Every recipe must learn something else than the plain one, or it would not be seen to work.
    """
    teacher = save_weights(tmp_path / "teacher", make_trainer(seed=1))
    (tmp_path / "learning.py").write_text(LEARNING)
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                    tmp_path / "learning.py", tmp_path,
                    environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})  # fmt: skip
    code, _, err = finish(process)
    assert code == 0, err
    reset_accelerate()
    plain = learned("plain", teacher, parts=2)
    for name in ALIKE:
        expected = learned(name, teacher, parts=2)
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[each], second[each]) for each in expected), name
        torch.testing.assert_close(
            first, expected, rtol=1e-3, atol=1e-4, msg=f"{name}: {{}}".format
        )
        apart = max((expected[each] - plain[each]).abs().max() for each in plain)
        assert apart > 1e-2 or name == "plain", name


def wait_for_epoch(folder: Path, process: subprocess.Popen[str]) -> None:
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_launcher_told_to_stop_stops_the_run_with_a_checkpoint(toy: Path, tmp_path: Path) -> None:
    process = launch(2, *train(toy, tmp_path / "run", "--epochs", "4000"))
    wait_for_epoch(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith("cifar: stopped by signal 15 after step ")
    step = int(line.split("after step ")[1].split(";")[0])
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{step:09d}"


def test_ctrl_c_reaches_every_process_twice_and_yet_the_run_is_saved(
    toy: Path, tmp_path: Path
) -> None:
    """From the terminal, which signals the whole group, and again from the launcher."""
    process = torchrun(2, *train(toy, tmp_path / "run", "--epochs", "4000"))
    wait_for_epoch(tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith("cifar: stopped by signal 2 after step ")


FULL = """
import os, sys, time
import torch
from cifar.commands import main
from cifar.signals import StopSignals
from cifar.trainer import Trainer
leave = StopSignals.__exit__
def slowly(self, *error):
    if os.environ["RANK"] == "0":
        time.sleep(float(os.environ["SLOWNESS"]))
    leave(self, *error)
StopSignals.__exit__ = slowly
original = Trainer.train_step
def train_step(self):
    original(self)
    if self.step == 4 and self.place.index == 1:
        torch.empty(2**60, dtype=torch.uint8)
Trainer.train_step = train_step
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("slowness", [0, 2])
def test_a_process_that_runs_out_of_memory_ends_all_and_is_named(
    toy: Path, tmp_path: Path, slowness: int
) -> None:
    """The other one waits for it in a collective call meanwhile, and may be slow to come back from
    there: the launcher's signal is there first then."""
    (tmp_path / "full.py").write_text(FULL)
    process = start("torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                    tmp_path / "full.py", *train(toy, tmp_path / "run"),
                    environment={"CIFAR_RESTARTED": "1", "SLOWNESS": str(slowness)})  # fmt: skip
    code, _, err = finish(process, seconds=60)
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith(
        "cifar: process 1: memory: model resnet20-w4 with batch size 32 does not"
    )
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000000003"


@pytest.mark.parametrize(
    ("starter", "options", "named"),
    [
        (launch, ("--model", "resnet19"), "model: 'resnet19'"),
        (torchrun, ("-b", "31", "--num-processes", "2"), "batch-size: 31"),
    ],
)
def test_under_a_launcher_bad_input_is_one_line_in_total(
    toy: Path, tmp_path: Path, starter, options: tuple[str, str], named: str
) -> None:
    code, _, err = finish(starter(2, *train(toy, tmp_path / "run", *options)))
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith(f"cifar: {named}")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_only_the_first_process_finds_taken_ends_all(
    toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").touch()
    process = torchrun(2, *train(toy, tmp_path))
    code, _, err = finish(process, seconds=60)
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith("cifar: output-dir: ")


def test_a_launcher_that_starts_one_process_instead_of_two_is_found_out(
    toy: Path, tmp_path: Path
) -> None:
    process = start(
        "accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "cifar",
        *train(toy, tmp_path / "run", "--num-processes", 2),
    )  # fmt: skip
    code, _, err = finish(process)
    assert code != 0
    (line,) = complaints(err)
    assert line.startswith("cifar: num-processes: 2: 1 run together")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_whoever_is_left_of_two_says_so(toy: Path, tmp_path: Path, killed: int) -> None:
    """Nobody started them together, so nobody else does."""
    folder, port = tmp_path / "run", free_port()
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ("cifar", *train(toy, folder, "--epochs", 100_000))
    ranks = [
        start(*words, environment={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        while not list_checkpoints(folder / "checkpoints"):
            assert all(each.poll() is None for each in ranks)
            time.sleep(0.05)
        ranks[killed].kill()
        code, _, err = finish(ranks[1 - killed])
    finally:
        for each in ranks:
            each.kill()
    finish(ranks[killed])
    (line,) = (each for each in err.splitlines() if each.startswith("cifar: "))
    assert code == 1 and line.startswith(f"cifar: process {1 - killed}: processes: another one has")
    assert ("what was saved stays", "--resume")[killed] in line  # the first knows its folder
