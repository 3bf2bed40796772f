"""Every source: what it reads, and the one line it refuses bad input with."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar.data import folder, sources, unpickle
from cifar.data.arrays import read_npz
from cifar.data.config import DataConfig, parse_data
from cifar.data.dataset import Dataset
from cifar.data.sources import CIFAR_LAYOUTS, CifarLayout, default_data_dir, load_dataset
from cifar.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)


def load(text: str) -> Dataset:
    return load_dataset(parse_data(text))


def refusal(text: str) -> str:
    """The one line that `--data text` is refused with."""
    with pytest.raises(DataError) as caught:
        load(text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data: ")
    return message


# Pickles as Python 2 wrote them, put together by hand: Python 3 cannot write its byte texts.


def py2(value: Any) -> bytes:
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(py2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(py2(key) + py2(item) for key, item in value.items()) + b"u"
    return py2_array(value.tobytes(), value.shape)


def py2_array(data: bytes, shape: tuple[int, ...], dtype: bytes = b"u1") -> bytes:
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
        + py2(b"b")
        + b"tR(K\x01("
        + b"".join(map(py2, shape))
        + b"tcnumpy\ndtype\n("
        + py2(dtype)
        + b"K\x00K\x01tR(K\x03"
        + py2(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + py2(data)
        + b"tb"
    )


def py2_pickle(value: Any) -> bytes:
    return b"\x80\x02" + py2(value) + b"."


def write_cifar(root: Path, layout: CifarLayout, dumps: Any = py2_pickle) -> Path:
    """A copy of CIFAR with ten images per file."""
    target = root / layout.folder
    target.mkdir(parents=True)
    names = [f"class {number}".encode() for number in range(layout.num_classes)]
    (target / layout.meta).write_bytes(dumps({layout.names_key.encode(): names}))
    for number, name in enumerate((*layout.train, layout.test)):
        labels = [(number + index) % layout.num_classes for index in range(10)]
        batch = {b"data": PIXELS + np.uint8(number), layout.labels_key.encode(): labels}
        (target / name).write_bytes(dumps(batch))
    return target


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    return write_cifar(tmp_path, CIFAR_LAYOUTS["cifar10"])


def test_every_source_of_the_grammar_has_a_function() -> None:
    assert set(sources.SOURCES) == set(get_args(get_type_hints(DataConfig)["source"]))


def test_shapes_needs_no_path() -> None:
    assert load("shapes").name == "shapes"


# CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    "dumps",
    [py2_pickle, *(lambda value, protocol=p: pickle.dumps(value, protocol) for p in (2, 3, 4))],
    ids=["python2", "protocol2", "protocol3", "protocol4"],
)
def test_cifar_round_trip(tmp_path: Path, name: str, dumps: Any) -> None:
    layout = CIFAR_LAYOUTS[name]
    target = write_cifar(tmp_path, layout, dumps)
    data = load(f"{name}:{tmp_path}")
    parts = [PIXELS + np.uint8(number) for number in range(len(layout.train) + 1)]
    assert data.name == name
    assert data.classes[:2] == ("class 0", "class 1")
    assert len(data.classes) == layout.num_classes
    np.testing.assert_array_equal(
        data.train.images, np.concatenate(parts[:-1]).reshape(-1, 3, 32, 32)
    )
    np.testing.assert_array_equal(data.test.images, parts[-1].reshape(-1, 3, 32, 32))
    assert data.train.labels[:3].tolist() == [0, 1, 2]
    assert data.test.labels[0] == len(layout.train)
    assert data.train.images.flags.writeable
    assert data.test.labels.dtype == np.int64
    assert load(f"{name}:{target}").fingerprint() == data.fingerprint()


def test_keys_as_text_and_fortran_order(cifar10: Path) -> None:
    before = load(f"cifar10:{cifar10}")
    batch = {"data": np.asfortranarray(PIXELS), "labels": list(range(10))}
    (cifar10 / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    np.testing.assert_array_equal(load(f"cifar10:{cifar10}").train.images, before.train.images)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CIFAR_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_data_dir() == tmp_path / ".cache" / "cifar"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_data_dir() == tmp_path / "cache" / "cifar"
    monkeypatch.setenv("CIFAR_DATA_DIR", str(tmp_path / "chosen"))
    assert default_data_dir() == tmp_path / "chosen"
    write_cifar(tmp_path / "chosen", CIFAR_LAYOUTS["cifar100"])
    assert load("cifar100").name == "cifar100"


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, cifar10: Path) -> None:
    monkeypatch.setenv("HOME", str(cifar10.parent))
    assert load("cifar10:~").name == "cifar10"
    with pytest.raises(ConfigError, match=r"^data: '~no-such-user-anywhere/x': no such user"):
        load("cifar10:~no-such-user-anywhere/x")


def test_a_path_is_absolute_and_the_same_however_it_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = DataConfig(source="npz", path=str(tmp_path.resolve() / "a.npz"))
    for written in ("../a.npz", "./../a.npz", "../link/../a.npz", expected.path):
        assert parse_data(f"npz:{written}") == expected
    assert parse_data("folder:a") == parse_data("folder:./a/")
    assert parse_data("folder:~/a").path == str(tmp_path / "a")
    assert parse_data("cifar10:b").root == str(Path.cwd() / "b")
    assert parse_data("cifar100:../link").root == str(tmp_path.resolve() / "here")
    assert parse_data("cifar10").root is None


def test_a_name_that_is_too_long_is_one_line() -> None:
    for source in ("npz", "folder", "cifar10"):
        assert "File name too long; make it readable or name" in refusal(f"{source}:{'x' * 300}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_folder_names_the_remedies(tmp_path: Path, name: str) -> None:
    message = refusal(f"{name}:{tmp_path}/absent")
    for part in (f"{tmp_path}/absent", f"`cifar download {name}`", f"--data {name}:DIR"):
        assert part in message


def test_missing_batch(cifar10: Path) -> None:
    (cifar10 / "data_batch_3").unlink()
    assert f"{cifar10}/data_batch_3: no such file" in refusal(f"cifar10:{cifar10}")


@pytest.mark.parametrize("keep", [0, 1, 100, 20_000, -1])
def test_truncated_batch(cifar10: Path, keep: int) -> None:
    path = cifar10 / "data_batch_2"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(f"cifar10:{cifar10}")


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({b"labels": [0] * 10}, "data: missing"),
        ({b"data": PIXELS[:, :3000], b"labels": [0] * 10}, "data: [10, 3000]"),
        ({b"data": PIXELS}, "labels: missing"),
        ({b"data": PIXELS[:0], b"labels": []}, "data: [0, 3072]"),
        ({b"data": PIXELS, b"labels": [0] * 9}, "labels: 9"),
        ({b"data": PIXELS, b"labels": [0] * 9 + [10]}, "labels: 10: "),
        ({b"data": PIXELS, b"labels": [0] * 9 + [-1]}, "labels: -1: "),
        ({b"data": PIXELS, b"labels": [0] * 9 + [b"x"]}, "labels: b'x': "),
        ([1, 2], "holds list"),
    ],
)
def test_wrong_contents(cifar10: Path, batch: Any, reason: str) -> None:
    (cifar10 / "test_batch").write_bytes(py2_pickle(batch))
    message = refusal(f"cifar10:{cifar10}")
    assert f"{cifar10}/test_batch" in message
    assert reason in message


def test_a_training_batch_shorter_than_the_others(cifar10: Path) -> None:
    batch = {b"data": PIXELS[:9], b"labels": [0] * 9}
    (cifar10 / "data_batch_4").write_bytes(py2_pickle(batch))
    message = refusal(f"cifar10:{cifar10}")
    assert "data_batch_4: data: 9 images: must be 10 as in data_batch_1" in message


@pytest.mark.parametrize("name", [b"cat", b"two\nlines", b""])
def test_class_names_that_no_table_could_show(cifar10: Path, name: bytes) -> None:
    names = [b"cat", name, *(str(number).encode() for number in range(8))]
    (cifar10 / "batches.meta").write_bytes(py2_pickle({b"label_names": names}))
    message = refusal(f"cifar10:{cifar10}")
    assert (
        f"classes: {name.decode()!r}: must be one line of text and no other class's name" in message
    )


def test_wrong_class_names(cifar10: Path) -> None:
    (cifar10 / "batches.meta").write_bytes(py2_pickle({b"label_names": [b"cat"]}))
    assert "label_names: must be a list of 10" in refusal(f"cifar10:{cifar10}")


class Malicious:
    """Unpickled by `pickle.load`, it makes the folder that it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(5))
