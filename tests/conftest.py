"""Shared fixtures: small data sets, the real CIFAR-10 where CIFAR_DATA names it, GPU skips."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from bench import device_lock
from cifar.data.dataset import Dataset, Split
from cifar.process import available_cores


def make_dataset(
    train: int = 96, test: int = 50, size: int = 16, classes: int = 10, channels: int = 3
) -> Dataset:
    """Random images whose class shows in their brightness, so that a net can learn them."""
    random = np.random.RandomState(0)

    def split(count: int) -> Split:
        labels = np.arange(count, dtype=np.int64) % classes
        noise = random.randint(0, 60, (count, channels, size, size))
        images = noise + (labels * (180 // classes))[:, None, None, None]
        return Split(images=images.astype(np.uint8), labels=labels)

    names = tuple(f"class{i}" for i in range(classes))
    return Dataset(name="toy", classes=names, train=split(train), test=split(test))


def save_npz(path: Path, dataset: Dataset, **arrays: np.ndarray) -> Path:
    """A data set as an .npz file, and further arrays in it."""
    np.savez(
        path,
        train_images=dataset.train.images,
        train_labels=dataset.train.labels,
        test_images=dataset.test.images,
        test_labels=dataset.test.labels,
        **arrays,
    )
    return path


@pytest.fixture
def dataset() -> Dataset:
    return make_dataset()


@pytest.fixture
def npz(tmp_path: Path, dataset: Dataset) -> Path:
    """The toy data set as an .npz file, for programs started from tests."""
    return save_npz(tmp_path / "toy.npz", dataset)


@pytest.fixture
def own_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that measure in their own process: others, side by side, may use the same cores."""
    monkeypatch.setattr(device_lock, "PREFIX", f"{device_lock.PREFIX}test-{os.getpid()}-")


@pytest.fixture
def cifar_data() -> Path:
    folder = os.environ.get("CIFAR_DATA")
    if not folder or not (Path(folder) / "cifar-10-batches-py").is_dir():
        pytest.skip("CIFAR_DATA does not name a folder with cifar-10-batches-py")
    return Path(folder)


def pytest_configure(config: pytest.Config) -> None:
    """Let the default tests run on the CPU of a GPU machine too: so they know what to expect.

    Nor do they depend on the shell: one that starts them in the background has SIGINT ignored,
    which the programs under test would inherit.
    """
    if _is_default(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The workers of `-n auto`: none unless the tests are the default ones.

    The others measure time, or share a GPU.
    """
    return min(available_cores(), 4) if _is_default(config) else 0


def _is_default(config: pytest.Config) -> bool:
    """Whether the tests are those of pyproject.toml's `-m`."""
    return config.option.markexpr in config.getini("addopts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
