"""How a training began and where it is: means over its first and over its last batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

BATCHES = 5
"""Batches over which each end is averaged."""


class Trend:
    """Keeps what was measured in the first and in the last batches; `first` is plain, for checkpoints."""

    def __init__(self) -> None:
        self.first: list[dict[str, float]] = []
        self.last: deque[dict[str, float]] = deque(maxlen=BATCHES)

    def add(self, measured: dict[str, float]) -> None:
        """Take one batch."""
        if len(self.first) < BATCHES:
            self.first.append(measured)
        self.last.append(measured)

    def means(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean of each name over the first and over the last batches that have it; NaN where none is finite."""
        return _means(self.first), _means(self.last)


def _means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
