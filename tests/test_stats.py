"""Statistics against results worked out by hand."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import (
    bootstrap_interval,
    headline,
    iqr,
    median_interval,
    percentile,
    spread,
    straggler_ratio,
    throughput,
)


def test_throughput_of_one_rank_is_samples_over_seconds():
    # 3 steps of 128 samples in 0.5 + 1.0 + 0.5 = 2 s.
    assert throughput([[0.5, 1.0, 0.5]], 128) == 192.0


def test_throughput_of_two_ranks_counts_global_samples_once_and_the_slower_rank():
    # Steps last max(1, 2) = 2 s and max(2, 1) = 2 s: 2 x 256 samples in 4 s. The mean of the ranks
    # would say 170.7, their sum 341.3.
    assert throughput([[1.0, 2.0], [2.0, 1.0]], 256) == 128.0


def test_throughput_of_four_ranks_with_a_straggler():
    # Three ranks need 0.1 s, one 0.4 s: 5 x 512 samples in 2 s.
    ranks = [[0.1] * 5, [0.1] * 5, [0.4] * 5, [0.1] * 5]
    assert throughput(ranks, 512) == pytest.approx(1280.0)
    # 2 s in all against 5 x (0.7 / 4) = 0.875 s at the average pace.
    assert straggler_ratio(ranks) == pytest.approx(2.0 / 0.875)


def test_throughput_does_not_depend_on_the_number_of_equal_steps():
    assert throughput([[0.25] * 100], 64) == pytest.approx(throughput([[0.25]], 64))


def test_no_straggler_without_one():
    assert straggler_ratio([[1.0, 2.0], [1.0, 2.0]]) == 1.0


@pytest.mark.parametrize("ranks", [[], [[]], [[1.0, 2.0], [1.0]], [[0.0]], [[1.0], [-1.0]]])
def test_throughput_refuses_what_has_no_rate(ranks):
    with pytest.raises(ValueError):  # noqa: PT011 - zip's own message is as good
        throughput(ranks, 1)


def test_headline_is_the_worst_ranks_median():
    ranks = [[1.0, 2.0, 90.0], [3.0, 4.0, 5.0]]
    assert headline(ranks, "lower") == 4.0
    assert headline(ranks, "higher") == 2.0
    assert headline(ranks, "none") == 4.0


def test_percentiles_by_hand():
    values = [40.0, 10.0, 30.0, 20.0, 50.0]
    assert percentile(values, 0) == 10.0
    assert percentile(values, 50) == 30.0
    # Rank 0.95 x 4 = 3.8: 0.8 of the way from 40 to 50.
    assert percentile(values, 95) == pytest.approx(48.0)
    assert percentile(values, 100) == 50.0
    assert iqr(values) == 20.0
    assert percentile([7.0], 99) == 7.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(
        float(np.percentile(values, percent)), rel=1e-9, abs=1e-6
    )


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses(values, percent):
    with pytest.raises(ValueError, match=r"^percentile: .* needs 0\.\.100 of 1 or more$"):
        percentile(values, percent)


def test_spread_needs_two_values():
    assert spread([3.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)


def test_bootstrap_is_repeatable_and_holds_the_statistic():
    values = [10.0, 11.0, 9.0, 10.5, 12.0, 9.5]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert min(values) <= low < statistics.median(values) < high <= max(values)
    assert bootstrap_interval(values, seed=1, resamples=50) != bootstrap_interval(
        values, seed=2, resamples=50
    )


def test_bootstrap_narrows_with_confidence_and_vanishes_without_noise():
    values = [float(value) for value in range(20)]
    wide, narrow = (
        bootstrap_interval(values, statistics.fmean, confidence=confidence)
        for confidence in (0.95, 0.5)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval([5.0] * 4) == (5.0, 5.0)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for sample in range(100):
        values = generator.normal(0.0, 1.0, 20).tolist()
        low, high = bootstrap_interval(values, statistics.fmean, resamples=200, seed=sample)
        hits += low <= 0.0 <= high
    assert 85 <= hits <= 99


@pytest.mark.parametrize(("values", "confidence"), [([1.0], 0.95), ([1.0, 2.0], 1.0)])
def test_bootstrap_refuses(values, confidence):
    with pytest.raises(ValueError, match=r"^bootstrap: "):
        bootstrap_interval(values, confidence=confidence)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [
        (6, 1, 6),  # outside: 2 / 2^6 = 3.1 %; one further in: 14 / 64
        (8, 1, 8),  # 2 / 2^8 = 0.8 %; one further in: 18 / 256 = 7.0 %
        (9, 2, 8),  # 20 / 512 = 3.9 %
        (20, 6, 15),  # 2 x 21,700 / 2^20 = 4.1 %
    ],
)
def test_median_interval_by_the_sign_test(count, low, high):
    values = list(range(count, 0, -1))
    assert median_interval(values) == ((count + 1) / 2, low, high)


def test_median_interval_needs_six_values_for_95_percent():
    with pytest.raises(ValueError, match="5 values"):
        median_interval([1.0] * 5)
    assert median_interval([1.0, 2.0, 4.0, 5.0, 5.0], confidence=0.9) == (4.0, 1.0, 5.0)
