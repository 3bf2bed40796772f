"""Pictures and tables of a run: that they hold what they show, whatever the classes are."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_dataset, save_npz
from PIL import Image
from training import cifar, train

from cifar import figures
from cifar.config import ModelConfig
from cifar.evaluation import Evaluation
from cifar.predictions import Predictions
from cifar.report import Files, evaluation_files, training_files, write_files

PICTURES = {
    *("curves.png", "layers.png"),
    *("confusion.png", "classes.png", "calibration.png", "predictions.png"),
}
TABLES = {
    *("metrics.csv", "layers.csv", "scores.json", "comparison.csv", "comparison.md"),
    *("confusion.csv", "classes.csv", "calibration.csv", "predictions.csv"),
}


def rows_of(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def picture(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def made(
    count: int = 60, classes: int = 5, channels: int = 3, names: tuple[str, ...] = ()
) -> Files:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes - 1, count)  # the last class has no samples
    probabilities = random.dirichlet(np.ones(classes), count).astype(np.float32)
    predictions = Predictions(probabilities=probabilities, labels=labels)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (labels, predictions.predicted), 1)
    result = Evaluation(
        samples=count,
        loss=1.5,
        top1=float(predictions.correct.mean()),
        top5=1.0,
        confusion=tuple(map(tuple, confusion.tolist())),
    )
    return evaluation_files(
        result,
        predictions,
        images=random.integers(0, 256, (count, channels, 9, 12), dtype=np.uint8),
        samples=[f"image{number}" for number in range(count)],
        classes=names or tuple(f"class {number}" for number in range(classes)),
        what="net on toys",
    )


def test_tables_hold_the_numbers_of_the_pictures() -> None:
    files = made()
    scores = json.loads(files["scores.json"])
    predicted = rows_of(files["predictions.csv"])
    assert list(predicted[0]) == ["sample", "true", "predicted", "confidence"]
    right = [row["true"] == row["predicted"] for row in predicted]
    assert scores["top1"] == pytest.approx(sum(right) / 60)
    confusion = rows_of(files["confusion.csv"])
    counted = {(row["true class"], name): int(row[name]) for row in confusion
               for name in list(row)[1:]}  # fmt: skip
    for row in predicted:
        counted[row["true"], row["predicted"]] -= 1
    assert not any(counted.values())
    by_class = {row["class"]: row for row in rows_of(files["classes.csv"])}
    mine = [good for row, good in zip(predicted, right) if row["true"] == "class 1"]
    assert float(by_class["class 1"]["top1"]) == pytest.approx(sum(mine) / len(mine))
    assert (by_class["class 4"]["samples"], by_class["class 4"]["top1"]) == ("0", "")
    bins = rows_of(files["calibration.csv"])
    assert sum(int(row["samples"]) for row in bins) == 60
    gaps = [
        int(row["samples"]) * abs(float(row["accuracy"]) - float(row["confidence"]))
        for row in bins
        if row["accuracy"]
    ]
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / 60)


@pytest.mark.parametrize(
    ("classes", "channels", "names"),
    [
        (2, 1, ("$a_b$", "x" * 200)),
        (3, 4, ("猫", "<b>bold</b>", "a\tb")),
        (200, 3, ()),
    ],
)
def test_pictures_are_drawn_whatever_the_classes_are_called(
    classes: int, channels: int, names: tuple[str, ...]
) -> None:
    for name, content in made(40, classes, channels, names).items():
        if name.endswith(".png"):
            width, height = picture(content).size
            assert 300 < width < 4000 and 150 < height < 8000, name


def test_the_same_run_gives_the_same_bytes() -> None:
    assert made() == made()


def test_the_grid_begins_with_the_most_confident_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    caption = figures._caption
    monkeypatch.setattr(
        figures, "_caption", lambda *words: shown.append(caption(*words)) or caption(*words)
    )
    predicted = rows_of(made()["predictions.csv"])
    texts, colours = zip(*shown, strict=True)
    assert len(texts) == 40
    wrong = sorted(
        (row for row in predicted if row["true"] != row["predicted"]),
        key=lambda row: -float(row["confidence"]),
    )
    first = wrong[0]
    assert texts[0] == (
        f"true: {first['true']}\n{first['predicted']} {float(first['confidence']):.0%}"
    )
    assert colours[:32] == (figures._WRONG,) * 32
    assert set(colours[32:]) == {figures._RIGHT}


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves_and_layers(epochs: int) -> None:
    lines = [
        {"epoch": n + 1, "step": n, "train_loss": 2.0 - n / 9, "train_top1": 0.1, "test_loss": 2.0,
         "test_top1": 0.2}
        for n in range(epochs)
    ]  # fmt: skip
    files = training_files(lines, ModelConfig(name="resnet9"), (32, 32), "resnet9 on toys")
    assert [float(row["train_loss"]) for row in rows_of(files["metrics.csv"])] == [
        line["train_loss"] for line in lines
    ]
    layers = rows_of(files["layers.csv"])
    assert sum(int(row["parameters"]) for row in layers) == 6_574_090
    for name in ("curves.png", "layers.png"):
        assert min(picture(files[name]).size) > 200


def test_files_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    write_files(folder, {"x.csv": b"old"})
    monkeypatch.setattr(
        "cifar.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        write_files(folder, {"x.csv": b"new"})
    assert [path.read_bytes() for path in folder.iterdir()] == [b"old"]


def test_a_run_reports_on_its_final_weights(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(npz, run, "--report") == 0
    folder = run / "report"
    assert {path.name for path in folder.iterdir()} == PICTURES | TABLES
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["top1"] == last["test_top1"] and scores["loss"] == last["test_loss"]
    predicted = rows_of((folder / "predictions.csv").read_bytes())
    right = sum(row["true"] == row["predicted"] for row in predicted)
    assert right / len(predicted) == pytest.approx(last["test_top1"])
    epochs = rows_of((folder / "metrics.csv").read_bytes())
    assert len(epochs) == 2
    (compared,) = rows_of((folder / "comparison.csv").read_bytes())
    assert float(compared["top1"]) == last["test_top1"]
    took = [float(row["train_seconds"]) for row in epochs]
    assert float(compared["training_seconds"]) == pytest.approx(sum(took))
    weights = run / "final" / "model.safetensors"
    assert int(compared["checkpoint_bytes"]) == weights.stat().st_size
    assert int(compared["peak_memory_bytes"]) > int(compared["checkpoint_bytes"])
    assert 0 < float(compared["inference_latency_b64"]) < float(compared["inference_latency_b1"])

    elsewhere = tmp_path / "elsewhere"
    assert cifar("evaluate", run, "--cpu", "--report", elsewhere) == 0
    evaluated = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    assert set(evaluated) == (PICTURES | TABLES) - {
        *("curves.png", "metrics.csv", "layers.png", "layers.csv"),
        *("comparison.csv", "comparison.md"),
    }
    assert evaluated["confusion.csv"] == (folder / "confusion.csv").read_bytes()


def test_without_a_report_there_is_none(npz: Path, tmp_path: Path) -> None:
    assert train(npz, tmp_path / "run", "--epochs", "1") == 0
    assert not (tmp_path / "run" / "report").exists()


def test_grey_images_have_pictures_too(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "grey.npz", make_dataset(channels=1))
    assert train(path, tmp_path / "run", "--report", "--epochs", "1") == 0
    assert picture((tmp_path / "run" / "report" / "predictions.png").read_bytes())
