import errno
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import make_dataset
from PIL import Image
from training import TINY_OPTIONS, cifar, finish, start, train

from cifar import scoring
from cifar.checkpoint import ModelCard
from cifar.cli import (
    FIRST_PROCESS_SECONDS,
    MEMORY_SECONDS,
    Command,
    complain_of_input,
    run_program,
)
from cifar.config import ModelConfig, TrainConfig
from cifar.data.config import parse_data
from cifar.data.sources import load_dataset
from cifar.errors import DataError, OutOfMemoryError, UnmetError
from cifar.evaluation import Evaluation
from cifar.recipes import get_recipe
from cifar.train_options import read_train_options


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: ")
    return line


LONG = "x" * 300
"""No file system takes a name that long."""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("fly",), r"command: 'fly': choose one of train, lr-find, evaluate, meet, summary, show"),
        (("train", "--speed", "9"), r"--speed"),
        (("train", "--model", "resnet19"), r"model: 'resnet19': choose one of .*resnet18"),
        (("train", "--recipe", "fast"), r"recipe: 'fast': choose one of default"),
        (("train", "--recipe", ""), r"recipe: '': choose one of default"),
        (
            ("train", "--data", "mnist"),
            r"data: 'mnist': write shapes, cifar10.*, tiny-imagenet\[:DIR",
        ),
        (("train", "--data", "cifar10:"), r"data: 'cifar10:': no path after the colon; write"),
        (("train", "--data", "shapes:"), r"data: 'shapes:': no path after the colon; write"),
        (("train", "--data", "npz:absent.npz"), r"data: /.*/absent\.npz: no such file"),
        (("train", "--data", "folder:absent"), r"data: /.*/absent/train: no such folder"),
        (("train", "--data", "cifar10:absent"), r"data: /.*/absent: no cifar"),
        (("train", "--data", "npz:" + LONG), r"data: .*: cannot be read: File name too long; make"),
        (("train", "--data", "npz:~no-such-user-anywhere/x"), r"data: .*: no such user"),
        (("train", "-b", "0"), r"batch-size: 0: give 1 or more"),
        (("train", "-b", "many"), r"many"),
        (("train", "--epochs", "0"), r"epochs: 0: give 1 to 1000000"),
        (("train", "--epochs", "1" + 20 * "0"), r"epochs: 10+: give 1 to 1000000"),
        (("train", "--lr", "nan"), r"lr: nan: give a positive number"),
        (("train", "--optimizer", "lion"), r"lion"),
        (("train", "--compile-mode", "max-autotune"), r"compile-mode: .*--compile"),
        (("train", "--augment", "cutmix"), r"augment: 'cutmix': choose from crop, flip"),
        (("train", "--augment", "flip", "flip"), r"augment: 'flip flip': name each .* once"),
        (("train", "--augment", "flip", "alternating-flip"), r"augment: .*choose one"),
        (("train", "--augment", "flip", "--crop-padding", "3"), r"crop-padding: 3: .*add crop"),
        (("train", "--augment", "flip", "--hue", "0.1"), r"hue: 0\.1: .*add color-jitter"),
        (("train", "--augment", "color-jitter", "--hue", "0.6"), r"hue: 0\.6: give 0 to 0\.5"),
        (("train", "--augment", "flip", "crop"), r"augment: 'flip crop': name crop first"),
        (("train", "--augment", "--crop_fill", "black"), r"crop-fill: 'black': .*add crop"),
        (("train", "--optimizer", "adamw"), r"optimizer: 'adamw': .* such as --lr 0\.001"),
        (("train", "--optimizer", "sgd"), r"optimizer: 'sgd': .* such as --lr 0\.1"),
        (
            ("train", "--recipe", "sgd", "--optimizer", "muon"),
            r"optimizer: 'muon': .* such as --lr 0\.15",
        ),
        (
            ("train", "--optimizer", "sgd", "--lr", "0.1", "--muon-step", "0.01"),
            r"muon-step: 0\.01: is for muon, not for sgd",
        ),
        (("train", "--muon-step", "1.5"), r"muon-step: 1\.5: give 0 < value < 1"),
        (("train", "--teacher", "absent"), r"teacher: absent: no weights there; give a run, a che"),
        (("train", "--teacher", LONG), r"teacher: 'x+.*': File name too long; give another path"),
        (("train", "--teacher", "~no-such-user-anywhere/x"), r"teacher: .*: no such user"),
        (("train", "--distillation-weight", "0.5"), r"distillation-weight: 0\.5: needs --teacher"),
        (
            ("train", "--distillation-temperature", "0"),
            r"distillation-temperature: 0\.0: give 0\.01",
        ),
        (("train", "--output-dir", "~no-such-user-anywhere/x"), r"output-dir: .*no such user"),
        (("download", "cifar10", "--directory=~no-such-user-anywhere/x"), r"directory: .*no such"),
        (
            ("train", "--optimizer", "adamw", "--lr", "0.001", "--nesterov"),
            r"nesterov: True: is for sgd and muon, not for adamw; leave it out",
        ),
        (("train", "--optimizer", "adamw", "--lr", "0.001", "--no_nesterov"), r"nesterov: False: "),
        (
            ("train", "--max-skipped-steps", "9"),
            r"max-skipped-steps: '9': is for fp16, .* or give --precision fp16",
        ),
        (("train", "--precision", "bf16", "--max_skipped_steps=20"), r"max-skipped-steps: '20': "),
        (("train", "--save-every", "0"), r"save-every: 0: give 1 or more"),
        (("train", "--model"), r"--model"),
        (("train", "--lr", "abc"), r"--lr: 'abc': give a number"),
        (("train", "--epochs", "2.5"), r"--epochs: '2\.5': give a whole number"),
        (("train", "--precision", "fp8"), r"--precision: 'fp8': choose one of bf16, fp16, fp32, t"),
        (("train", "--resume", "absent"), r"resume: 'absent': no run there"),
        (("train", "--resume"), r"--resume"),
        (
            ("evaluate",),
            r"CHECKPOINT: none given: give a run, a checkpoint folder, or .* in one \(",
        ),
        (("summary",), r"MODEL: none given: give an architecture, e\.g\. resnet18"),
        (("evaluate", "absent"), r"checkpoint: absent: no weights there"),
        (("evaluate", "absent", "-b", "0"), r"batch-size: 0"),
        (("evaluate", LONG), r"checkpoint: 'x+.*': File name too long; give another path"),
        (("train", "--resume", LONG), r"resume: 'x+': cannot be read \(File name too long\); give"),
        (("summary", "vgg"), r"model: 'vgg': choose one of"),
        (("summary", "resnet18", "--image-size", "0"), r"image-size: 0: give 1 to 65536"),
        (("summary", "resnet18", "--image-size", "1" + 12 * "0"), r"image-size: 10+: give 1 to 6"),
        (("summary", "resnet18", "--num-classes", "1" + 30 * "0"), r"num-classes: 10+: give 2 to"),
        (("train", "--accumulation", "1" + 20 * "0"), r"accumulation: 10+: give 1 to 65536"),
        (("show-augmentation", "slow"), r"recipe: 'slow': choose one of default"),
        (("show-augmentation", "--augment", "melt"), r"augment: 'melt': choose from crop, flip"),
        (("show-augmentation", "--images", "0"), r"images: 0: give 1 to 100"),
        (("show-augmentation", "--output", ""), r"output: '': is no path in UTF-8; give another"),
        (("show-augmentation", "--mixup", "-1"), r"mixup: -1\.0: give 0 or more"),
        (("show-augmentation", "--output", "absent/x.png"), r"output: .*cannot be written \(No su"),
        (("download",), r"set: none given: choose one of cifar10, cifar100, tiny-im"),
        (("train", "--modle", "resnet20"), r"cifar: --modle: no such option; did you mean --model"),
        (("train", "--mode", "resnet20"), r"cifar: --mode: no such option; did you mean --model\?"),
        (("train", "--batchsize", "3"), r"--batchsize: no such option; did you mean --batch-size"),
        (("train", "--noreport"), r"--noreport: no such option; did you mean --no-report\?"),
        (("train", "--EPOCHS", "3"), r"--EPOCHS: no such option; did you mean --epochs\?"),
        (("train", "-lr", "3"), r"-lr: no such option; did you mean --lr\?"),
        (("train", "--zebra", "3"), r"--zebra: no such option; leave it out"),
        (("train", "--resume", "--cpu"), r"--resume: no value: give one"),
        (("train", "resnet20"), r"cifar: 'resnet20': belongs to no option; leave it out"),
        (("train", "--compile=maybe"), r"cifar: compile: 'maybe': takes no value; leave that out"),
        (("download", "mnist"), r"mnist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cifar(*words) == 2
    assert re.search(named, only_line(capsys))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-b", "97"), "batch-size: 97: larger than the 96"),
        (("--accumulation", "3"), "nearest that does: 30 or 33"),
        (("--precision", "fp16"), "precision: 'fp16'"),
        (("--precision", "tf32"), "precision: 'tf32'"),
        (("--num-processes", "3"), "num-processes: 3: 1 run together"),
    ],
)
def test_what_the_data_or_the_machine_cannot_do_is_one_line(
    npz: Path, tmp_path: Path, options: tuple[str, str], named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(npz, tmp_path / "run", *options) == 2
    assert named in only_line(capsys)
    assert not (tmp_path / "run").exists()


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("the pickle ran code",))


