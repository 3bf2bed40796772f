"""Test sets of the user's own: formats, labels or none, and what is wrong with them in a line."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import make_dataset, save_npz
from PIL import Image
from training import cifar, train

from cifar.data.test_set import TestSet, read_test_set
from cifar.errors import DataError
from cifar.predictions import Predictions
from cifar.report import predictions_csv

CLASSES = tuple(f"class{number}" for number in range(10))
SHAPE = (3, 16, 16)
IMAGES = make_dataset().test.images[:20]
LABELS = make_dataset().test.labels[:20]


def nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def write_npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"


def write_folder(root: Path, *, in_classes: bool) -> Path:
    for number, (image, label) in enumerate(zip(nhwc(IMAGES), LABELS, strict=True)):
        folder = root / "mine" / (CLASSES[label] if in_classes else ".")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return root / "mine"


def read(path: Path, labels: Path | None = None) -> TestSet:
    return read_test_set(path, labels, CLASSES, SHAPE)


@pytest.mark.parametrize("keys", [("images", "labels"), ("x_test", "y_test"), ("data", "labels")])
def test_an_npz_file(tmp_path: Path, keys: tuple[str, str]) -> None:
    images, labels = keys
    found = read(write_npz(tmp_path, **{images: nhwc(IMAGES), labels: LABELS[:, None]}))
    assert np.array_equal(found.images, IMAGES) and np.array_equal(found.labels, LABELS)
    assert found.samples[:2] == ("0", "1")
    assert read(write_npz(tmp_path, **{images: IMAGES})).labels is None


def test_labels_of_an_npz_file_number_its_own_names_if_it_has_them(tmp_path: Path) -> None:
    """Here all but the last of the model's classes, in the opposite order."""
    images, labels = IMAGES[LABELS < 9], LABELS[LABELS < 9]
    names = np.array(CLASSES[8::-1])
    found = read(write_npz(tmp_path, images=images, labels=8 - labels, class_names=names))
    assert np.array_equal(found.labels, labels) and found.labels.dtype == np.int64


def test_two_npy_files_as_of_cifar_10_1(tmp_path: Path) -> None:
    data, labels = (tmp_path / f"cifar10.1_v6_{name}.npy" for name in ("data", "labels"))
    np.save(data, nhwc(IMAGES))
    np.save(labels, LABELS.astype(np.int32))
    found = read(data, labels)
    assert np.array_equal(found.images, IMAGES) and np.array_equal(found.labels, LABELS)
    assert read(data).labels is None


def test_folders_of_classes_and_of_images_alone(tmp_path: Path) -> None:
    found = read(write_folder(tmp_path / "a", in_classes=True))
    order = [int(Path(name).stem) for name in found.samples]
    assert np.array_equal(found.images, IMAGES[order])
    assert np.array_equal(found.labels, LABELS[order])
    assert found.samples[0] == "class0/00.png"
    found = read(write_folder(tmp_path / "b", in_classes=False))
    assert np.array_equal(found.images, IMAGES) and found.labels is None
    assert found.samples[0] == "00.png"


def test_grey_files_are_of_one_channel_for_a_model_of_one(tmp_path: Path) -> None:
    grey = np.repeat(IMAGES[:, :1], 3, axis=1)
    path = tmp_path / "mine"
    path.mkdir()
    for number, image in enumerate(nhwc(grey)):
        Image.fromarray(image).save(path / f"{number:02d}.png")
    found = read_test_set(path, None, CLASSES, (1, *SHAPE[1:]))
    assert np.array_equal(found.images, IMAGES[:, :1])
    assert np.array_equal(read_test_set(path, None, CLASSES, SHAPE).images, grey)
    with pytest.raises(DataError, match=r"images: .*: 3x16x16 .*: the model was trained with 1x16"):
        read_test_set(
            write_folder(tmp_path / "b", in_classes=False), None, CLASSES, (1, *SHAPE[1:])
        )


def test_a_network_that_resizes_takes_any_size(tmp_path: Path) -> None:
    path = write_npz(tmp_path, images=IMAGES[:, :, :8])
    found = read_test_set(path, None, CLASSES, SHAPE, any_size=True)
    assert found.images.shape[1:] == (3, 8, 16)
    with pytest.raises(DataError, match="the model was trained with 1x8x16"):
        read_test_set(path, None, CLASSES, (1, 8, 8), any_size=True)


def test_names_that_are_not_in_utf_8_are_written_all_the_same() -> None:
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    predictions = Predictions(probabilities=np.array([[0.25, 0.75]], dtype=np.float32), labels=None)
    content = predictions_csv(predictions, ("cat", "dog"), [name])
    assert content.decode().splitlines()[1].startswith("caf\\udce9.png,dog,0.75")


def not_an_image_file(folder: Path) -> Path:
    (folder / "mine.txt").write_text("no images")
    return folder / "mine.txt"


def another_class(folder: Path) -> Path:
    path = write_folder(folder, in_classes=True)
    (path / "class3").rename(path / "dog")
    return path


