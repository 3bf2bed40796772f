"""Tiny ImageNet: its layout, and the one line that each damaged copy is refused with."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cifar.data import images, sources, tiny_imagenet
from cifar.data.config import DataConfig, parse_data
from cifar.data.dataset import Dataset
from cifar.data.sources import load_dataset
from cifar.errors import DataError

CLASSES = {
    "n02000000": ("tabby, tabby cat", (250, 10, 10)),
    "n01000000": ("goldfish, Carassius auratus", (10, 250, 10)),
    "n03000000": ("tabby", (10, 10, 250)),
}
"""In the order of `wnids.txt`, which is not the sorted one: synonyms, and the images' colour."""
PER_CLASS = {"train": 3, "val": 2}


def write_image(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "RGB" if len(colour) == 3 else "L"
    Image.new(mode, size, colour if mode == "RGB" else colour[0]).save(path, format="JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy with three classes; a class's first training image is grey."""
    folder = tmp_path / "tiny-imagenet-200"
    val_lines = []
    for place, (number, (_, colour)) in enumerate(CLASSES.items()):
        train, names = folder / "train" / number, []
        for index in range(PER_CLASS["train"]):
            names.append(f"{number}_{9 + index}.JPEG")
            write_image(train / "images" / names[-1], colour if index else (77,))
        (train / f"{number}_boxes.txt").write_text("".join(f"{n}\t0\t1\t62\t63\n" for n in names))
        for index in range(PER_CLASS["val"]):
            name = f"val_{index * len(CLASSES) + place}.JPEG"
            write_image(folder / "val" / "images" / name, colour)
            val_lines.append((name, f"{name}\t{number}\t0\t0\t62\t62\n"))
    (folder / "val" / "val_annotations.txt").write_text("".join(t for _, t in sorted(val_lines)))
    (folder / "wnids.txt").write_text("\n".join(CLASSES))
    words = {number: synonyms for number, (synonyms, _) in CLASSES.items()} | {"n09": "nothing"}
    (folder / "words.txt").write_text("".join(f"{n}\t{text}\n" for n, text in words.items()))
    write_image(folder / "test" / "images" / "test_0.JPEG", (0, 0, 0), size=(8, 8))
    return folder


def load(root: Path) -> Dataset:
    return load_dataset(parse_data(f"tiny-imagenet:{root}"))


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data: ")
    return message


def test_the_layout_is_read(root: Path) -> None:
    data = load(root)
    assert data.name == "tiny-imagenet"
    assert data.classes == ("goldfish", "tabby (n02000000)", "tabby (n03000000)")
    assert data.train.images.shape == (9, 3, 64, 64)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test.images.shape == (6, 3, 64, 64)
    assert data.test.labels.tolist() == [1, 0, 2, 1, 0, 2], "val_0.JPEG is of the first number"
    for split in (data.train, data.test):
        brightest = split.images.mean((2, 3)).argmax(1)
        greys = [np.ptp(image, axis=0).max() == 0 for image in split.images]
        expected = [[1, 0, 2][label] for label in split.labels]
        assert [b == e or g for b, e, g in zip(brightest, expected, greys)] == [True] * len(split)
    assert [int(image.mean()) == 77 for image in data.train.images] == [True, False, False] * 3


def test_images_are_pillow_s_and_come_as_they_are_listed(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = root / "train" / "n01000000" / "images" / "n01000000_10.JPEG"
    Image.fromarray(noise).save(path, format="JPEG")
    expected = np.array(Image.open(path)).transpose(2, 0, 1)
    assert np.array_equal(load(root).train.images[1], expected)
    boxes = root / "train" / "n01000000" / "n01000000_boxes.txt"
    boxes.write_text("".join(reversed(boxes.read_text().splitlines(keepends=True)[:3])))
    assert np.array_equal(load(root).train.images[1], expected)
    assert load(root).train.images[2].mean() == pytest.approx(77, abs=1), "which was the first"


def test_the_folder_around_it_and_the_default_one_do(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(root).fingerprint()
    assert load(root.parent).fingerprint() == expected
    monkeypatch.setenv("CIFAR_DATA_DIR", str(root.parent))
    assert load_dataset(parse_data("tiny-imagenet")).fingerprint() == expected


def test_where_it_lies_says_nothing_of_what_it_is() -> None:
    config = parse_data("tiny-imagenet:/somewhere")
    assert config == DataConfig(source="tiny-imagenet", root="/somewhere")
    assert str(config) == "tiny-imagenet:/somewhere"


def test_a_missing_copy_names_the_remedies(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    for part in ("no tiny-imagenet-200 with wnids.txt", "`cifar download tiny-imagenet`"):
        assert part in message


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace a text in one of the lists."""

    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


BOXES = "train/n02000000/n02000000_boxes.txt"
IMAGE = "train/n02000000/images/n02000000_10.JPEG"
VAL = "val/val_annotations.txt"


def cut(root: Path) -> None:
    (root / IMAGE).write_bytes((root / IMAGE).read_bytes()[:300])


def other_size(root: Path) -> None:
    write_image(root / IMAGE, (1, 2, 3), size=(64, 60))


def other_format(root: Path) -> None:
    Image.new("RGB", (64, 64)).save(root / IMAGE, format="GIF")


def folder_for_a_file(root: Path) -> None:
    (root / IMAGE).unlink()
    (root / IMAGE).mkdir()


def copied(name: str) -> Callable[[Path], None]:
    """A file that no list names."""
    return lambda root: (root / name).write_bytes((root / IMAGE).read_bytes())


def without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).rename(root.parent / "elsewhere")


def class_of_no_list(root: Path) -> None:
    (root / "train" / "n04000000").mkdir()


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (cut, IMAGE, "unreadable image"),
        (other_size, IMAGE, "64x60 pixels: must be 64x64 like the others"),
        (other_format, IMAGE, "unreadable image"),
        (folder_for_a_file, IMAGE, "is no file"),
        (remove(IMAGE), IMAGE, "no such file; get a fresh copy"),
        (remove("val/images/val_3.JPEG"), "val/images/val_3.JPEG", "no such file; get a fresh"),
        (copied("val/images/val_9.JPEG"), "val/images/val_9.JPEG", "not in val_annotations.txt;"),
        (
            copied("train/n01000000/images/n02000000_1.JPEG"),
            "train/n01000000/images/n02000000_1.JPEG",
            "not in n01000000_boxes.txt; remove it",
        ),
        (without("train"), "train", "no such folder"),
        (without("train/n02000000"), BOXES, "no such file"),
        (without("train/n02000000/images"), "train/n02000000/images", "no such folder"),
        (without("val/images"), "val/images", "no such folder"),
        (class_of_no_list, "train/n04000000", "no class of wnids.txt"),
        (remove(BOXES), BOXES, "no such file"),
        (remove(VAL), VAL, "no such file"),
        (remove("words.txt"), "words.txt", "no such file; get a fresh copy"),
        (edit("words.txt", "goldfish", ""), "words.txt", "no name of n01000000"),
        (edit("words.txt", "n01000000\t", ""), "words.txt", "no name of n01000000"),
        (
            edit("wnids.txt", "n01000000", "goldfish"),
            "wnids.txt",
            "line 2: 'goldfish': must be a number such as n01443537, each once",
        ),
        (edit("wnids.txt", "n01000000", "n02000000"), "wnids.txt", "line 2: 'n02000000': must be"),
        (edit("wnids.txt", "n01000000\n", ""), "train/n01000000", "no class of wnids.txt"),
        (
            edit(BOXES, "n02000000_10.JPEG", "n01000000_10.JPEG"),
            BOXES,
            "line 2: 'n01000000_10.JPEG': must be an image such as n02000000_0.JPEG, each once",
        ),
        (edit(BOXES, "n02000000_10", "n02000000_9"), BOXES, "line 2: 'n02000000_9.JPEG': must be"),
        (edit(BOXES, "n02000000_10", "../n02000000_10"), BOXES, "line 2: '../n02000000_10.JPEG':"),
        (edit(VAL, "val_1.JPEG", "val_0.JPEG"), VAL, "line 2: 'val_0.JPEG': must be an image"),
        (edit(VAL, "val_1.JPEG", "/val_1.JPEG"), VAL, "such as val_0.JPEG, each once"),
        (
            edit(VAL, "val_1.JPEG\tn01000000", "val_1.JPEG\tn05000000"),
            VAL,
            "line 2: 'n05000000': must be a class of wnids.txt",
        ),
        (edit(VAL, "val_1.JPEG\tn01000000\t", "val_1.JPEG"), VAL, "line 2: "),
    ],
)
def test_a_damaged_copy_is_refused_by_the_name_of_the_file(
    root: Path, change: Callable[[Path], None], name: str, reason: str
) -> None:
    change(root)
    message = refusal(root)
    assert message.startswith(f"data: {root / name}: ")
    assert reason in message


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", BOXES, VAL])
def test_lists_that_are_none(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / name
    path.write_bytes(b"")
    assert refusal(root) == f"data: {path}: is empty; get a fresh copy"
    path.write_bytes(b"\xff\xfe")
    assert refusal(root) == f"data: {path}: is no text in UTF-8; get a fresh copy"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(tiny_imagenet, "MAX_TEXT_BYTES", 999)
    assert refusal(root) == f"data: {path}: 1,000 bytes: must be at most 999; get a fresh copy"


def test_more_pixels_than_fit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DATASET_BYTES", 9 * 64 * 64 * 3 - 1)
    expected = f"data: {root}/train: 9 images of 64x64: must be at most 110,591 bytes; scale them"
    assert refusal(root).startswith(expected)


def test_what_lies_around_is_left_alone(root: Path) -> None:
    expected = load(root).fingerprint()
    (root / "val" / "images" / "._val_0.JPEG").touch()
    (root / "val" / "images" / "notes.txt").touch()
    (root / "train" / "notes.txt").touch()
    assert load(root).fingerprint() == expected


# What a long read shows


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SHOWN_FROM", 9)


def test_a_long_read_says_how_far_it_is(
    root: Path, many: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each look at the clock is 10 s later; the six images of `val` are too few to tell of."""
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(images.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(images, "PLAIN_INTERVAL", 30.0)
    load(root)
    expected = [f"read {done} of 9 images" for done in (2, 5, 8)]
    assert capsys.readouterr().err.splitlines() == expected


def test_other_processes_are_silent(
    root: Path, many: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2"})
    load(root)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2"})
    load(root)
    assert len(capsys.readouterr().err.splitlines()) == 9


@pytest.mark.parametrize("damaged", [False, True])
def test_a_bar_on_a_terminal_goes_at_the_end(
    root: Path, many: None, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    if damaged:
        cut(root)
        refusal(root)
    else:
        load(root)
    assert "reading images" in screen.getvalue()
    assert screen.getvalue().count("\x1b[?25h") == 1, "the cursor is shown again"
