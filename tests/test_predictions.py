"""What is predicted, how sure, and how far that can be trusted."""

import numpy as np
import pytest

from cifar.predictions import Predictions, calibrate, calibration_error


def predictions(rows: list[list[float]], labels: list[int] | None) -> Predictions:
    return Predictions(
        probabilities=np.array(rows, dtype=np.float32),
        labels=None if labels is None else np.array(labels, dtype=np.int64),
    )


FIVE = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.45, 0.55], [0.5, 0.5]]


def test_mistakes_come_the_most_confident_first_and_hits_the_least() -> None:
    found = predictions(FIVE, [1, 1, 1, 0, 0])
    assert found.predicted.tolist() == [0, 1, 0, 1, 0]
    assert found.confidence == pytest.approx([0.9, 0.8, 0.7, 0.55, 0.5])
    assert found.correct.tolist() == [False, True, False, False, True]
    assert found.mistakes().tolist() == [0, 2, 3]
    assert found.narrow_hits().tolist() == [4, 1]
    assert len(found) == 5


def test_calibration_by_hand() -> None:
    """Of ten bins (0.8, 0.9] holds two samples of 0.85 and 0.9, of which one is right."""
    rows = [[0.85, 0.15], [0.9, 0.1], [0.35, 0.65], [1.0, 0.0]]
    bins = calibrate(predictions(rows, [0, 1, 1, 0]), bins=10)
    assert [each.samples for each in bins] == [0, 0, 0, 0, 0, 0, 1, 0, 2, 1]
    eighth = bins[8]
    assert (eighth.low, eighth.high) == (0.8, 0.9)
    assert (eighth.confidence, eighth.accuracy) == (pytest.approx(0.875), 0.5)
    assert (bins[0].confidence, bins[0].accuracy) == (None, None)
    expected = (1 * 0.35 + 2 * 0.375 + 1 * 0.0) / 4
    assert calibration_error(bins) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_knows_how_sure_it_may_be_is_calibrated() -> None:
    random = np.random.default_rng(0)
    first = random.uniform(0.5, 1.0, 200_000).astype(np.float32)
    labels = (random.uniform(size=200_000) > first).astype(np.int64)
    found = Predictions(probabilities=np.stack([first, 1 - first], 1), labels=labels)
    assert calibration_error(calibrate(found)) < 0.01
