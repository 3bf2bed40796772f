"""Statistics against results worked out by hand."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import (
    headline,
    median_interval,
    percentile,
    ratio_interval,
    reach,
    resolves,
    spread,
    straggler_ratio,
    throughput,
)


def test_throughput_of_one_rank_is_samples_over_seconds():
    # 3 steps of 128 samples in 0.5 + 1.0 + 0.5 = 2 s.
    assert throughput([[0.5, 1.0, 0.5]], 128) == 192.0


def test_throughput_of_two_ranks_counts_global_samples_once_and_the_rank_that_ends_last():
    # The second rank ends after 1 + 3 = 4 s: 2 x 256 samples in 4 s. The mean of the ranks' rates
    # would say 149.3, their sum 298.7.
    assert throughput([[1.0, 2.0], [1.0, 3.0]], 256) == 128.0


def test_a_delay_that_the_other_rank_waits_for_in_its_next_step_counts_once():
    # Rank 0 is held up for 1 s after the exchange of step 1; rank 1 waits for it in that of step 2.
    # Both take 4 s of wall time for 3 steps; the steps' maxima would add up to 2 + 2 + 1 = 5 s.
    assert throughput([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]], 100) == 75.0


def test_throughput_of_four_ranks_with_a_straggler():
    # Three ranks need 0.1 s, one 0.4 s: 5 x 512 samples in 2 s.
    ranks = [[0.1] * 5, [0.1] * 5, [0.4] * 5, [0.1] * 5]
    assert throughput(ranks, 512) == pytest.approx(1280.0)
    # 2 s in all against the 0.5 s of most ranks.
    assert straggler_ratio(ranks) == pytest.approx(4.0)


def test_throughput_does_not_depend_on_the_number_of_equal_steps():
    assert throughput([[0.25] * 100], 64) == pytest.approx(throughput([[0.25]], 64))


def test_a_straggler_by_hand():
    assert straggler_ratio([[1.0, 2.0], [2.0, 1.0]]) == 1.0, "both take 3 s"
    assert straggler_ratio([[1.0, 1.0], [1.0, 2.0]]) == 1.2, "3 s, and 2.5 s in the middle"


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


@pytest.mark.parametrize(("percent", "least"), [(0, 1), (50, 2), (90, 10), (95, 20), (99, 100)])
def test_a_percentile_takes_as_many_values_as_leave_one_beyond_it(percent, least):
    assert resolves(percent, least)
    assert not resolves(percent, least - 1)


def test_the_largest_value_is_resolved_by_none():
    assert not resolves(100, 10**9)


def test_spread_needs_two_values():
    assert spread([3.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)


def test_median_interval_by_hand():
    # Of 7 the extremes hold the median in 1 - 2/128 = 0.984375, their neighbours in
    # 1 - 2 (1 + 7)/128 = 0.875: 0.314286 of the way in probability to 0.95, and by Hettmansperger
    # and Sheather 6 x 0.314286 / (1 + 5 x 0.314286) = 0.733333 of the way between the values.
    low, high = median_interval([10.0, 70.0, 20.0, 60.0, 30.0, 50.0, 40.0])
    assert (low, high) == pytest.approx((10 + 7.33333, 70 - 7.33333))
    # Of 6, 0.96875 and 0.78125: 0.1 of the way, and 5 x 0.1 / (1 + 4 x 0.1) = 0.357143.
    low, high = median_interval([0.0, 1.0, 2.0, 3.0, 4.0, 15.0])
    assert (low, high) == pytest.approx((0.357143, 15 - 11 * 0.357143))


def test_median_interval_narrows_with_confidence_and_vanishes_without_noise():
    values = [float(value) for value in range(20)]
    wide, narrow = (median_interval(values, confidence=each) for each in (0.95, 0.5))
    assert wide[0] < narrow[0] < statistics.median(values) < narrow[1] < wide[1]
    assert median_interval([5.0] * 7) == (5.0, 5.0)


@pytest.mark.parametrize(
    ("values", "confidence"), [([1.0] * 5, 0.95), ([], 0.5), ([1.0] * 9, 1.0), ([1.0] * 9, 0.0)]
)
def test_median_interval_refuses_what_it_cannot_promise(values, confidence):
    with pytest.raises(ValueError, match=r"^median interval: "):
        median_interval(values, confidence=confidence)


DRAWS = {
    "normal": (lambda generator, size: generator.normal(0.0, 1.0, size), 0.0),
    "lognormal": (lambda generator, size: generator.lognormal(0.0, 1.0, size), 1.0),
    "exponential": (lambda generator, size: generator.exponential(1.0, size), math.log(2)),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("size", [6, 7, 10])
def test_median_interval_holds_the_median_as_often_as_it_says(name, size):
    draw, median = DRAWS[name]
    groups = draw(np.random.default_rng(0), (2000, size)).tolist()
    held = sum(low <= median <= high for low, high in map(median_interval, groups))
    # Three standard deviations of 2,000 throws at 95 % are 1.5 %; the extremes alone hold 98.4 %.
    assert 0.93 <= held / len(groups) <= 0.965


def test_reach_is_the_longer_side_over_the_median():
    values = [0.0, 1.0, 2.0, 4.0, 5.0, 16.0]
    # Median 3; low 0.357143, high 16 - 11 x 0.357143 = 12.071429.
    assert reach(values) == pytest.approx((12.071429 - 3) / 3)
    assert reach(values[:5]) is None


def test_ratio_interval_is_repeatable_and_holds_the_ratio():
    fast, slow = [20.0, 21.0, 19.0, 20.5, 22.0, 19.5], [10.0, 11.0, 9.0, 10.5, 12.0, 9.5]
    low, high = ratio_interval(fast, slow)
    assert (low, high) == ratio_interval(fast, slow)
    assert 19 / 12 <= low < statistics.median(fast) / statistics.median(slow) < high <= 22 / 9
    assert ratio_interval([6.0] * 6, [4.0] * 6) == (1.5, 1.5)
    wide = ratio_interval(fast, slow)
    narrow = ratio_interval(fast, slow, confidence=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_ratio_interval_holds_the_true_ratio_about_as_often_as_it_says():
    pairs = np.random.default_rng(0).normal(1.0, 0.02, (200, 2, 7)).tolist()
    intervals = [ratio_interval(*pair, resamples=200) for pair in pairs]
    # 95 % of 200 are 190; three standard deviations are 9.
    assert 181 <= sum(low <= 1.0 <= high for low, high in intervals) <= 199


def test_ratio_interval_ends_where_resampled_medians_do():
    """Drawn by numpy, and ten times as often."""
    fast, slow = [20.0, 21.0, 19.0, 20.5, 22.0, 19.5], [10.0, 11.0, 9.0, 10.5, 12.0, 9.5]
    generator = np.random.default_rng(0)
    above, below = (
        np.median(generator.choice(group, (20_000, 6)), axis=1) for group in (fast, slow)
    )
    expected = np.percentile(above / below, [2.5, 97.5])
    assert ratio_interval(fast, slow) == pytest.approx(expected, rel=0.02)


def test_ratio_intervals_of_many_groups_draw_once(monkeypatch):
    """Else a table of 1,000 repeated records takes seconds."""
    drawn = []
    choices = random.Random.choices
    counted = lambda self, *args, **options: drawn.append(1) or choices(self, *args, **options)  # noqa: E731
    monkeypatch.setattr(random.Random, "choices", counted)
    groups = np.random.default_rng(0).normal(1.0, 0.02, (40, 9)).tolist()
    for group in groups:
        ratio_interval(group, groups[0], resamples=50, seed=7)
    assert 0 < len(drawn) <= 2 * 50


def test_ratio_interval_refuses_few_values():
    with pytest.raises(ValueError, match=r"^ratio interval: 6 and 5 values: needs 6 or more$"):
        ratio_interval([1.0] * 6, [1.0] * 5)