def loose_image(folder: Path) -> Path:
    path = write_folder(folder, in_classes=True)
    (path / "class3" / "03.png").rename(path / "loose.png")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f / "no.npz", r"images: .*no\.npz: no such file"),
        (lambda f: f / "no.npy", r"images: .*no\.npy: no such file"),
        (not_an_image_file, r"images: .*mine\.txt: no folder, \.npz or \.npy file; give one"),
        (lambda f: write_npz(f, x=IMAGES), r"images: .*: holds x, but no images or test_images or"),
        (
            lambda f: write_npz(f, images=IMAGES[:, :, :8]),
            r"images: .*: 3x8x16 \(channels x height x width\): the model was trained with 3x16x16",
        ),
        (lambda f: write_npz(f, images=IMAGES, labels=LABELS[:3]), r"labels: int64 \[3\]: must be"),
        (
            lambda f: write_npz(f, images=IMAGES, labels=LABELS + 5),
            r"labels: .*mine.npz: 14: the model has 10",
        ),
        (
            lambda f: write_npz(f, images=IMAGES, labels=LABELS, class_names=np.array(CLASSES[:9])),
            r"class_names: <U6 \[9\]: must be at least 10 texts, the largest label is 9; add names",
        ),
        (
            lambda f: write_npz(
                f, images=IMAGES, labels=LABELS, class_names=np.array([*CLASSES[:9], "dog"])
            ),
            r"class_names: 'dog': no class of the model, which are class0, class1",
        ),
        (lambda f: write_npz(f, images=IMAGES.astype(float)), r"images: float64 .*: must be uint8"),
        (
            loose_image,
            r"images: .*loose\.png: an image beside the classes; move it into one of them",
        ),
        (another_class, r"images: .*dog: no class of the model, which are class0, class1"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_labels_are_for_npy_images_and_named_when_wrong(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", LABELS)
    np.save(tmp_path / "images.npy", IMAGES)
    with pytest.raises(DataError, match=r"labels: .*: are for images in an \.npy file"):
        read(write_npz(tmp_path, images=IMAGES), tmp_path / "labels.npy")
    with pytest.raises(DataError, match=r"labels: .*no\.npy: no such file"):
        read(tmp_path / "images.npy", tmp_path / "no.npy")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00junk")
    with pytest.raises(DataError, match=r"labels: .*bad\.npy: not an \.npy file, or damaged"):
        read(tmp_path / "images.npy", tmp_path / "bad.npy")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="an array of objects"):
        read(tmp_path / "objects.npy")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    save_npz(root / "toy.npz", make_dataset(), class_names=np.array(CLASSES))
    assert train(root / "toy.npz", root / "run") == 0
    return root / "run"


def evaluate(run: Path, *options: object) -> int:
    return cifar("evaluate", run, "--cpu", *options)


def predicted(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_a_labelled_set_is_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    folder = write_folder(tmp_path, in_classes=True)
    assert evaluate(run, "--images", folder, "--json", "--predictions", tmp_path / "p.csv") == 0
    found = json.loads(capsys.readouterr().out)
    rows = predicted(tmp_path / "p.csv")
    right = [row["predicted"] == Path(row["sample"]).parent.name for row in rows]
    assert found["samples"] == 20 and found["top1"] == pytest.approx(sum(right) / 20)
    assert [row["true"] for row in rows] == [Path(row["sample"]).parent.name for row in rows]
    assert evaluate(run, "--images", folder) == 0
    assert "on 20 images of mine" in capsys.readouterr().out


def test_an_unlabelled_set_gives_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_npz(tmp_path, images=IMAGES)
    capsys.readouterr()
    assert evaluate(run, "--images", images, "--predictions", tmp_path / "p.csv") == 0
    shown = capsys.readouterr().out
    assert "on 20 images of mine.npz" in shown and "Predicted" in shown and "top-1" not in shown
    rows = predicted(tmp_path / "p.csv")
    assert list(rows[0]) == ["sample", "predicted", "confidence"]
    np.savez(tmp_path / "known.npz", images=IMAGES, labels=LABELS)
    known = ("--images", tmp_path / "known.npz", "--predictions", tmp_path / "k.csv")
    assert evaluate(run, *known) == 0
    assert [row["predicted"] for row in predicted(tmp_path / "k.csv")] == [
        row["predicted"] for row in rows
    ]
    assert evaluate(run, "--images", images, "--report", tmp_path / "report") == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "predictions.csv",
        "predictions.png",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "images: {}: have no labels, so no accuracy; to write what is predicted give"),
        (("--json", "--predictions", "p.csv"), "images: {}: have no labels, so no accuracy"),
        (("--data", "shapes"), "images: '{}': are instead of --data and --split"),
        (("--split", "train"), "images: '{}': are instead of --data and --split"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    options = tuple(str(tmp_path / each) if each == "p.csv" else each for each in options)
    images = write_npz(tmp_path, images=IMAGES)
    capsys.readouterr()
    with mock.patch("cifar.scoring.evaluate", side_effect=AssertionError("it is known before")):
        assert evaluate(run, "--images", images, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar: " + message.format(images))
    assert not (tmp_path / "p.csv").exists()


def test_labels_need_images_and_places_must_be_writable(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert evaluate(run, "--labels", "x.npy") == 2
    assert "labels: 'x.npy': are of images in an .npy file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for option in ("--predictions", "--report"):
        for inside in (Path("file", "inside"), Path("x" * 300), Path("new", "x" * 300)):
            assert evaluate(run, option, tmp_path / inside) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"/{inside}" in line and "cannot be written; give another" in line
    assert evaluate(run, "--predictions", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"cifar: predictions: '{tmp_path}': cannot be written; give another file"
    )
