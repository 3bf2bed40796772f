"""A data set as plain arrays: what every source reads into and everything after it works on."""

import hashlib
import unicodedata
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar.errors import DataError
from cifar.files import is_writable_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Images `[N, C, H, W]` uint8 and their labels `[N]` int64."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Train and test split with the names of the classes.

    `validation` are training images that were held out to choose by, see `cifar.data.division`.

    Raises:
        DataError: shapes, types or labels that do not fit together; names the field.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None

    def __post_init__(self) -> None:
        for split_name, split in (("train", self.train), ("test", self.test)):
            where = f"{self.name}: {split_name}"
            images, labels = split.images, split.labels
            if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
                raise DataError(
                    f"{where} images: {images.dtype} {list(images.shape)}: "
                    "must be uint8 [N, channels, height, width], none of them 0; write it again"
                )
            if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
                raise DataError(
                    f"{where} labels: {labels.dtype} {list(labels.shape)}: "
                    f"must be integers [{len(images)}], one per image; write them again"
                )
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise DataError(
                    f"{where} labels: {labels.min()}..{labels.max()}: "
                    f"must lie in 0..{len(self.classes) - 1}; correct them, or name all classes"
                )
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DataError(
                f"data: {self.name}: test images: {list(self.test.images.shape[1:])}: "
                f"must have the train images' shape {list(self.train.images.shape[1:])}; "
                "scale them"
            )
        if len(self.classes) < 2:
            raise DataError(f"data: {self.name}: classes: {len(self.classes)}: give 2 or more")
        for index, name in enumerate(self.classes):
            is_line = name.splitlines() == [name] and is_writable_text(name)
            is_line = is_line and not any(unicodedata.category(each) == "Cc" for each in name)
            if not is_line or name in self.classes[:index]:
                raise DataError(
                    f"data: {self.name}: classes: {name!r}: must be one line of text and no other "
                    "class's name; rename it"
                )

    def fingerprint(self) -> str:
        """16 hexadecimal digits over every pixel, label and class name, in order.

        Of the whole data set: none of it may have been held out.
        """
        assert self.validation is None, "a part does not tell the whole"
        sha = hashlib.sha256("\0".join(self.classes).encode())
        for split in (self.train, self.test):
            sha.update(repr(split.images.shape).encode())
            sha.update(np.ascontiguousarray(split.images).data)
            sha.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
        return sha.hexdigest()[:16]
