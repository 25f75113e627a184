"""Percentile bootstrap intervals over units: samples that belong together are drawn together.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avar_lightning.benchmarks.benchmark import mean_accuracy

NUM_RESAMPLES = 2_000
"""Of means."""
NUM_RESAMPLES_OF_GROUPS = 1_000
"""Of figures that a benchmark makes of whole rows, which takes milliseconds each."""
BLOCK = 4_000_000
"""Draws that are held at once."""
Metrics = Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % percentile bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float
    num_samples: int
    num_units: int


def bootstrap(
    rows: Sequence[Mapping[str, Any]],
    units: Sequence[Hashable],
    metrics: Metrics = mean_accuracy,
    *,
    num_resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Interval]:
    """Figures of rows, each with its interval.

    Args:
        rows: Judged answers, one or more.
        units: For each row what it is drawn together with.
        metrics: A benchmark's figures. It sees copies of a unit that was drawn twice with different numbers under
            `draw`, so that it can tell groups of rows apart.
        num_resamples: Bootstrap resamples; `NUM_RESAMPLES` of the mean and `NUM_RESAMPLES_OF_GROUPS` of other figures
            when unset.
        seed: Of the resampling.
    """
    if metrics is mean_accuracy:
        right = [float(row["correct"]) for row in rows]
        return {"accuracy": bootstrap_mean(right, units, num_resamples or NUM_RESAMPLES, seed)}
    groups: dict[Hashable, list[Mapping[str, Any]]] = {}
    for row, unit in zip(rows, units, strict=True):
        groups.setdefault(unit, []).append(row)
    members, count = list(groups.values()), len(groups)
    copies: dict[tuple[int, int], list[dict[str, Any]]] = {}
    drawn: dict[str, list[float]] = {}
    rng = np.random.default_rng(seed)
    for _ in range(num_resamples or NUM_RESAMPLES_OF_GROUPS):
        sample: list[dict[str, Any]] = []
        for unit, times in enumerate(np.bincount(rng.integers(count, size=count), minlength=count)):
            for draw in range(times):
                if (unit, draw) not in copies:
                    copies[unit, draw] = [{**row, "draw": draw} for row in members[unit]]
                sample += copies[unit, draw]
        for name, value in metrics(sample).items():
            drawn.setdefault(name, []).append(value)
    return {
        name: _interval(value, np.asarray(drawn.get(name, []), float), len(rows), count)
        for name, value in metrics(rows).items()
    }


def bootstrap_mean(
    values: Sequence[float], units: Sequence[Hashable], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of values, of those that are finite, with its interval.

    >>> bootstrap_mean([1.0, 1.0, 1.0], "abc")
    Interval(value=1.0, low=1.0, high=1.0, num_samples=3, num_units=3)
    """
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    if not finite.any():
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(unit, len(numbers)) for unit, kept in zip(units, finite, strict=True) if kept]
    total = np.bincount(index, weights=array[finite])
    size = np.bincount(index).astype(float)
    rng = np.random.default_rng(seed)
    means = []
    for block in np.array_split(np.arange(num_resamples), max(1, num_resamples * len(size) // BLOCK)):
        chosen = rng.integers(len(size), size=(len(block), len(size)))
        means.append(total[chosen].sum(1) / size[chosen].sum(1))
    return _interval(float(array[finite].mean()), np.concatenate(means), int(finite.sum()), len(size))


def _interval(value: float, drawn: NDArray[np.float64], num_samples: int, num_units: int) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (math.nan, math.nan)
    return Interval(value, float(low), float(high), num_samples, num_units)
