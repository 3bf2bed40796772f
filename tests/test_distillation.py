"""Distillation: the loss by hand, what the teacher sees, what a student learns, what is refused."""

import copy
import dataclasses
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset, save_npz
from torch import Tensor
from training import (
    after_step,
    cifar,
    kill,
    make_trainer,
    metrics,
    rescaled,
    resume,
    save_weights,
    taught_by,
    tiny_recipe,
    train,
)

from cifar import run_folder
from cifar.checkpoint import load_weights, read_folder, write_folder
from cifar.config import Distillation, ModelConfig, Recipe, Teacher, TrainConfig
from cifar.config.distillation import find_teacher
from cifar.data.loader import Mixed, TrainBatch
from cifar.errors import CheckpointError, ConfigError
from cifar.losses import cross_entropy, distilled
from cifar.network import few, load_network
from cifar.serialize import digest, from_json, to_json
from cifar.teacher import TeacherNetwork
from cifar.trainer import Trainer

CPU = torch.device("cpu")
STUDENT = [[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]]
TEACHER = [[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
LABELS = [0, 2]


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def batch_of(labels: list[int], mixed: Mixed | None = None) -> TrainBatch:
    count = torch.arange(len(labels))
    batch = TrainBatch(count, torch.tensor(labels), count, lambda: batch, mixed)
    return batch


def loss_of(
    logits: Tensor, *, weight: float, temperature: float, smoothing: float = 0.0,
    mixed: Mixed | None = None,
) -> Tensor:  # fmt: skip
    compute_loss = distilled(
        cross_entropy(smoothing),
        lambda _: torch.tensor(TEACHER),
        weight=weight,
        temperature=temperature,
    )
    loss, shown = compute_loss(lambda _: logits, batch_of(LABELS, mixed))
    assert shown is logits, "top-1 is the student's"
    return loss


def test_the_loss_by_hand() -> None:
    """Cross-entropy 0.925058, divergence at temperature 2 0.325974: 0.25 and 3 times them."""
    labels, divergence = 0.0, 0.0
    for student, teacher, label in zip(STUDENT, TEACHER, LABELS, strict=True):
        labels -= math.log(softmax(student)[label]) / 2
        pairs = zip(softmax(teacher, 2.0), softmax(student, 2.0), strict=True)
        divergence += sum(p * math.log(p / q) for p, q in pairs) / 2
    loss = loss_of(torch.tensor(STUDENT), weight=0.75, temperature=2.0).item()
    assert loss == pytest.approx(0.25 * labels + 0.75 * 4 * divergence)
    assert loss == pytest.approx(1.2091857)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_by_hand(weight: float, temperature: float) -> None:
    """Cross-entropy's is p - y, the other part's T^2 / T x (q_student - q_teacher); halved."""
    logits = torch.tensor(STUDENT, requires_grad=True)
    loss_of(logits, weight=weight, temperature=temperature).backward()
    for row, student, teacher, label in zip(logits.grad, STUDENT, TEACHER, LABELS, strict=True):
        pulls = zip(
            softmax(student), softmax(student, temperature), softmax(teacher, temperature),
            strict=True,
        )  # fmt: skip
        expected = [
            (1 - weight) * (p - (k == label)) / 2 + weight * temperature * (mine - its) / 2
            for k, (p, mine, its) in enumerate(pulls)
        ]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_labels_are_smoothed_and_mixed_as_ever() -> None:
    mixed = Mixed(torch.tensor([1, 1]), torch.tensor([0.7, 0.4]))
    logits = torch.tensor(STUDENT)
    plain, _ = cross_entropy(0.1)(lambda _: logits, batch_of(LABELS, mixed))
    fields = {"temperature": 4.0, "smoothing": 0.1, "mixed": mixed}
    assert torch.equal(loss_of(logits, weight=0.0, **fields), plain)
    teacher = loss_of(logits, weight=1.0, temperature=4.0)
    half = loss_of(logits, weight=0.5, **fields)
    torch.testing.assert_close(half, (plain + teacher) / 2)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learnt the toy images, as a checkpoint."""
    trainer = make_trainer(
        tiny_recipe(epochs=12, global_batch_size=16, lr=0.1),
        model=ModelConfig(name="resnet20", width=6, dropout=0.2),
        seed=7,
    )
    while trainer.step < trainer.total_steps:
        trainer.train_step()
    assert trainer.evaluate().top1 > 0.3
    return save_weights(tmp_path_factory.mktemp("teacher") / "big", trainer)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("fields", [{}, {"mixup": 0.4, "label_smoothing": 0.1, "sam_rho": 0.1}])
def test_a_weight_of_zero_is_no_teacher_bit_for_bit(big: Path, fields: dict[str, float]) -> None:
    plain, taught = (
        make_trainer(tiny_recipe(**fields), distillation=each)
        for each in (Distillation(), taught_by(big, weight=0.0))
    )
    for trainer in (plain, taught):
        for _ in range(4):
            trainer.train_step()
    assert equal(plain.weights(), taught.weights())
    assert plain.meter.state() == taught.meter.state()


def agreement(student: Trainer, teacher: Path) -> float:
    """Share of the test images of which both say the same, whatever it is."""
    network = load_network(teacher, precision="fp32", device=CPU)
    with torch.no_grad():
        images = student.test_images.batch(torch.arange(50)).images
        student.module.eval()
        mine, its = student.module(images).argmax(1), network.logits(images).argmax(1)
    return (mine == its).float().mean().item()


def test_a_student_learns_the_teacher_s_answers_and_not_the_labels(big: Path) -> None:
    data = make_dataset()
    labels = np.random.RandomState(1).permutation(data.train.labels)
    shuffled = dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))
    agreements = []
    for distillation in (taught_by(big, weight=1.0), Distillation()):
        student = make_trainer(
            tiny_recipe(epochs=12, global_batch_size=16, lr=0.1),
            data=shuffled,
            distillation=distillation,
        )
        while student.step < student.total_steps:
            student.train_step()
        agreements.append(agreement(student, big))
    assert agreements[0] > 0.5 and agreements[1] < 0.3, "chance is about 0.1"


def test_the_metrics_show_what_is_minimised_and_how_often_the_labels_are_met(big: Path) -> None:
    trainer = make_trainer(distillation=taught_by(big, weight=0.6, temperature=3.0))
    (batch,) = trainer.loader.micro_batches(0)
    answers = load_network(big, precision="fp32", device=CPU).logits(batch.images).detach()
    student = copy.deepcopy(trainer.module)(batch.images).detach()
    mine, its = ((each / 3.0).softmax(1) for each in (student, answers))
    divergence = (its * (its / mine).log()).sum(1).mean()
    expected = 0.4 * F.cross_entropy(student, batch.targets) + 0.6 * 9.0 * divergence
    trainer.train_step()
    found = trainer.meter.train_metrics()
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.top1 == (student.argmax(1) == batch.targets).float().mean().item()


class Seen:
    """The images that reach the student's and the teacher's first convolution, pass by pass."""

    def __init__(self, trainer: Trainer) -> None:
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []
        assert trainer.teacher is not None
        for module, seen in (
            (trainer.module, self.student),
            (trainer.teacher.network.module, self.teacher),
        ):
            module.conv1.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0].clone())
            )


@pytest.mark.parametrize(
    ("fields", "config", "passes"),
    [
        ({"mixup": 0.4, "cutmix": 1.0}, {}, 1),
        ({"mixup": 0.4}, {"accumulation_steps": 2}, 2),
        ({"cutmix": 1.0, "sam_rho": 0.1}, {}, 2),
    ],
)
def test_the_teacher_sees_the_mixed_images_that_the_student_sees(
    big: Path, fields: dict[str, float], config: dict[str, Any], passes: int
) -> None:
    trainer = make_trainer(tiny_recipe(**fields), distillation=taught_by(big), **config)
    seen, plain = Seen(trainer), make_trainer(tiny_recipe(), **config)
    trainer.train_step()
    assert len(seen.student) == len(seen.teacher) == passes
    for mine, its in zip(seen.student, seen.teacher, strict=True):
        assert torch.equal(mine, its)
    (unmixed, *_) = plain.loader.micro_batches(0)
    assert not torch.equal(seen.teacher[0], unmixed.images), "else nothing was mixed"


def test_the_teacher_stays_as_it_was(big: Path) -> None:
    """Its statistics, its dropout and its weights; no gradient reaches it."""
    trainer = make_trainer(distillation=taught_by(big))
    module = trainer.teacher.network.module
    before = {name: each.clone() for name, each in module.state_dict().items()}
    images = trainer.test_images.batch(torch.arange(4)).images
    answers = trainer.teacher(images)
    for _ in range(2):
        trainer.train_step()
        trainer.evaluate()
    assert equal(module.state_dict(), before)
    assert not any(each.training for each in module.modules())
    assert all(each.grad is None for each in module.parameters())
    assert torch.equal(trainer.teacher(images), answers) and not answers.requires_grad


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_teacher_of_other_images_sees_them_as_it_was_trained_to(
    tmp_path: Path, channels_last: bool
) -> None:
    """In fact (p - m) / s of every pixel p in 0..1, with its own mean m and deviation s."""
    other = make_trainer(data=rescaled())
    other.train_step()
    path = save_weights(tmp_path / "teacher", other)
    trainer = make_trainer(distillation=taught_by(path), channels_last=channels_last)
    seen = Seen(trainer)
    batch = trainer.test_images.batch(torch.arange(9))
    answers = trainer.teacher(batch.images)
    pixels = torch.from_numpy(make_dataset().test.images[:9]).double() / 255
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (other.normalization.mean, other.normalization.std)
    )
    expected = ((pixels - mean) / std).float()
    assert (expected - batch.images).abs().max() > 0.5, "else the two normalisations are alike"
    (found,) = seen.teacher
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(answers, other.module.eval()(expected), rtol=1e-4, atol=1e-4)


def test_images_of_the_same_normalisation_are_taken_as_they_are(big: Path) -> None:
    network = load_network(big, precision="fp32", device=CPU)
    teacher = TeacherNetwork(network, network.card.normalization)
    passed: list[Tensor] = []
    network.module.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0]))
    images = torch.randn(2, 3, 16, 16)
    teacher(images)
    assert passed[0] is images


@pytest.mark.parametrize("size", [8, 24])
def test_images_may_be_of_another_size(big: Path, size: int) -> None:
    trainer = make_trainer(data=make_dataset(size=size), distillation=taught_by(big))
    trainer.train_step()
    assert math.isfinite(trainer.meter.train_metrics().loss)


def test_the_teacher_runs_in_the_precision_and_layout_of_the_student(big: Path) -> None:
    trainer = make_trainer(distillation=taught_by(big), precision="bf16", channels_last=True)
    seen: list[Tensor] = []
    inner = trainer.teacher.network.module.layer2[0].conv2
    inner.register_forward_hook(lambda _m, _i, output: seen.append(output))
    trainer.train_step()
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert inner.weight.is_contiguous(memory_format=torch.channels_last)
    assert trainer.teacher(trainer.test_images.batch(torch.arange(2)).images).dtype == torch.float32


def test_a_loss_of_one_s_own_leaves_no_place_for_a_teacher(big: Path) -> None:
    with pytest.raises(AssertionError, match="the recipe's own loss"):
        make_trainer(distillation=taught_by(big), trainer={"compute_loss": cross_entropy(0.0)})


def taught(teacher: Teacher, **fields: float) -> TrainConfig:
    return TrainConfig(distillation=Distillation(teacher=teacher, **fields))


def test_the_digest_knows_the_weights_and_not_their_place() -> None:
    here, there = (Teacher(sha256="a" * 64, path=path) for path in ("/here", "/there"))
    other = Teacher(sha256="b" * 64, path="/here")
    assert digest(taught(here)) == digest(taught(there)) != digest(TrainConfig())
    assert digest(taught(here)) != digest(taught(other))
    changed = {
        digest(taught(here, **fields)) for fields in ({}, {"weight": 0.5}, {"temperature": 2.0})
    }
    assert len(changed) == 3


def test_the_configuration_comes_back_from_json_and_an_old_one_has_no_teacher() -> None:
    config = taught(Teacher(sha256="a" * 64, path="/here"), weight=0.5, temperature=2.0)
    assert from_json(TrainConfig, to_json(config)) == config
    old = json.loads(to_json(TrainConfig(recipe=Recipe(lr=0.2))))
    del old["distillation"]
    read = from_json(TrainConfig, json.dumps(old))
    assert read == TrainConfig(recipe=Recipe(lr=0.2)) and read.distillation.teacher is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"weight": 1.5}, r"distillation-weight: 1\.5: give 0 to 1"),
        ({"weight": math.nan}, r"distillation-weight: nan: give 0 to 1"),
        ({"temperature": 0.0}, r"distillation-temperature: 0\.0: give 0\.01 to 1000"),
        ({"temperature": math.inf}, r"distillation-temperature: inf: give 0\.01 to 1000"),
    ],
)
def test_a_weight_or_temperature_that_means_nothing_is_refused(
    fields: dict[str, float], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        taught(Teacher(sha256="a" * 64, path="/here"), **fields)


def test_a_sum_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.sha256: 'ab': give 64 hexadecimal digits"):
        Teacher(sha256="ab", path="/here")


def test_without_a_teacher_they_are_of_no_use() -> None:
    with pytest.raises(ConfigError, match=r"distillation-weight: 0\.5: needs --teacher"):
        Distillation(weight=0.5)
    with pytest.raises(ConfigError, match=r"distillation-temperature: 2\.0: needs --teacher"):
        Distillation(temperature=2.0)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("classes", "others", "told"),
    [
        ("ab", "abc", "a, b"),
        ("abcde", "xbcde", "a, b, c, ... 5 in all"),
        ("abcdefgh", "abcdEfgh", "..., e, f, g, ... 8 in all"),
        ("abcde", "abcdx", "..., e, ... 5 in all"),
        ("abcdef", "abc", "a, b, c, ... 6 in all"),
    ],
)
def test_classes_are_told_where_they_differ(classes: str, others: str, told: str) -> None:
    assert few(tuple(classes), tuple(others)) == told


def other_classes(folder: Path) -> Path:
    return save_weights(folder, make_trainer(data=make_dataset(classes=7)))


def other_channels(folder: Path) -> Path:
    return save_weights(folder, make_trainer(data=make_dataset(channels=1)))


def damaged(folder: Path) -> Path:
    save_weights(folder, make_trainer())
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return folder


def without_its_file(folder: Path) -> Path:
    (save_weights(folder, make_trainer()) / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            other_classes,
            r"its classes \(class0, class1, class2, \.\.\. 7 in all\) are not those of npz:toy "
            r"\(class0, class1, class2, \.\.\. 10 in all\); give one that was trained on",
        ),
        (other_channels, r"sees 1 channels, npz:toy has 3; give one"),
        (damaged, r"model\.safetensors: does not match its checksum"),
        (without_its_file, r"model\.safetensors: cannot be read \(No such file or directory\)"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], named: str
) -> None:
    names = np.array([f"class{number}" for number in range(10)])
    npz = save_npz(tmp_path / "toy.npz", make_dataset(), class_names=names)
    teacher = make(tmp_path / "teacher")
    capsys.readouterr()
    assert train(npz, tmp_path / "run", "--teacher", teacher) == 2
    assert re.match(rf"cifar: teacher: {teacher}.*{named}", only_line(capsys))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = np.array([f"class{number}" for number in range(10)])
    return save_npz(tmp_path_factory.mktemp("data") / "toy.npz", make_dataset(), class_names=names)


@pytest.fixture
def stopped(toy: Path, big: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run that was stopped after its fourth step, and its teacher's folder."""
    teacher = shutil.copytree(big, tmp_path / "teacher")
    with after_step(4, kill(signal.SIGTERM)):
        assert train(toy, tmp_path / "run", "--teacher", teacher) == 143
    return tmp_path / "run", teacher


def test_a_run_with_a_teacher_continues_bit_for_bit_also_where_that_has_moved(
    toy: Path, stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, teacher = stopped
    straight = tmp_path / "straight"
    assert train(toy, straight, "--teacher", teacher / "model.safetensors") == 0
    assert "taught by resnet20-w6-d0.2, fp32" in capsys.readouterr().out
    found = run_folder.read_config(straight).train.distillation.teacher
    assert found == find_teacher(teacher) and found.path == str(teacher / "model.safetensors")
    moved = teacher.rename(tmp_path / "elsewhere")
    assert resume(folder) == 2
    line = only_line(capsys)
    assert line.startswith(f"cifar: teacher: {teacher}/model.safetensors: no weights there; ")
    assert line.endswith("; if they have moved, tell where with --teacher")
    assert resume(folder, "--teacher", moved) == 0
    (_, mine), (_, its) = (load_weights(run / "final") for run in (folder, straight))
    assert equal(mine, its)
    assert metrics(folder) == metrics(straight)


def test_a_run_is_not_resumed_with_another_teacher(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, teacher = stopped
    other = save_weights(tmp_path / "other", make_trainer())
    capsys.readouterr()
    assert resume(folder, "--teacher", other) == 2
    assert only_line(capsys).startswith(
        f"cifar: teacher: {other}/model.safetensors: other weights than those that were learnt from"
    )
    write_folder(teacher, read_folder(other))
    assert resume(folder) == 2
    assert only_line(capsys).startswith(
        f"cifar: teacher: {teacher}/model.safetensors: other weights than those that were learnt"
    )


def test_a_run_without_a_teacher_gets_none_when_it_is_resumed(
    toy: Path, big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with after_step(1, kill(signal.SIGTERM)):
        assert train(toy, tmp_path / "run") == 143
    capsys.readouterr()
    assert resume(tmp_path / "run", "--teacher", big) == 2
    line = only_line(capsys)
    assert line.startswith(f"cifar: teacher: '{big}/model.safetensors': the run to resume has None")


def test_a_student_is_evaluated_without_its_teacher(
    toy: Path, big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = shutil.copytree(big, tmp_path / "teacher")
    assert train(toy, tmp_path / "run", "--epochs", "1", "--teacher", teacher) == 0
    shutil.rmtree(teacher)
    capsys.readouterr()
    assert cifar("evaluate", tmp_path / "run", "--cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 50


def test_a_teacher_that_is_gone_when_the_trainer_looks_for_it_is_one_line(big: Path) -> None:
    """As in a cell of a suite, whose teacher was found when it was planned."""
    teacher = find_teacher(big)
    absent = dataclasses.replace(teacher, path="/absent/model.safetensors")
    with pytest.raises(CheckpointError, match=r"^teacher: /absent/.*: no weights there"):
        make_trainer(distillation=Distillation(teacher=absent))
    other = dataclasses.replace(teacher, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"must be 0{16}\.\.\."):
        make_trainer(distillation=Distillation(teacher=other))
