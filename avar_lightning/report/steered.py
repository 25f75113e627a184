"""What interventions did, read back from the files of InterventionCallback and `avar sweep`."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWEEP, RESULTS = "sweep.json", "results.csv"
METRICS = ("accuracy", "vas_ratio_of_means", "vas_ratio_of_means_response")
UNSTEERED = "unsteered"


@dataclass(frozen=True)
class Change:
    """Mean paired difference with its interval, as `interventions.Difference`, which takes seconds to import."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Steered:
    """The settings of one file.

    Attributes:
        path: The file.
        results: By setting, each of `METRICS` and its `<metric>_difference`.
        grid: The steered settings as `plot_sweep` takes them; empty where they are no grid of strengths.
    """

    path: Path
    results: dict[str, dict[str, Any]]
    grid: list[dict[str, Any]]


def read_interventions(path: Path) -> Steered:
    """Read one file of InterventionCallback.

    Raises:
        ValueError: It is none, or broken off.
    """
    try:
        settings = json.loads(path.read_text())["settings"]
        rows = {
            name: {metric: number(setting.get(metric)) for metric in METRICS}
            | {f"{m}_difference": _change(setting, f"{m}_difference", f"{m}_low", f"{m}_high") for m in METRICS}
            for name, setting in settings.items()
        }
        strengths = {name: setting["intervention"] for name, setting in settings.items() if setting["intervention"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of InterventionCallback, or broken off ({_short(error)}).") from error
    return Steered(path, rows, _grid(rows, strengths))


def read_sweep(folder: Path) -> Steered:
    """Read the results of a sweep.

    Raises:
        ValueError: The sweep has not ended, or its results are no table of a sweep.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}: the sweep has not ended; call avar sweep again to end it.")
    try:
        with path.open(newline="") as file:
            table = {row["setting"]: row for row in csv.DictReader(file)}
        rows = {
            name: {metric: number(row[metric]) for metric in METRICS}
            | {f"{m}_difference": _change(row, f"{m}_difference", f"{m}_low", f"{m}_high") for m in METRICS}
            for name, row in table.items()
        }
        strengths = {name: row for name, row in table.items() if row["mode"]}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of avar sweep ({_short(error)}).") from error
    return Steered(path, rows, _grid(rows, strengths))


def number(value: Any) -> float:
    """A number of a JSON file or a table, NaN for null, an empty cell and everything else.

    >>> number(None), number("0.5"), number("")
    (nan, 0.5, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _change(row: Mapping[str, Any], *names: str) -> Change:
    return Change(*(number(row.get(name)) for name in names))


def _grid(rows: Mapping[str, dict[str, Any]], strengths: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    grid: list[dict[str, Any]] = [
        {"mode": str(of["mode"]), "image": number(of["image"]), "system": number(of["system"])} | rows[name]
        for name, of in strengths.items()
    ]
    places = {(row["mode"], row["image"], row["system"]) for row in grid}
    known = all(math.isfinite(row["image"]) and math.isfinite(row["system"]) for row in grid)
    # Of ablations every setting has the same strengths.
    return grid if known and len(grid) > 2 and len(places) == len(grid) else []


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
