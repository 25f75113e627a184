"""Intervals against every possible resample of tiny data, enumerated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from avar_lightning.evaluation import bootstrap, bootstrap_mean
from tests.evaluation.samples import pairs


def exact(statistic, count):
    """The 2.5 % and 97.5 % points of a statistic over all `count ** count` equally likely draws."""
    values = sorted(statistic(draw) for draw in itertools.product(range(count), repeat=count))
    return tuple(values[math.ceil(share * len(values)) - 1] for share in (0.025, 0.975))


def test_a_mean_over_samples():
    values = [0.0, 0.0, 1.0, 5.0, 2.0]
    low, high = exact(lambda draw: sum(values[i] for i in draw) / 5, 5)
    found = bootstrap_mean(values, "abcde", num_resamples=40_000)
    assert (found.value, found.num_samples, found.num_units) == (1.6, 5, 5)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_samples_of_a_unit_are_drawn_together():
    values, units = [1.0, 1.0, 1.0, 0.0, 0.0, 3.0], "aaabbc"
    groups = [[1.0, 1.0, 1.0], [0.0, 0.0], [3.0]]

    def mean(draw):
        drawn = [value for unit in draw for value in groups[unit]]
        return sum(drawn) / len(drawn)

    found = bootstrap_mean(values, units, num_resamples=20_000)
    assert (found.low, found.high) == pytest.approx(exact(mean, 3))
    assert (found.low, found.high) == (0.0, 3.0)  # one unit thrice, 1 in 27 each
    assert (found.num_samples, found.num_units) == (6, 3)
    alone = bootstrap_mean(values, range(6), num_resamples=20_000)
    assert alone.high < 2.5


def test_parts_weigh_the_same_and_share_their_units():
    """Both parts have the questions a, b, c, and the second one has d."""
    values, units, parts = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 5.0], "abcabcd", "1112222"
    found = bootstrap_mean(values, units, 20_000, parts=parts)
    assert found.value == pytest.approx((1 / 3 + 7 / 4) / 2)
    assert (found.num_samples, found.num_units) == (7, 4)
    first, second = [1.0, 0.0, 0.0, None], [1.0, 1.0, 0.0, 5.0]

    def mean(draw):
        there = [first[unit] for unit in draw if first[unit] is not None]
        return (sum(there) / len(there) + sum(second[unit] for unit in draw) / 4) / 2 if there else math.nan

    draws = [value for draw in itertools.product(range(4), repeat=4) if not math.isnan(value := mean(draw))]
    low, high = (sorted(draws)[math.ceil(share * len(draws)) - 1] for share in (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.13)


def test_a_benchmark_s_own_figures_keep_units_apart_that_are_drawn_twice():
    rows = [{"figure": "ABCD"[i // 2], "correct": c} for i, c in enumerate([1, 1, 1, 0, 0, 0, 1, 1])]
    right = [True, False, False, True]
    found = bootstrap(rows, [row["figure"] for row in rows], pairs, num_resamples=20_000)
    assert found["figures"].value == 0.5
    assert found["accuracy"].value == 0.625
    assert (found["figures"].low, found["figures"].high) == pytest.approx(
        exact(lambda draw: sum(right[i] for i in draw) / 4, 4)
    )
    accuracy = [2, 1, 0, 2]
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(
        exact(lambda draw: sum(accuracy[i] for i in draw) / 8, 4)
    )


def test_the_plain_mean_goes_the_same_way_as_any_other_figure():
    rng = np.random.default_rng(1)
    rows = [{"correct": int(value)} for value in rng.random(200) < 0.3]
    plain = bootstrap(rows, range(200))["accuracy"]
    other = bootstrap(rows, range(200), lambda drawn: {"accuracy": sum(row["correct"] for row in drawn) / len(drawn)})
    share = sum(row["correct"] for row in rows) / 200
    wide = 1.96 * math.sqrt(share * (1 - share) / 200)  # the normal approximation, good at this size
    for found in (plain, other["accuracy"]):
        assert found.value == pytest.approx(share)
        assert (found.low, found.high) == pytest.approx((share - wide, share + wide), abs=0.011)


def test_what_is_undefined_counts_nowhere():
    found = bootstrap_mean([1.0, math.nan, 3.0, math.inf], "abcd")
    assert (found.value, found.num_samples, found.num_units) == (2.0, 2, 2)
    assert math.isnan(bootstrap_mean([math.nan], "a").value)