def cifar10(root: Path) -> Path:
    """CIFAR-10's layout with one image a batch; the folder of the batches."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"class{i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def test_a_truncated_cifar_batch_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = cifar10(tmp_path) / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-100])
    assert cifar("train", "--cpu", "--data", f"cifar10:{tmp_path}", "--output-dir", tmp_path / "run") == 2  # fmt: skip # noqa: E501
    assert "data_batch_3" in only_line(capsys)


def test_a_pickle_that_would_run_code_is_one_line_and_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cifar10(tmp_path) / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    assert cifar("train", "--cpu", "--data", f"cifar10:{tmp_path}", "--output-dir", tmp_path / "run") == 2  # fmt: skip # noqa: E501
    found = capsys.readouterr()
    assert "the pickle ran code" not in found.out
    assert len(found.err.splitlines()) == 1 and "data_batch_1" in found.err


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"train_images": np.zeros((96, 16, 16), np.uint8)}, "train"),
        ({"test_labels": np.zeros(49, np.int64)}, "test"),
        ({"train_labels": np.zeros(96, np.float32)}, "labels"),
        ({"train_images": np.zeros((96, 3, 16, 16), np.float32)}, "images"),
        ({"train_labels": np.full(96, -1)}, "labels"),
    ],
)
def test_an_npz_of_the_wrong_form_is_one_line(
    npz: Path, tmp_path: Path, changed: dict[str, np.ndarray], named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    np.savez(npz, **{**np.load(npz), **changed})
    assert train(npz, tmp_path / "run") == 2
    assert named in only_line(capsys)


def test_a_picture_of_no_augmentation_and_of_mixing(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows of an image and three epochs; `--augment` alone is none."""
    monkeypatch.chdir(tmp_path)
    words = ("show-augmentation", "sgd", "--data", f"npz:{npz}", "--images", "2", "--epochs", "3")
    for mixing in ((), ("--mixup", "1"), ("--cutmix", "1")):
        assert cifar(*words, "--augment", *mixing) == 0
        assert capsys.readouterr().out == "augmentation-sgd.png\n"
        sheet = np.array(Image.open(tmp_path / "augmentation-sgd.png"))
        original, *epochs = np.split(sheet, 4, axis=1)
        assert [np.array_equal(each, original) for each in epochs] == [not mixing] * 3


