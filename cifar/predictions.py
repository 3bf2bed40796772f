"""What a network predicts for every image of a split, and how far its confidence can be trusted."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 15
"""Of confidence, as in Guo et al. 2017 (https://arxiv.org/abs/1706.04599)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Probabilities `[N, K]` float32 in the order of the split; labels `[N]` int64, None without.

    Every row of probabilities sums to 1.
    """

    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """The likeliest class of every sample, `[N]`; of equally likely ones the first."""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def confidence(self) -> npt.NDArray[np.float32]:
        """The probability of that class, `[N]`."""
        return np.asarray(self.probabilities.max(1), dtype=np.float32)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Which samples are predicted right, `[N]`; they need labels."""
        assert self.labels is not None, "nothing is right or wrong without labels"
        return np.asarray(self.predicted == self.labels, dtype=np.bool_)

    def mistakes(self) -> npt.NDArray[np.int64]:
        """The samples that are predicted wrong, the most confident first."""
        return self._sorted(~self.correct, -self.confidence)

    def narrow_hits(self) -> npt.NDArray[np.int64]:
        """The samples that are predicted right, the least confident first."""
        return self._sorted(self.correct, self.confidence)

    @staticmethod
    def _sorted(
        chosen: npt.NDArray[np.bool_], key: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.int64]:
        samples = np.flatnonzero(chosen)
        return np.asarray(samples[np.argsort(key[samples], kind="stable")], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """Samples whose confidence lies in `(low, high]`: how many, how sure, and how often right.

    `confidence` is their mean and `accuracy` the fraction that is right, None without samples.
    """

    low: float
    high: float
    samples: int
    confidence: float | None
    accuracy: float | None


def calibrate(predictions: Predictions, bins: int = BINS) -> tuple[CalibrationBin, ...]:
    """Confidence against accuracy in `bins` equally wide bins."""
    confidence, correct = predictions.confidence.astype(np.float64), predictions.correct
    numbers = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    sure = np.bincount(numbers, weights=confidence, minlength=bins)
    right = np.bincount(numbers, weights=correct, minlength=bins)
    return tuple(
        CalibrationBin(
            low=number / bins,
            high=(number + 1) / bins,
            samples=int(count),
            confidence=float(sure[number] / count) if count else None,
            accuracy=float(right[number] / count) if count else None,
        )
        for number, count in enumerate(counts)
    )


def calibration_error(bins: tuple[CalibrationBin, ...]) -> float:
    """The expected calibration error: the mean of |accuracy - confidence| over the samples.

    Guo et al. 2017 (https://arxiv.org/abs/1706.04599), equation 3.
    """
    total = sum(each.samples for each in bins)
    gaps = (
        each.samples * abs(each.accuracy - each.confidence)
        for each in bins
        if each.accuracy is not None and each.confidence is not None
    )
    return sum(gaps) / total
