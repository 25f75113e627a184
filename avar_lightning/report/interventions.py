"""What interventions did: paired differences with their intervals, heat maps of a grid of strengths, a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from avar_lightning.report.figure import as_written, format_number, new_figure
from avar_lightning.report.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "accuracy": ("Accuracy (%)", 100.0),
    "vas_ratio_of_means": ("VAS of user tokens", 1.0),
    "vas_ratio_of_means_response": ("VAS of answers", 1.0),
}
"""Metric → heading, factor to the shown unit."""
UNSTEERED = "unsteered"
MOST_ROWS = 60
"""Settings that `plot_differences` shows; of more, those whose accuracy changed most."""


def plot_differences(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the change of accuracy and of VAS under each setting, with its 95 % interval.

    Args:
        results: Setting to what `interventions.compare` gives; `unsteered` is the line at 0.

    Raises:
        ValueError: There is no setting but `unsteered`.
    """
    steered = {name: result for name, result in results.items() if name != UNSTEERED}
    num_settings = len(steered)
    if num_settings > MOST_ROWS:
        largest = sorted(steered, key=lambda name: -abs(steered[name]["accuracy_difference"].mean))[:MOST_ROWS]
        steered = {name: result for name, result in steered.items() if name in largest}
    if not steered:
        raise ValueError("results has no steered setting, expected at least one.")
    with new_figure(10.0, 1.5 + 0.34 * len(steered)) as figure:
        panels = figure.subplots(1, len(METRICS), sharey=True)
        for axes, (metric, (heading, factor)) in zip(panels, METRICS.items(), strict=True):
            axes.axvline(0, color="#555555", linewidth=1)
            for row, result in enumerate(steered.values()):
                change = result[f"{metric}_difference"]
                if not math.isfinite(change.mean):
                    continue
                colour = "#999999" if not change.significant else "#009E73" if change.mean > 0 else "#D55E00"
                axes.hlines(row, factor * change.low, factor * change.high, color=colour, linewidth=3, alpha=0.5)
                axes.plot([factor * change.mean], [row], "o", color=colour, markersize=6)
            axes.set_title(heading)
            axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(steered)), [as_written(name) for name in steered])
        panels[0].set_ylim(len(steered) - 0.5, -0.5)
        note = f"; the {MOST_ROWS} largest changes of {num_settings}" if num_settings > MOST_ROWS else ""
        figure.supxlabel(
            f"change against unsteered: mean paired difference, 95 % bootstrap interval; grey: it holds 0{note}",
            fontsize=9,
        )
    return figure


def plot_sweep(rows: Sequence[Mapping[str, Any]], metric: str, *, reference: float, title: str = "") -> Figure:
    """Draw a heat map of one metric over strengths on image and system tokens, a panel a mode.

    Args:
        rows: One mapping a setting: `mode`, `image`, `system`, the metric and its `<metric>_difference`.
        metric: `accuracy` (0 to 1), or a VAS.
        reference: The metric without steering; it stands in the cells of strength 0 and in the middle of the colours.
        title: Heading of the picture.

    Returns:
        The figure; a cell shows the metric and, below it, its change, with a star where the 95 % interval leaves out 0.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("rows is empty, expected one mapping a setting.")
    factor = 100.0 if metric == "accuracy" else 1.0
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    images, systems = (sorted({float(row[name]) for row in rows} | {0.0}) for name in ("image", "system"))
    changes = [factor * row[f"{metric}_difference"].mean for row in rows]
    most = max((abs(change) for change in changes if math.isfinite(change)), default=0.0) or 1.0
    with new_figure(1.6 + len(modes) * (0.9 + 0.8 * len(systems)), 1.5 + 0.62 * len(images)) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(modes), sharey=True))
        for axes, mode in zip(panels, modes, strict=True):
            shown = np.full((len(images), len(systems)), np.nan)
            shown[images.index(0.0), systems.index(0.0)] = 0.0
            axes.text(
                systems.index(0.0), images.index(0.0), _value(factor * reference), ha="center", va="center", fontsize=9
            )
            for row in (row for row in rows if row["mode"] == mode):
                at = images.index(float(row["image"])), systems.index(float(row["system"]))
                change = row[f"{metric}_difference"]
                shown[at] = factor * change.mean
                star = "*" if change.significant else ""
                label = f"{_value(factor * row[metric])}\n{factor * change.mean:+.2g}{star}"
                weight = "bold" if change.significant else "normal"
                ink = "white" if abs(shown[at]) > 0.65 * most else "black"
                axes.text(at[1], at[0], label, ha="center", va="center", fontsize=9, fontweight=weight, color=ink)
            picture = axes.imshow(shown, origin="lower", aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
            axes.set_xticks(range(len(systems)), [f"{value:g}" for value in systems])
            axes.set_yticks(range(len(images)), [f"{value:g}" for value in images])
            axes.set(title=mode, xlabel="system strength (lowered)")
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("image strength (raised)")
        figure.colorbar(picture, ax=list(panels), label="change")
        figure.suptitle(title or metric, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def interventions_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write results of `interventions.compare` as a Markdown table, changes with their 95 % intervals.

    A star marks an interval that leaves out 0.
    """
    headings, *rows = table_cells(results)
    return markdown_table(headings, rows)


def table_cells(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The headings of `interventions_table`, and the cells of each setting."""
    rows = [["setting", *(cell for heading, _ in METRICS.values() for cell in (heading, "change (95 % interval)"))]]
    for name, result in results.items():
        cells = [name]
        for metric, (_, factor) in METRICS.items():
            change = result[f"{metric}_difference"]
            star = " *" if change.significant else ""
            interval = f"{factor * change.mean:+.2f} ({factor * change.low:+.2f} to {factor * change.high:+.2f}){star}"
            known = interval if math.isfinite(change.mean) else "–"
            cells += [_value(factor * result[metric]), "" if name == UNSTEERED else known]
        rows.append(cells)
    return rows


def _value(value: float) -> str:
    return format_number(value) if math.isfinite(value) else "–"
