"""Tiny ImageNet in its original layout: 200 classes, 64x64 pixels, from the course CS231n.

```
tiny-imagenet-200/
  wnids.txt                         the classes: WordNet's numbers, one a line
  words.txt                         what all such numbers mean: number, tab, synonyms with commas
  train/NUMBER/images/*.JPEG        500 of each class, listed in train/NUMBER/NUMBER_boxes.txt
  val/images/*.JPEG                 50 of each class, listed in val/val_annotations.txt
  test/                             without labels, so of no use here
```

Its `val` is the test split here, as it is in published accuracies: `test` has no labels. Nothing is
left out silently: lists and folders must name the same images. A copy that was sorted into
`train/CLASS/*.JPEG` and `val/CLASS/*.JPEG` is read as `folder:DIR`.

Every process decodes the 110,000 files anew, at 4,000 to 7,000 a second on one core, into 1.4 GB.
They are not kept decoded: that would take five times their room to save some 20 seconds a start.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cifar.data.dataset import Split
from cifar.data.images import SUFFIXES, Labelled, read_split
from cifar.errors import DataError
from cifar.files import check_data_file

FOLDER = "tiny-imagenet-200"
CLASSES_FILE, WORDS_FILE, VAL_FILE = "wnids.txt", "words.txt", "val/val_annotations.txt"
NEEDED = (CLASSES_FILE, WORDS_FILE, VAL_FILE)
"""Without which there is no data set; what else there is, they tell."""
SIDE = 64
"""Pixels."""
MAX_TEXT_BYTES = 16 * 2**20
"""Of a list; the longest, `words.txt`, has 2.6 MB."""
_REMEDY = "get a fresh copy"
_NUMBER = r"n\d{8}"


def is_member(path: str) -> bool:
    """Whether the layout has a file of that name that is read, below `FOLDER`, with `/`."""
    return path in NEEDED or bool(
        re.fullmatch(
            rf"train/({_NUMBER})/(\1_boxes\.txt|images/\1_\d+\.JPEG)|val/images/val_\d+\.JPEG",
            path,
            re.ASCII,
        )
    )


def read_tiny_imagenet(root: Path, max_bytes: int) -> tuple[tuple[str, ...], Split, Split]:
    """Class names, train and test split of the layout in `root`; greyscale images become RGB.

    The classes come in the order of their numbers, as torchvision's `ImageFolder` would have them,
    and not in that of `wnids.txt`; images as they are listed, those for training class by class.
    A class is called by its first synonym, with its number behind where two classes share that.

    Raises:
        DataError: a file or folder is missing, damaged, of another size, listed nowhere, listed
            twice or as of another class; names it.
    """
    numbers = _read_numbers(root / CLASSES_FILE)
    classes = _read_names(root / WORDS_FILE, numbers)
    labels = {number: label for label, number in enumerate(numbers)}
    _check_known(root / "train", numbers)
    trained = [each for number in numbers for each in _train_files(root, number, labels[number])]
    tested = _val_files(root, labels)
    shape = (SIDE, SIDE, 3)
    train = read_split(root / "train", trained, shape, max_bytes)
    return classes, train, read_split(root / "val", tested, shape, max_bytes)


def _read_numbers(path: Path) -> list[str]:
    """The classes in order."""
    lines = _read_lines(path)
    _check_lines(path, lines, _NUMBER, "a number such as n01443537")
    return sorted(lines)


def _read_names(path: Path, numbers: Sequence[str]) -> tuple[str, ...]:
    synonyms = dict(line.partition("\t")[::2] for line in _read_lines(path))
    names = []
    for number in numbers:
        name = synonyms.get(number, "").partition(",")[0].strip()
        if not name:
            raise DataError(f"data: {path}: no name of {number}; {_REMEDY}")
        names.append(name)
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name} ({number})"
        for name, number in zip(names, numbers, strict=True)
    )


def _check_known(folder: Path, numbers: Sequence[str]) -> None:
    """Raise a DataError if there are images of a class that is not listed."""
    unknown = {entry.name for entry in _entries(folder) if entry.is_dir()} - set(numbers)
    if unknown:
        name = min(unknown)
        raise DataError(f"data: {folder / name}: no class of {CLASSES_FILE}; {_REMEDY}")


def _train_files(root: Path, number: str, label: int) -> list[Labelled]:
    folder = root / "train" / number
    listed = folder / f"{number}_boxes.txt"
    names = [line.partition("\t")[0] for line in _read_lines(listed)]
    _check_listed(listed, names, rf"{number}_\d+\.JPEG", folder / "images")
    return [(folder / "images" / name, label) for name in names]


def _val_files(root: Path, labels: dict[str, int]) -> list[Labelled]:
    listed = root / VAL_FILE
    lines = [line.split("\t") for line in _read_lines(listed)]
    for place, (_, *rest) in enumerate(lines, 1):
        if not rest or rest[0] not in labels:
            found = rest[0] if rest else ""
            raise _refused(listed, place, found, f"must be a class of {CLASSES_FILE}")
    folder = listed.parent / "images"
    _check_listed(listed, [line[0] for line in lines], r"val_\d+\.JPEG", folder)
    return [(folder / name, labels[number]) for name, number, *_ in lines]


def _check_listed(listed: Path, names: Sequence[str], pattern: str, folder: Path) -> None:
    """Raise a DataError unless a list names every image of a folder once, and nothing else."""
    example = pattern.replace(r"\d+\.", "0.")
    _check_lines(listed, names, pattern, f"an image such as {example}")
    there = {entry.name for entry in _entries(folder) if entry.suffix.lower() in SUFFIXES}
    if missing := set(names) - there:
        raise DataError(f"data: {folder / min(missing)}: no such file; {_REMEDY}")
    if extra := there - set(names):
        raise DataError(f"data: {folder / min(extra)}: not in {listed.name}; remove it")


def _check_lines(listed: Path, found: Sequence[str], pattern: str, what: str) -> None:
    """Raise a DataError for the first line in which something else is found, or the same again."""
    before: set[str] = set()
    for place, each in enumerate(found, 1):
        if not re.fullmatch(pattern, each, re.ASCII) or each in before:
            raise _refused(listed, place, each, f"must be {what}, each once")
        before.add(each)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, but for names that start with a dot."""
    if not folder.is_dir():
        raise DataError(f"data: {folder}: no such folder; {_REMEDY}")
    return [entry for entry in folder.iterdir() if entry.name[0] != "."]


def _read_lines(path: Path) -> list[str]:
    """The lines of a list, one at least."""
    check_data_file(path, _REMEDY)
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise DataError(
            f"data: {path}: {size:,} bytes: must be at most {MAX_TEXT_BYTES:,}; {_REMEDY}"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"data: {path}: is no text in UTF-8; {_REMEDY}") from None
    if not lines:
        raise DataError(f"data: {path}: is empty; {_REMEDY}")
    return lines


def _refused(path: Path, place: int, found: str, wanted: str) -> DataError:
    return DataError(f"data: {path}: line {place}: {found[:80]!r}: {wanted}; {_REMEDY}")
