"""Percentile bootstrap intervals over units: samples that belong together are drawn together.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
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
    draws: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    """The figure in each resample, those where it is undefined left out."""

    def plain(self) -> dict[str, Any]:
        """What is written of it."""
        return {name: getattr(self, name) for name in ("value", "low", "high", "num_samples", "num_units")}


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
    values: Sequence[float],
    units: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    *,
    parts: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of values, of those that are finite, with its interval.

    Args:
        values: One a sample.
        units: For each value what it is drawn together with.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
        parts: For each value the part that it belongs to; then it is the mean of the parts' means, and a unit is drawn
            with its values in all of them.

    >>> bootstrap_mean([1.0, 1.0, 1.0], "abc")
    Interval(value=1.0, low=1.0, high=1.0, num_samples=3, num_units=3)
    >>> bootstrap_mean([1.0, 0.0, 0.0], "abb", parts="xyy").value
    0.5
    """
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    if not finite.any():
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    array, unit = array[finite], _numbered(units, finite)
    part = np.zeros_like(unit) if parts is None else _numbered(parts, finite)
    shape = int(part.max()) + 1, int(unit.max()) + 1
    total, size = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (part, unit), array)
    np.add.at(size, (part, unit), 1.0)
    count, rng, means = shape[1], np.random.default_rng(seed), []
    for block in np.array_split(np.arange(num_resamples), max(1, num_resamples * count // BLOCK)):
        chosen = rng.integers(count, size=(len(block), count))
        with np.errstate(invalid="ignore"):  # a part of which nothing was drawn
            means.append(np.mean([t[chosen].sum(1) / s[chosen].sum(1) for t, s in zip(total, size)], axis=0))
    value = float((total.sum(1) / size.sum(1)).mean()) if len(total) > 1 else float(array.mean())
    return _interval(value, np.concatenate(means), len(array), count)


def mean_of(intervals: Sequence[Interval], seed: int = 0) -> Interval:
    """Mean of figures that share no samples, with the interval of their resamples, paired at random."""
    rng = np.random.default_rng(seed)
    draws = [rng.permutation(each.draws if each.draws is not None else np.empty(0)) for each in intervals]
    paired = np.mean([each[: min(map(len, draws))] for each in draws], axis=0)
    value = sum(each.value for each in intervals) / len(intervals)
    counts = (sum(each.num_samples for each in intervals), sum(each.num_units for each in intervals))
    return _interval(value, paired, *counts)


def _numbered(names: Sequence[Hashable], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name, keep in zip(names, kept, strict=True) if keep])


def _interval(value: float, drawn: NDArray[np.float64], num_samples: int, num_units: int) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (math.nan, math.nan)
    return Interval(value, float(low), float(high), num_samples, num_units, drawn)
