"""Two "nodes": on the loopback of this machine, and in two network namespaces that a wire joins."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, save_npz
from training import ROOT, TINY_OPTIONS, finish, free_port, metrics, start

from cifar.checkpoint import list_checkpoints, load_weights, step_of

pytestmark = pytest.mark.multiprocess

ACCELERATE = ("accelerate.commands.launch", "--config_file", ROOT / "launch" / "ddp.yaml",
              "--mixed_precision", "no", "--num_processes", 2)  # fmt: skip
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", 1, "--nnodes", 2)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[object, ...]]:
    npz = save_npz(tmp_path_factory.mktemp("data") / "toy.npz", make_dataset())
    return lambda folder: (
        *("-m", "cifar", "train", "--cpu", *TINY_OPTIONS, "--num-processes", 2),
        *("--data", f"npz:{npz}", "--output-dir", folder),
    )


Train = Callable[[Path], tuple[object, ...]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    """The folder of a run of two processes under one launcher."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = finish(start(*ACCELERATE, "--main_process_port", 0, *train(folder)))
    assert code == 0, err
    return folder


def assert_alike(folder: Path, alone: Path) -> None:
    assert metrics(folder) == metrics(alone)
    (_, mine), (_, theirs) = load_weights(folder), load_weights(alone)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def join(nodes: list[subprocess.Popen[str]]) -> None:
    ends = [finish(node, seconds=120) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], "\n".join(err for _, _, err in ends)


@pytest.mark.slow
def test_two_nodes_of_accelerate_train_as_one_launcher_does(
    tmp_path: Path, train: Train, alone: Path
) -> None:
    where = ("--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port",
             free_port())  # fmt: skip
    words = train(tmp_path / "run")
    join([start(*ACCELERATE, *where, "--machine_rank", rank, *words) for rank in (0, 1)])
    assert_alike(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_two_nodes_of_an_engine_are_one_training(
    strategy: str, tmp_path: Path, train: Train
) -> None:
    """DeepSpeed's own launcher would make two trainings of them."""
    config = ("--config_file", ROOT / "launch" / f"{strategy}.yaml")
    where = ("--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port",
             free_port())  # fmt: skip
    words = (*train(tmp_path / "run"), "--recipe", "sgd", "--epochs", 1)
    launch = (
        "accelerate.commands.launch",
        *config,
        "--mixed_precision",
        "no",
        "--num_processes",
        2,
    )
    nodes = [start(*launch, *where, "--machine_rank", rank, *words) for rank in (0, 1)]
    ends = [finish(node, seconds=120) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], "\n".join(err for _, _, err in ends)
    assert f"2 x cpu under {strategy}, global batch 32, steps 0..3" in ends[0][1]
    assert ends[1][1].count("epoch") == 0, "the second node is no training of its own"
    assert [line["samples_seen"] for line in metrics(tmp_path / "run")] == [96]


@pytest.mark.slow
def test_two_nodes_of_torchrun_train_as_one_launcher_does(
    tmp_path: Path, train: Train, alone: Path
) -> None:
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    words = train(tmp_path / "run")
    join([start(*TORCHRUN, *where, "--rdzv-id", 1, *words) for _ in (0, 1)])
    assert_alike(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_agent_that_is_killed_costs_what_follows_the_last_checkpoint(
    victim: int, tmp_path: Path, train: Train
) -> None:
    """The other node ends by itself, and the same commands go on; either may have the store."""
    folder = tmp_path / "run"
    words = (*train(folder), "--epochs", 60, "--resume", "auto")

    def begin() -> list[subprocess.Popen[str]]:
        where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
        conf = ("--rdzv-conf", "join_timeout=45,timeout=45")
        return [start(*TORCHRUN, *where, *conf, "--rdzv-id", 1, *words) for _ in (0, 1)]

    nodes = begin()
    while not (folder / "metrics.jsonl").exists():
        assert [node.poll() for node in nodes] == [None, None]
        time.sleep(0.05)
    nodes[victim].kill()
    assert finish(nodes[victim])[0] == -9
    code, _, err = finish(nodes[1 - victim], seconds=120)
    assert code != 0, err
    (newest, *_) = list_checkpoints(folder / "checkpoints")[::-1]
    assert 0 < step_of(newest) < 180

    ends = [finish(node, seconds=180) for node in begin()]
    assert [code for code, _, _ in ends] == [0, 0], "\n".join(err for _, _, err in ends)
    assert f"steps {step_of(newest)}..180" in "".join(out for _, out, _ in ends)
    assert [line["step"] for line in metrics(folder)] == [*range(3, 181, 3)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.213.7.1 and 10.213.7.2, that reach each other and nothing else."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("may not make network namespaces")
    names = tuple(f"cifar{os.getpid()}{each}" for each in "ab")
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ends = [("name", "wire", "netns", names[0]), ("name", "wire", "netns", names[1])]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"may not make network namespaces: {error.stderr.decode()}")
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]


def start_in(namespace: str, *words: object) -> subprocess.Popen[str]:
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-m", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **here},
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_network_namespaces_train_as_one_launcher_does(
    namespaces: tuple[str, str], tmp_path: Path, train: Train, alone: Path
) -> None:
    """With nothing said of interfaces, though this machine's name leads to none of theirs."""
    where = ("--num_machines", 2, "--main_process_ip", "10.213.7.1", "--main_process_port", 29517)
    words = train(tmp_path / "run")
    nodes = [
        start_in(name, *ACCELERATE, *where, "--machine_rank", rank, *words)
        for rank, name in enumerate(namespaces)
    ]
    join(nodes)
    assert_alike(tmp_path / "run", alone)
