"""Differences between models, with intervals over what was drawn: training seeds, and test questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NUM_RESAMPLES = 10_000
# Student's t at 97.5 % by degrees of freedom, for intervals of means over few seeds.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % interval; NaN where there is too little to tell."""

    mean: float
    low: float
    high: float
    n: int
    """Seeds."""
    p: float = math.nan
    """Two-sided, of the mean being 0; only from the bootstrap."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __format__(self, spec: str) -> str:
        """`+1.2 (-0.3 to +2.7)`."""
        if not math.isfinite(self.low):
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} ({self.low:{spec}} to {self.high:{spec}})"

    def scaled(self, factor: float) -> Interval:
        """In another unit."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.n, self.p)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of one number a seed, with Student's interval.

    Raises:
        ValueError: There are more than ten.
    """
    count = len(values)
    if count < 2:
        return Interval(values[0] if values else math.nan, math.nan, math.nan, count)
    if count - 1 not in STUDENT:
        raise ValueError(f"{count} seeds, expected at most {max(STUDENT) + 1}; add Student's t for more to STUDENT.")
    half = STUDENT[count - 1] * statistics.stdev(values) / math.sqrt(count)
    mean = statistics.fmean(values)
    return Interval(mean, mean - half, mean + half, count)


def crossed(before: ArrayLike, after: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean of `after - before`, with the percentile interval of a crossed bootstrap: seeds and questions are drawn.

    Args:
        before: (seeds, questions); a row a trained model, the same questions in the same order.
        after: As `before`, the same seeds.
        seed: Of the resampling.

    Returns:
        The difference. With a single seed only questions are drawn.
    """
    change = np.asarray(after, float) - np.asarray(before, float)
    num_seeds, num_questions = change.shape
    rng = np.random.default_rng(seed)
    # A draw of questions is a vector of counts, so that a resample is a product of two vectors and a matrix.
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_RESAMPLES)
    questions = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions), NUM_RESAMPLES)
    means = np.einsum("rs,sq,rq->r", seeds, change, questions, optimize=True) / change.size
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Interval(float(change.mean()), float(low), float(high), num_seeds, float(min(1.0, 2 * tail)))


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of a family of hypotheses are rejected at 5 % together (Holm 1979); NaN is never.

    >>> holm([0.01, 0.04, 0.03])
    [True, False, False]
    """
    order = sorted(range(len(p_values)), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    family = sum(not math.isnan(p) for p in p_values)
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if not p_values[index] <= 0.05 / max(1, family - rank):
            break
        rejected[index] = True
    return rejected


def marked(family: Sequence[Interval | None], spec: str, *, factor: float = 100.0) -> list[str]:
    """The differences of a table as text, a star where Holm's procedure rejects 0 in the family."""
    rejected = holm([math.nan if each is None else each.p for each in family])
    return [
        "" if each is None else f"{each.scaled(factor):{spec}}" + (" *" if star else "")
        for each, star in zip(family, rejected, strict=True)
    ]


def spread(values: Sequence[float], *, factor: float = 1.0, digits: int = 1) -> str:
    """Mean ± sample standard deviation, as tables show them."""
    if not values:
        return "–"
    scaled = [factor * value for value in values]
    style = f".{digits}f" if abs(statistics.fmean(scaled)) < 10_000 else ".1e"
    mean = f"{statistics.fmean(scaled):{style}}"
    return f"{mean} ± {statistics.stdev(scaled):{style}}" if len(scaled) > 1 else mean
