"""Quantities by step of the training: small pictures beside each other, a line a run or a quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avar_lightning.report.figure import as_written, group_style, make_logarithmic, needs_log_scale, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAWN = 1000
"""Values of a longer curve are averaged over stretches."""
NOISY = 40
"""A curve with more values is drawn faint, under its running mean over a thirtieth of them."""


@dataclass(frozen=True)
class Curve:
    """One line."""

    name: str
    values: Mapping[int, float]
    """By step; those that are not finite leave a gap."""
    style: int = 0
    """Number of its colour, marker and line style."""
    baseline: bool = False
    """Whether its first value was measured before training; it gets a ring."""


@dataclass(frozen=True)
class Panel:
    """One of the small pictures."""

    heading: str
    curves: Sequence[Curve]
    factor: float = 1.0
    """To the shown unit."""

    @property
    def known(self) -> bool:
        """Whether a value is finite."""
        return any(math.isfinite(value) for curve in self.curves for value in curve.values.values())


def plot_curves(panels: Sequence[Panel], *, shared_legend: bool = False) -> Figure:
    """Draw quantities by step, at most three panels in a row.

    Args:
        panels: What is drawn; a panel is logarithmic where its curves are positive and span a factor over 30, and
            starts at 0 where they are not negative.
        shared_legend: One legend below for all panels, of the names of all curves, instead of one in each.

    Raises:
        ValueError: No panel has a finite value.
    """
    shown = [panel for panel in panels if panel.known]
    if not shown:
        raise ValueError(f"none of {len(panels)} panels has a finite value, expected at least one.")
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    names = list(dict.fromkeys(curve.name for panel in shown for curve in panel.curves))
    legend = 0.2 * math.ceil(len(names) / 3) + 0.2 if shared_legend and len(names) > 1 else 0.0
    with new_figure(max(5.2, 3.7 * columns), 2.7 * rows + 0.3 + legend) as figure:
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in places[len(shown) :]:
            axes.set_visible(False)
        for axes, panel in zip(places, shown, strict=False):
            _draw_panel(axes, panel, legend=not shared_legend)
        if shared_legend and len(names) > 1:
            handles = {label: line for axes in places for line, label in zip(*axes.get_legend_handles_labels())}
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: Panel, *, legend: bool) -> None:
    everything, smooth, ends = [], [], set[float]()
    for curve in panel.curves:
        if not curve.values:
            continue
        colour, marker, line = group_style(curve.style)
        steps, values = _averaged(curve, panel.factor)
        noisy = len(values) > NOISY
        bold = running_mean(values, max(3, len(values) // 30)) if noisy else values
        everything.append(values)
        smooth.append(bold)
        ends |= {steps.min(), steps.max()}
        if noisy:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        (drawn,) = axes.plot(steps, bold, line, markersize=4.5, color=colour, label=as_written(curve.name))
        drawn.set_marker(marker)
        if len(values) > 20:  # then only where a value stands between gaps, and would have no line
            drawn.set_markevery(np.flatnonzero(_between_gaps(bold)).tolist())
        if curve.baseline:
            axes.plot(steps[:1], values[:1], "o", markersize=10, markerfacecolor="none", color=colour)
    values = np.concatenate(everything)
    values = values[np.isfinite(values)]
    axes.update_datalim([(end, values[0]) for end in ends])  # of steps without a value too
    named = legend and [curve.name for curve in panel.curves] != [panel.heading]
    # Single values of a noisy curve that come near 0 are no reason; percentages show the whole scale.
    if panel.factor != 100 and values.min() > 0 and needs_log_scale(np.concatenate(smooth)):
        make_logarithmic(axes, "y")
    elif values.min() >= 0:
        # A ratio or a loss starts at zero: a small change must look small.
        top = (1.3 if named else 1.08) * float(values.max())
        axes.set_ylim(0, min(top, 105.0) if panel.factor == 100 and not named else top or 1.0)
    axes.set(xlabel="step", title=as_written(panel.heading))
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.locator_params(axis="x", nbins=5, integer=True)
    if named:
        axes.legend(frameon=False, fontsize=8)


def _averaged(curve: Curve, factor: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, of a long curve their means over stretches; NaN wherever a value is not finite."""
    steps = np.asarray(list(curve.values), dtype=float)
    values = factor * np.asarray(list(curve.values.values()), dtype=float)
    values[~np.isfinite(values)] = np.nan
    if len(values) <= MOST_DRAWN:
        return steps, values
    starts = np.linspace(0, len(values), MOST_DRAWN, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _between_gaps(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    missing = np.pad(np.isnan(values), 1, constant_values=True)
    return ~missing[1:-1] & missing[:-2] & missing[2:]


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Mean of the values around each place, of fewer at the ends and beside NaN, which stays what it is.

    >>> running_mean(np.array([1.0, 2.0, 6.0, 4.0, np.nan]), 3)
    array([1.5, 3. , 4. , 5. , nan])
    """
    window, known = np.ones(width), np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known, window, mode="same")
    return np.where(known, total / np.maximum(count, 1), np.nan)
