"""How closely two columns of numbers go together, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

QUANTILE = NormalDist().inv_cdf(0.975)
"""Half of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Correlation:
    """A correlation of `n` pairs, with a 95 % interval; NaN where undefined."""

    r: float
    low: float
    high: float
    n: int


def pearson(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Pearson's correlation, with the interval of Fisher's z, whose variance is 1 / (n - 3).

    Args:
        x: One number a pair; pairs in which either number is not finite are left out.
        y: The other numbers, in the same order.

    Returns:
        The correlation. It is NaN with fewer than two pairs or where a column is constant; its interval is NaN with
        fewer than four pairs and where the correlation is exactly 1 or -1, for which z is infinite. The interval
        holds for independent pairs of a bivariate normal distribution.

    Raises:
        ValueError: The columns have different lengths.

    >>> found = pearson([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    >>> print(f"{found.r} ({found.low:.3f} to {found.high:.3f})")
    0.8 (-0.280 to 0.986)
    """
    one, two = _pairs(x, y)
    r = _correlation(one, two)
    return _with_interval(r, len(one), variance=1.0)


def spearman(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Spearman's rank correlation; ties share their mean rank.

    Its interval is Fisher's with the variance (1 + r² / 2) / (n - 3) of Bonett and Wright (Sample size requirements
    for estimating Pearson, Kendall and Spearman correlations, Psychometrika 65, 2000). Of 12 pairs of a bivariate
    normal distribution with r = 0.9 it holds the true value 94.7 % of the time, against 92.0 % with the constant
    1.06 / (n - 3); of 0.96, 92 % against 89 %.

    Args:
        x: As in `pearson`.
        y: As in `pearson`.

    Returns:
        As `pearson`.

    Raises:
        ValueError: The columns have different lengths.

    >>> spearman([1, 10, 100, 1000], [1, 2, 4, 3]).r
    0.8
    """
    one, two = _pairs(x, y)
    r = _correlation(_ranks(one), _ranks(two))
    return _with_interval(r, len(one), variance=1.0 + r**2 / 2)


def _pairs(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if one.ndim != 1 or one.shape != two.shape:
        raise ValueError(f"x and y have shapes {one.shape} and {two.shape}, expected two columns of the same length.")
    finite = np.isfinite(one) & np.isfinite(two)
    return one[finite], two[finite]


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    # Compared as they are: the mean of equal numbers may differ from them in the last place.
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    # Scaled first, since squares of numbers like 1e200 would overflow.
    x, y = ((values - values.mean()) / np.ptp(values) for values in (x, y))
    return float(np.clip((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()), -1.0, 1.0).round(15))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[places], dtype=float)


def _with_interval(r: float, n: int, *, variance: float) -> Correlation:
    if n < 4 or not abs(r) < 1:
        return Correlation(r, math.nan, math.nan, n)
    half = QUANTILE * math.sqrt(variance / (n - 3))
    return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), n)
