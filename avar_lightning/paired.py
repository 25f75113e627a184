"""Differences between two measurements of the same samples, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, with a bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float
    num_pairs: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(before: ArrayLike, after: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> Difference:
    """Mean of `after - before` over samples, and its 95 % percentile bootstrap interval over samples.

    Args:
        before: One value a sample, or (models, samples); pairs in which either is not finite are left out.
        after: The same samples in the same order.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.

    Returns:
        The difference; NaN without pairs. Of several models a sample is drawn with all of them, since they share it.

    >>> paired_difference([0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]).mean
    0.75
    """
    one, two = np.atleast_2d(np.asarray(before, float)), np.atleast_2d(np.asarray(after, float))
    if one.shape != two.shape:
        raise ValueError(f"values have shapes {one.shape} and {two.shape}, expected pairs of the same samples.")
    change = two - one
    finite = np.isfinite(change)
    total, count = np.where(finite, change, 0.0).sum(0), finite.sum(0)
    total, count = total[count > 0], count[count > 0]
    if not len(count):
        return Difference(math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(seed)
    means = []
    for chunk in np.array_split(np.arange(num_resamples), max(1, num_resamples * len(count) // 2_000_000)):
        drawn = rng.integers(len(count), size=(len(chunk), len(count)))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Difference(float(total.sum() / count.sum()), float(low), float(high), int(count.sum()))


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN without one."""
    finite: NDArray[np.float64] = np.asarray(list(values), float)
    finite = finite[np.isfinite(finite)]
    return float(finite.mean()) if finite.size else math.nan
