"""Two sets of answers to the same prompts side by side, with bootstrap intervals over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avar_lightning.interventions.answering import METRICS
from avar_lightning.paired import mean, paired_difference


def compare(
    before: Sequence[Sequence[Mapping[str, Any]]], after: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Rows of `answer` without and with steering, side by side.

    Args:
        before: For each model, one row a sample.
        after: The same models and samples, under another setting.

    Returns:
        For each of `METRICS` the mean of `after` over models and samples, under `<metric>_sd` the standard deviation
        between the models' means (NaN for one model), and under `<metric>_difference` a `Difference`.
    """
    result: dict[str, Any] = {}
    for name in METRICS:
        one, two = ([[row[name] for row in rows] for rows in models] for models in (before, after))
        means = [mean(values) for values in two]
        result[name] = mean(means)
        result[f"{name}_sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
        result[f"{name}_difference"] = paired_difference(one, two)
    return result