def test_pickle_that_runs_code_is_refused_unrun(
    cifar10: Path, tmp_path: Path, protocol: int
) -> None:
    dumped = pickle.dumps({"data": Malicious(tmp_path / "ran")}, protocol)
    (cifar10 / "data_batch_1").write_bytes(dumped)
    message = refusal(f"cifar10:{cifar10}")
    assert f"{cifar10}/data_batch_1" in message
    assert ("mkdir" in message) or protocol < 2
    assert not (tmp_path / "ran").exists()
    pickle.loads(dumped)
    assert (tmp_path / "ran").exists(), "the pickle was harmless, so the test showed nothing"


@pytest.mark.parametrize(
    "name",
    ["os system", "builtins eval", "numpy load", "numpy.core.multiarray scalar", "_codecs decode"],
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n(K\x01tR.")
    with pytest.raises(DataError, match=f"names {name.replace(' ', '.')}"):
        unpickle.unpickle(path)


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02}(" + py2(b"data") + py2_array(b"xy", (HUGE, HUGE)) + b"u.",
        b"\x80\x02}(" + py2(b"data") + py2_array(b"", (2**30, -(2**30))) + b"u.",
        b"\x80\x02}(" + py2(b"data") + py2_array(b"xy" * 4, (1,), b"f8") + b"u.",
        b"\x80\x04}(" + py2(b"data") + b"\x8e" + struct.pack("<Q", 2**40) + b"u.",
        b"\x80\x04}(" + py2(b"data") + b"T" + struct.pack("<i", HUGE) + b"u.",
        b"\x80\x02}r" + struct.pack("<I", HUGE) + b".",
        b"\x80\x04}(" + py2(b"data") + b"\x96" + struct.pack("<Q", 2**40) + b"u.",
    ],
    ids=["array", "negative", "dtype", "bytes", "text", "memo", "bytearray"],
)
def test_declared_sizes_take_no_memory(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "batch"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="batch"):
            unpickle.unpickle(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_deep_nesting_does_not_crash(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")
    with pytest.raises(DataError, match="more than 60000 tuples"):
        unpickle.unpickle(path)


def test_text_encoded_again_and_again_is_refused(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x00"
    encode = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02](" + text + encode * 50 + b"e.")
    with pytest.raises(DataError, match="more text than the file has"):
        unpickle.unpickle(path)


def test_encoding_other_than_latin1_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(
        b"\x80\x02c_codecs\nencode\n(" + b"X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR."
    )
    with pytest.raises(DataError, match="rot13"):
        unpickle.unpickle(path)


def test_file_too_large(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "MAX_FILE_BYTES", 10_000)
    assert "must be at most 10,000" in refusal(f"cifar10:{cifar10}")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` with a few bytes replaced, and perhaps cut."""

    def apply(edits: dict[int, int], cut: int) -> bytes:
        changed = bytearray(raw)
        for index, byte in edits.items():
            changed[index] = byte
        return bytes(changed[:cut])

    places = st.integers(0, len(raw) - 1)
    return st.builds(
        apply,
        st.dictionaries(places, st.integers(0, 255), min_size=1, max_size=4),
        st.one_of(st.just(len(raw)), st.integers(0, len(raw))),
    )


def check_read_or_refused(read: Callable[[Path], object], path: Path) -> None:
    message = ""
    try:
        read(path)
    except DataError as error:
        message = str(error)
    assert not message or (str(path) in message and "\n" not in message)


FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)
SMALL = np.arange(6, dtype=np.uint8).reshape(2, 3)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(
    raw=st.sampled_from(
        [
            py2_pickle({b"data": SMALL, b"labels": [1, 2]}),
            *(pickle.dumps({b"data": SMALL, "labels": [1, 2]}, p) for p in (2, 4)),
        ]
    ).flatmap(damaged)
)
def test_damaged_pickle_is_read_or_refused(scratch: Path, raw: bytes) -> None:
    path = scratch / "damaged"
    path.write_bytes(raw)
    check_read_or_refused(unpickle.unpickle, path)


def test_real_cifar10() -> None:
    root = os.environ.get("CIFAR_DATA")
    if not root:
        pytest.skip("CIFAR_DATA does not name a folder with cifar-10-batches-py")
    data = load(f"cifar10:{root}")
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert data.classes == (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert load(f"cifar10:{root}").fingerprint() == data.fingerprint()


# Image folders


def write_image(path: Path, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "P": ()}[mode]
    pixels = RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8)
    Image.fromarray(pixels, "RGB" if mode == "RGB" else None).convert(mode).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for split, count in (("train", 3), ("test", 1)):
        for name in ("dog", "cat"):
            for index in range(count):
                write_image(root / split / name / f"{index}.png")
    return root


def test_folder_round_trip(images: Path) -> None:
    data = load(f"folder:{images}")
    assert data.name == "folder:pets"
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (6, 3, 5, 6)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1]
    last = np.array(Image.open(images / "train" / "dog" / "2.png"))
    np.testing.assert_array_equal(data.train.images[5], last.transpose(2, 0, 1))
    assert load(f"folder:{images}").fingerprint() == data.fingerprint()


def test_folder_val_stands_in_for_test(images: Path) -> None:
    data = load(f"folder:{images}")
    (images / "test").rename(images / "val")
    assert load(f"folder:{images}/").fingerprint() == data.fingerprint()
    write_image(images / "test" / "cat" / "0.png")
    assert len(load(f"folder:{images}").test) == 1


def test_folder_formats_and_modes_become_rgb(images: Path) -> None:
    before = load(f"folder:{images}")
    for suffix in ("JPG", "jpeg", "bmp", "webp"):
        write_image(images / "train" / "dog" / f"9.{suffix}")
    for mode in ("L", "P", "RGBA"):
        write_image(images / "train" / "dog" / f"{mode}.png", mode=mode)
    clear = Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).convert("P")
    clear.save(images / "train" / "dog" / "clear.png", transparency=b"\x00\x80")
    for ignored in (".hidden.png", "notes.txt"):
        (images / "train" / "dog" / ignored).write_text("not an image")
    (images / "train" / ".cache").mkdir()
    data = load(f"folder:{images}")
    assert len(data.train) == len(before.train) + 8
    grey = data.train.images[[np.ptp(image, axis=0).max() == 0 for image in data.train.images]]
    assert len(grey) >= 2


def test_folder_missing_splits(images: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/absent/train: no such folder" in refusal(f"folder:{tmp_path}/absent")
    (images / "test").rename(images / "elsewhere")
    assert f"{images}/test: no such folder" in refusal(f"folder:{images}")


def test_folder_without_classes_or_images(images: Path) -> None:
    (images / "train" / "empty").mkdir()
    assert f"{images}/train/empty: no images" in refusal(f"folder:{images}")
    (images / "train").rename(images / "old")
    (images / "train").mkdir()
    assert f"{images}/train: no classes" in refusal(f"folder:{images}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_images_below_a_class(images: Path, split: str) -> None:
    name = next(entry.name for entry in (images / split).iterdir() if entry.name[0] != ".")
    below = images / split / name / "more"
    (below / "still").mkdir(parents=True)
    (below / "still" / "notes.txt").touch()
    load(f"folder:{images}")
    write_image(below / "still" / "deep.png")
    expected = f"data: {below}: a folder of images in that of a class; move them into"
    assert refusal(f"folder:{images}").startswith(expected)
    below.rename(below.with_name(".hidden"))
    load(f"folder:{images}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_images_beside_the_classes(images: Path, split: str) -> None:
    loose = images / split / "loose.JPG"
    write_image(loose)
    expected = f"data: {loose}: an image beside the classes; move it into one of them or remove it"
    assert refusal(f"folder:{images}") == expected
    loose.rename(images / split / "notes.txt")
    (images / split / ".hidden.jpg").touch()
    load(f"folder:{images}")


def test_folder_class_of_test_alone(images: Path) -> None:
    write_image(images / "test" / "cow" / "0.png")
    assert f"{images}/test/cow: no such class" in refusal(f"folder:{images}")


def test_folder_one_class_is_too_few(images: Path) -> None:
    for split in ("train", "test"):
        (images / split / "dog").rename(images / f"{split} dog")
    with pytest.raises(DataError, match="2 or more"):
        load(f"folder:{images}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_differing_sizes(images: Path, split: str) -> None:
    write_image(images / split / "dog" / "odd.png", size=(5, 6))
    message = refusal(f"folder:{images}")
    assert f"{images}/{split}/dog/odd.png: 5x6 pixels" in message
    assert "must be 6x5 like the others" in message


def test_folder_unreadable_images(images: Path) -> None:
    path = images / "train" / "cat" / "1.png"
    whole = path.read_bytes()
    for damaged_bytes in (b"", b"no image at all", whole[:60], whole[:-40]):
        path.write_bytes(damaged_bytes)
        assert f"{path}: unreadable image" in refusal(f"folder:{images}")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_folder_images_that_are_no_files(images: Path, make: Callable[[Path], None]) -> None:
    path = images / "train" / "cat" / "0.png"
    path.unlink(missing_ok=True)
    make(path)
    assert refusal(f"folder:{images}") == f"data: {path}: is no file; remove it"


def test_folder_classes_that_are_not_utf_8(images: Path) -> None:
    for split in ("train", "test"):
        write_image(images / split / "c\udcff" / "a.png")
    assert "classes: 'c\\udcff': must be one line of text" in refusal(f"folder:{images}")


def test_folder_other_formats_and_depths(images: Path) -> None:
    path = images / "train" / "cat" / "1.png"
    Image.fromarray(np.zeros((5, 6, 3), dtype=np.uint8)).save(path, format="GIF")
    assert f"{path}: unreadable image" in refusal(f"folder:{images}")
    Image.fromarray(np.zeros((5, 6), dtype=np.uint16)).save(path)
    assert "more than 8 bits" in refusal(f"folder:{images}")


@pytest.mark.parametrize("limit", [20, 10])
def test_folder_decompression_bomb(
    images: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "decompression bomb" in refusal(f"folder:{images}")


def test_folder_too_large(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DATASET_BYTES", 6 * 90 - 1)
    assert "6 images of 6x5: must be at most 539 bytes" in refusal(f"folder:{images}")
    monkeypatch.setattr(sources, "MAX_DATASET_BYTES", 6 * 90)
    assert len(load(f"folder:{images}").train) == 6


def test_unreadable_folder_is_one_line(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(folder, "_image_files", denied)
    assert "somewhere: cannot be read: Permission denied; make it readable or name" in refusal(
        f"folder:{images}"
    )


# npz


def arrays(**changes: Any) -> dict[str, Any]:
    """Six and four images of 8x7 in three classes; a change to None takes an array out."""
    made = {
        "train_images": RNG.integers(0, 256, (6, 8, 7, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": RNG.integers(0, 256, (4, 8, 7, 3), dtype=np.uint8),
        "test_labels": np.array([0, 1, 2, 0]),
        **changes,
    }
    return {key: array for key, array in made.items() if array is not None}


def write_npz(tmp_path: Path, made: dict[str, Any]) -> str:
    path = tmp_path / "digits.npz"
    np.savez(path, **made)
    return f"npz:{path}"


def test_npz_round_trip(tmp_path: Path) -> None:
    made = arrays()
    data = load(write_npz(tmp_path, made))
    assert data.name == "npz:digits"
    assert data.classes == ("0", "1", "2")
    np.testing.assert_array_equal(data.train.images, made["train_images"].transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == [0, 1, 2, 0]
    assert data.train.images.flags.writeable


def test_npz_other_forms_are_the_same_data(tmp_path: Path) -> None:
    made = arrays()
    expected = load(write_npz(tmp_path, made)).fingerprint()
    keras = {
        "x_train": np.asfortranarray(made["train_images"]),
        "y_train": made["train_labels"].astype(np.uint8)[:, None],
        "x_test": np.ascontiguousarray(made["test_images"].transpose(0, 3, 1, 2)),
        "y_test": made["test_labels"].astype(">i2"),
    }
    assert load(write_npz(tmp_path, keras)).fingerprint() == expected
    np.savez_compressed(tmp_path / "small.npz", **made)
    assert load(f"npz:{tmp_path}/small.npz").fingerprint() == expected


def test_npz_class_names_and_grey(tmp_path: Path) -> None:
    grey = {
        key: RNG.integers(0, 256, (count, 8, 7, 1), dtype=np.uint8)
        for key, count in (("train_images", 6), ("test_images", 4))
    }
    names = np.array(["null", "eins", "zwölf", "more"])
    data = load(write_npz(tmp_path, arrays(**grey, class_names=names)))
    assert data.classes == ("null", "eins", "zwölf", "more")
    assert data.train.images.shape == (6, 1, 8, 7)


IMAGES = arrays()["train_images"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_images": None}, "no train_images and train_labels"),
        ({"test_labels": None}, "no test_images and test_labels"),
        ({"train_images": IMAGES.astype(np.float32)}, "train_images: float32 [6, 8, 7, 3]"),
        ({"train_images": IMAGES[..., 0]}, "train_images: uint8 [6, 8, 7]"),
        ({"train_images": IMAGES[:0]}, "train_images: uint8 [0, 8, 7, 3]"),
        ({"train_images": IMAGES[..., :2]}, "no axis has 1 or 3"),
        ({"train_images": IMAGES[:, :3]}, "cannot tell which axis"),
        ({"test_images": IMAGES[:4, :6]}, "test images: [3, 6, 7]"),
        ({"train_labels": np.arange(5)}, "train_labels: int64 [5]"),
        ({"train_labels": np.zeros((6, 2), int)}, "train_labels: int64 [6, 2]"),
        ({"train_labels": np.zeros(6)}, "train_labels: float64 [6]"),
        ({"train_labels": np.zeros(6, bool)}, "train_labels: bool [6]"),
        ({"test_labels": np.array([0, 1, -1, 2])}, "test_labels: -1..2"),
        ({"test_labels": np.array([0, 1, 2, 2**63], np.uint64)}, f"test_labels: 0..{2**63}"),
        ({"test_labels": np.array([0, 1, 2, 10**9])}, "test labels: 1000000000: the largest"),
        ({"class_names": np.array(["a", "b"])}, "class_names: <U1 [2]: must be at least 3"),
        ({"class_names": np.array([b"a", b"b", b"c"])}, "class_names: |S1 [3]"),
        ({"class_names": np.array(["a", None, "c"])}, "class_names: an array of objects"),
        ({"class_names": np.array(["a", "b", "b"])}, "classes: 'b': must be one line"),
        ({"class_names": np.array(["a", "b", "c\n"])}, r"classes: 'c\n': must be one line"),
        ({"train_images": np.array([{}])}, "train_images: an array of objects"),
    ],
)
def test_npz_wrong_arrays(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    text = write_npz(tmp_path, arrays(**changes))
    with pytest.raises(DataError) as caught:
        load(text)
    assert reason in str(caught.value)
    assert "digits" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_objects_are_refused_unrun(tmp_path: Path) -> None:
    evil = np.array([Malicious(tmp_path / "ran")], dtype=object)
    assert "an array of objects" in refusal(write_npz(tmp_path, arrays(train_labels=evil)))
    assert not (tmp_path / "ran").exists()


def test_npz_missing_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "digits.npz"
    assert f"{path}: no such file" in refusal(f"npz:{path}")
    text = write_npz(tmp_path, arrays())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[400] ^= 1
    for raw in (b"", b"no zip", whole[:1000], bytes(flipped)):
        path.write_bytes(raw)
        assert str(path) in refusal(text)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_damaged_in_any_compression(tmp_path: Path, method: int) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", RNG.bytes(5000))
    whole = path.read_bytes()
    for position in range(35, 1000, 7):
        damaged = bytearray(whole)
        damaged[position : position + 40] = b"\xff" * 40
        path.write_bytes(damaged)
        assert str(path) in refusal(f"npz:{path}")


def test_npz_that_is_encrypted(tmp_path: Path) -> None:
    text = write_npz(tmp_path, arrays())
    path = tmp_path / "digits.npz"
    raw = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + flags] |= 1
    path.write_bytes(raw)
    assert "encrypted" in refusal(text)


def test_npz_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, train_images=np.zeros((10**6, 1, 4, 4), np.uint8))
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(sources, "MAX_DATASET_BYTES", 10**7)
    assert "bytes unpacked: must be at most 10,000,000" in refusal(f"npz:{path}")


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,)}\n", b"x"),
            "uint8 [1099511627776] needs 1,099,511,627,776 bytes, the file has 1",
        ),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}\n", b"x"), "needs 16 bytes"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}\n", b"xy"), "needs 1 bytes"),
        (npy("{'descr': 'nonsense'}\n"), "damaged"),
        (b"not an array", "damaged"),
        (b"\x93NUMPY\x03\x00", "version (3, 0)"),
    ],
)
def test_npz_declared_sizes(tmp_path: Path, member: bytes, reason: str) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", member)
    message = refusal(f"npz:{path}")
    assert str(path) in message
    assert reason in message


def test_npz_that_unpacks_to_more_than_it_says_takes_no_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive's directory may lie; no more is unpacked than the array was said to have."""
    path = tmp_path / "lie.npz"
    head = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (100,)}\n")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", head + bytes(5_000_000))
    raw = path.read_bytes()
    told = struct.pack("<I", len(head) + 5_000_000)
    assert raw.count(told) == 2
    path.write_bytes(raw.replace(told, struct.pack("<I", len(head) + 100)))
    unpacked: list[int] = []
    whole = zipfile.ZipExtFile._read1
    monkeypatch.setattr(
        zipfile.ZipExtFile,
        "_read1",
        lambda file, n: (data := whole(file, n), unpacked.append(len(data)))[0],
    )
    assert "damaged" in refusal(f"npz:{path}")
    assert sum(unpacked) < 10_000


def saved(**made: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **made)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(raw=damaged(saved(a=SMALL, b=np.array(["x"]))))
def test_damaged_npz_is_read_or_refused(scratch: Path, raw: bytes) -> None:
    path = scratch / "damaged.npz"
    path.write_bytes(raw)
    check_read_or_refused(lambda path: read_npz(path, 10**6), path)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(
    member=damaged(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }\n", b"abcdef"))
)
def test_damaged_array_is_read_or_refused(scratch: Path, member: bytes) -> None:
    path = scratch / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", member)
    check_read_or_refused(lambda path: read_npz(path, 10**6), path)


@pytest.mark.parametrize("source", ["folder", "npz"])
def test_configuration_without_a_path(source: Any) -> None:
    with pytest.raises(DataError, match="no path"):
        load_dataset(DataConfig(source=source))