def test_an_output_folder_that_cannot_be_made_is_one_line(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert train(npz, tmp_path / "file" / "run") == 2
    assert "output-dir: " in only_line(capsys)
    assert train(npz, tmp_path / "file") == 2
    assert "output-dir: " in only_line(capsys)


def test_a_batch_of_one_that_nothing_can_normalise_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_dataset(train=16, test=10, size=4)
    arrays = {"train_images": tiny.train.images, "train_labels": tiny.train.labels}
    np.savez(tmp_path / "tiny.npz", **arrays, test_images=tiny.test.images,
             test_labels=tiny.test.labels)  # fmt: skip
    assert train(tmp_path / "tiny.npz", tmp_path / "run", "-b", "1") == 2
    line = only_line(capsys)
    assert "batch-size: 1: is one image per device" in line and "give 2 or more" in line
    assert train(tmp_path / "tiny.npz", tmp_path / "run2", "-b", "2", "--epochs", "1") == 0


def test_a_working_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cifar("summary", "resnet20") == 2
    monkeypatch.chdir(tmp_path)
    assert "working folder: is gone; change to another one" in only_line(capsys)


def test_weights_that_may_not_be_looked_for_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", denied)
        assert cifar("evaluate", tmp_path / "run") == 2
    assert re.search(
        r"checkpoint: '.*/run/manifest.json': Permission denied; give", only_line(capsys)
    )
    with monkeypatch.context() as patch:
        patch.setattr("cifar.files.os.scandir", denied)
        assert cifar("evaluate", tmp_path / "run") == 2
    assert re.search(
        r"checkpoint: '.*/run/checkpoints': Permission denied; give", only_line(capsys)
    )


def test_evaluating_checks_the_size_that_a_library_s_network_takes(npz: Path) -> None:
    """As a transformer's, which has learnt where each patch lies."""
    dataset = load_dataset(parse_data(f"npz:{npz}"))
    model = ModelConfig(name="torchvision:vit_b_16")
    card = ModelCard(
        config=TrainConfig(model=model, data=parse_data(f"npz:{npz}"), precision="fp32"),
        averaged=False,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint(),
        classes=dataset.classes,
        image_size=(224, 224),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        step=1,
        samples_seen=1,
    )
    with pytest.raises(DataError, match=r"images of 16 x 16 pixels, which torchvision:vit_b_16 do"):
        scoring._load(None, card)
    resized = replace(card.config, model=replace(model, resize=224))
    assert scoring._load(None, replace(card, config=resized)).classes == dataset.classes


def test_evaluating_checks_the_data_and_the_checkpoint(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path / "run", "--epochs", "1") == 0
    capsys.readouterr()
    arrays = dict(np.load(npz))
    fewer = {name: array % 7 if "labels" in name else array for name, array in arrays.items()}
    np.savez(tmp_path / "seven.npz", **fewer)
    assert cifar("evaluate", tmp_path / "run", "--data", f"npz:{tmp_path / 'seven.npz'}") == 2
    assert "(0, 1, 2, ... 7 in all) are not those of the checkpoint, npz:toy" in only_line(capsys)

    assert cifar("evaluate", tmp_path / "run", "--cpu", "--data", f"npz:{npz}") == 0
    shown, told = capsys.readouterr()
    assert "resnet20-w4" in shown and "50 images" in shown and told == ""
    assert f"moving average of the weights: {tmp_path}/run/final/model.safetensors\n" in shown
    assert re.search(r"^ *9 +9 +\d+\.\d( +\d){10} *$", shown, re.MULTILINE)
    assert cifar("evaluate", tmp_path / "run", "--cpu", "--data", f"npz:{npz}", "--split",
                 "train") == 0  # fmt: skip
    assert "96 images" in capsys.readouterr().out

    (tmp_path / "run").rename(tmp_path / "run.safetensors")
    assert cifar("evaluate", tmp_path / "run.safetensors", "--cpu", "--data", f"npz:{npz}") == 0
    (tmp_path / "run.safetensors").rename(tmp_path / "run")
    capsys.readouterr()

    nan = Evaluation(samples=1, loss=float("nan"), top1=0.0, top5=0.0, confusion=())
    with mock.patch("cifar.scoring.evaluate", return_value=nan):
        assert cifar("evaluate", tmp_path / "run", "--cpu", "--json") == 2
    assert "model.safetensors: loss nan on these images: the weights are" in only_line(capsys)

    weights = tmp_path / "run" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cifar("evaluate", tmp_path / "run", "--data", f"npz:{npz}") == 2
    assert "does not match its checksum" in only_line(capsys)


def test_weights_are_evaluated_on_the_images_they_were_trained_on(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(npz, tmp_path / "run", "--epochs", "1") == 0
    capsys.readouterr()
    newest = tmp_path / "run" / "checkpoints" / "step-000000003"
    found = {}
    for path in (tmp_path / "run", newest, newest / "model.safetensors"):
        assert cifar("evaluate", path, "--cpu", "--json") == 0
        out, err = capsys.readouterr()
        assert err == ""
        found[path] = json.loads(out)
    scores = [(each["samples"], each["averaged"], each["loss"]) for each in found.values()]
    assert scores[0] == scores[1] and scores[1][2] != scores[2][2]
    assert [score[:2] for score in scores] == [(50, True), (50, True), (50, False)]
    assert found[newest]["weights"] == str(newest / "ema.safetensors")

    arrays = dict(np.load(npz))
    arrays["test_images"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    assert cifar("evaluate", tmp_path / "run", "--cpu", "--data", f"npz:{tmp_path / 'other.npz'}") == 0  # fmt: skip # noqa: E501
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: data: npz:other: not the data set the weights were trained with")

    npz.unlink()
    assert cifar("evaluate", tmp_path / "run", "--cpu") == 2
    line = only_line(capsys)
    assert str(npz) in line and "name another --data" in line


def test_under_a_launcher_nothing_is_evaluated_many_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cifar("evaluate", "absent") == 2
    assert "processes: 2: evaluate runs in one process; start it without" in only_line(capsys)


def test_an_optimizer_with_a_learning_rate_is_taken(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--optimizer", "adamw", "--epochs", "1", "--augment", "flip")
    assert train(npz, tmp_path / "run", *options) == 0, "which gives --lr too, and crops nothing"


def test_no_option_at_all_is_the_default_recipe_on_the_embedded_images() -> None:
    read = read_train_options([])
    assert (read.train.recipe, str(read.train.data)) == (get_recipe("default"), "shapes")


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "fp16", "--max-skipped-steps", "9"),
        ("--max-skipped-steps", "9"),
        ("--optimizer", "sgd", "--lr", "0.1", "--no-nesterov"),
        ("--nesterov",),
        ("--optimizer", "adamw", "--lr", "0.001"),
    ],
)
def test_options_that_change_something_are_taken(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    read = read_train_options([*options])
    assert read.run.max_skipped_steps == (9 if "9" in options else 20)
    assert read.train.recipe.nesterov is ("--no-nesterov" not in options)


def test_a_summary_tells_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar("summary", "resnet18") == 0
    assert "11,173,962" in capsys.readouterr().out


def test_another_process_waits_for_the_first_before_it_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends it meanwhile, unless the first process has nothing to complain of."""
    waited: list[float] = []
    monkeypatch.setattr("cifar.cli.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setenv("RANK", "0")
    complain_of_input("cifar", DataError("data: gone"))
    assert waited == []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    complain_of_input("cifar", DataError("data: gone"))
    assert waited == [FIRST_PROCESS_SECONDS]
    assert capsys.readouterr().err == "cifar: data: gone\ncifar: process 3: data: gone\n"
    complain_of_input("cifar", UnmetError("MASTER_ADDR: 'x': unknown"))
    assert waited == [FIRST_PROCESS_SECONDS], "which no other one can say for it"


def test_a_process_that_lacks_memory_is_named_after_a_moment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In which the others may have met the same."""
    waited: list[float] = []
    monkeypatch.setattr("cifar.cli.time", SimpleNamespace(sleep=waited.append))
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        complain_of_input("cifar", OutOfMemoryError("memory: no"))
    assert waited == [MEMORY_SECONDS] and MEMORY_SECONDS < FIRST_PROCESS_SECONDS
    who = ("cifar", "cifar: process 0", "cifar: process 1")
    assert capsys.readouterr().err == "".join(f"{each}: memory: no\n" for each in who)


HELP = """
import sys
from cifar.commands import main
sys.argv = ["cifar", *sys.argv[1:]]
try:
    code = main()
except SystemExit as stop:
    code = stop.code or 0
print("heavy:", sorted({"torch", "accelerate", "pandas"} & sys.modules.keys()))
sys.exit(code)
"""


@pytest.mark.parametrize("words", [("evaluate", "absent"), ("train", "--teacher", "absent")])
def test_weights_that_are_not_there_are_told_before_torch_is_imported(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, out, err = finish(start("-c", HELP, *words, module=False, cwd=tmp_path))
    assert (code, out) == (2, "heavy: []\n")
    assert len(err.splitlines()) == 1 and "absent: no weights there; give a run" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", ["", "train", "lr-find", "evaluate", "summary", "show-augmentation", "download"]
)
def test_help_is_quick_for_it_imports_no_torch(command: str) -> None:
    code, out, err = finish(start("-c", HELP, *command.split(), "--help", module=False))
    assert (code, err) == (0, "")
    assert (
        out.endswith("heavy: []\n")
        and f"example{'' if command else 's'}:\n  cifar {command}" in out
    )
    assert "--lr" in out or command != "train"


def test_started_directly_bad_input_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    process = start("cifar", "train", *TINY_OPTIONS, "--data", "npz:absent.npz", cwd=tmp_path)
    code, out, err = finish(process)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and re.match("cifar: data: /.*/absent.npz", err)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, "cifar: interrupted\n"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "cifar: process 1: interrupted\n"),
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, "cifar: interrupted\n"),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, ""),
    ],
)
def test_ctrl_c_is_told_by_the_first_process_or_by_one_that_no_launcher_has_started(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    line: str,
) -> None:
    def run(words: list[str]) -> int:
        raise KeyboardInterrupt

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_program("cifar", "", {"go": Command(help="", run=run)}, ["go"]) == 130
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("program", ["cifar", "bench"])
def test_ctrl_c_is_one_line_while_modules_are_imported(program: str) -> None:
    """An import of the commands that is interrupted stands for one that a user interrupts."""
    script = f"""
import sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "{program}.commands":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from {program}.__main__ import main
sys.exit(main())
"""
    assert finish(start("-c", script, module=False)) == (130, "", f"{program}: interrupted\n")
