"""Several trainings side by side, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avar_lightning.report.figure import needs_log_scale, new_figure
from avar_lightning.report.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Columns = Mapping[str, tuple[str, float]]
"""Key of a row → heading, factor to the shown unit."""

GUIDANCE_COLUMNS: Columns = {
    "accuracy": ("Accuracy (%)", 100.0),
    "vas": ("VAS (image / system)", 1.0),
    "share": ("Image share (%)", 100.0),
}
REWARD_COLUMNS: Columns = {
    "accuracy": ("Accuracy (%)", 100.0),
    "rollouts": ("Accuracy of rollouts (%)", 100.0),
    "vas": ("VAS of rollouts", 1.0),
    "format": ("Format of rollouts (%)", 100.0),
    "describes": ("Rollouts that describe (%)", 100.0),
    "length": ("Length of rollouts", 1.0),
    "vas_reference": ("VAS of references", 1.0),
}


def plot_results(rows: Sequence[Mapping[str, Any]], *, columns: Columns = GUIDANCE_COLUMNS, title: str = "") -> Figure:
    """Draw what several trainings came to, a panel a column, a dot a seed and a bar for mean ± sd.

    Args:
        rows: one mapping a training: `name`, and lists with one number a seed for each column. A row with
            `reference=True` (the model before training) also gets a dashed line down the panels.
        columns: what is shown.
        title: heading of the whole picture.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows is empty, expected one mapping a training.")
    with new_figure(4.0 + 2.0 * len(columns), 1.5 + 0.42 * len(rows)) as figure:
        panels = figure.subplots(1, len(columns), sharey=True)
        for axes, (key, (heading, factor)) in zip(panels, columns.items(), strict=True):
            _result_panel(axes, rows, key, factor)
            axes.set_title(heading)
        panels[0].set_yticks(range(len(rows)), [str(row["name"]) for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.set_layout_engine("constrained", wspace=0.06, h_pad=0.08)
        figure.supxlabel("dot: one seed · bar: mean ± standard deviation", fontsize=9, color="#555555")
    return figure


def _result_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, factor: float) -> None:
    everything = factor * np.concatenate([np.asarray(row[key], dtype=float) for row in rows])
    logarithmic = key.startswith("vas") and needs_log_scale(everything)
    for index, row in enumerate(rows):
        values = factor * np.asarray(row[key], dtype=float)
        colour = "#555555" if row.get("reference") else "#0072B2"
        mean, spread = _mean_sd(values)
        # An sd larger than the mean would reach below zero, which a logarithmic axis has not.
        low = max(mean - spread, 0.5 * float(values.min())) if logarithmic else mean - spread
        axes.hlines(index, low, mean + spread, color=colour, linewidth=6, alpha=0.25)
        axes.plot([mean], [index], marker="|", markersize=14, markeredgewidth=2.5, color=colour)
        nudge = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else np.zeros(1)
        axes.scatter(values, index + nudge, s=26, color=colour, edgecolors="white", linewidths=0.6, zorder=3)
        if row.get("reference"):
            axes.axvline(mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlabel("log scale")
    else:
        # Percentages show the whole scale and ratios start at zero: a small change must look small.
        axes.set_xlim(0, 103 if factor == 100.0 else 1.08 * float(np.nanmax(everything)))


def results_table(rows: Sequence[Mapping[str, Any]], *, columns: Columns = GUIDANCE_COLUMNS) -> str:
    """Write the rows of `plot_results` as a Markdown table of mean ± standard deviation over seeds.

    The standard deviation is the sample's (divided by n - 1), and left out where there is one seed.

    >>> print(results_table([{"name": "plain", "accuracy": [0.5, 0.7], "vas": [4.0, 6.0], "share": [0.75]}]))
    | training | seeds | Accuracy (%) | VAS (image / system) | Image share (%) |
    |---|---|---|---|---|
    | plain | 2 | 60.0 ± 14.1 | 5.0 ± 1.4 | 75.0 |
    """
    headings = ["training", "seeds", *(heading for heading, _ in columns.values())]
    lines = []
    for row in rows:
        cells = [str(row["name"]), str(len(row["accuracy"]))]
        for key, (_, factor) in columns.items():
            values = factor * np.asarray(row[key], dtype=float)
            mean, spread = _mean_sd(values)
            style = ".1f" if mean < 10_000 else ".1e"
            cells.append(f"{mean:{style}} ± {spread:{style}}" if len(values) > 1 else f"{mean:{style}}")
        lines.append(cells)
    return markdown_table(headings, lines)


def _mean_sd(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
