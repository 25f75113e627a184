"""What interventions did: the files of InterventionCallback and `avar sweep`, read back and drawn."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avar_lightning.paired import Difference
from avar_lightning.report.interventions import METRICS, UNSTEERED, plot_differences, plot_sweep, table_cells
from avar_lightning.run_report.measurements import number
from avar_lightning.run_report.page import Part, Table

SWEEP, RESULTS = "sweep.json", "results.csv"
STORED = ("difference", "low", "high", "num_pairs")
"""How the files call the parts of a `Difference`; InterventionCallback leaves the last one out, which is 0 then."""


@dataclass(frozen=True)
class Steered:
    """The settings of one file.

    Attributes:
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
        strengths = {name: setting["intervention"] for name, setting in settings.items() if setting["intervention"]}
        return _steered(path, settings, strengths)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no file of InterventionCallback, or broken off ({what}).") from error


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
        return _steered(path, table, {name: row for name, row in table.items() if row["mode"]})
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of avar sweep ({type(error).__name__}: {error}).") from error


def _steered(path: Path, settings: Mapping[str, Any], strengths: Mapping[str, Mapping[str, Any]]) -> Steered:
    results: dict[str, dict[str, Any]] = {name: {} for name in settings}
    for name, row in settings.items():
        for metric in METRICS:
            mean, low, high, pairs = (number(row.get(f"{metric}_{name}")) for name in STORED)
            results[name][metric] = number(row.get(metric))
            results[name][f"{metric}_difference"] = Difference(
                mean, low, high, int(pairs) if math.isfinite(pairs) else 0
            )
    grid: list[dict[str, Any]] = [
        {"mode": str(of["mode"]), "image": number(of["image"]), "system": number(of["system"])} | results[name]
        for name, of in strengths.items()
    ]
    places = {(row["mode"], row["image"], row["system"]) for row in grid}
    known = all(math.isfinite(row["image"]) and math.isfinite(row["system"]) for row in grid)
    # Of ablations every setting has the same strengths.
    return Steered(path, results, grid if known and len(grid) > 2 and len(places) == len(grid) else [])


def interventions_part(steered: Steered, place: int) -> Part:
    """A table of the settings, their changes, and of a grid of strengths its heat maps.

    Args:
        steered: What was read.
        place: Of the file among others, for the names of the pictures.
    """
    part = Part(f"Interventions: {steered.path.parent.name}/{steered.path.name}")
    headings, *rows = table_cells(steered.results)
    caption = "Change: mean paired difference with its 95 % bootstrap interval; a star where it leaves out 0."
    part.tables.append(Table(headings, rows, caption))
    if set(steered.results) - {UNSTEERED}:
        alt = "Change of accuracy and VAS under each setting, with intervals."
        told = f"{caption} From {steered.path.name}."
        part.add(f"{place}_differences", plot_differences(steered.results), alt=alt, caption=told)
    for metric, (heading, _) in METRICS.items() if steered.grid and UNSTEERED in steered.results else ():
        figure = plot_sweep(steered.grid, metric, reference=steered.results[UNSTEERED][metric], title=heading)
        told = f"{heading} at each pair of strengths, and its change; from {steered.path.name}."
        part.add(f"{place}_sweep_{metric}", figure, alt=f"Heat map of {heading} by strengths.", caption=told)
    return part
