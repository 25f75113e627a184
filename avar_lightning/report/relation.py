"""Two quantities against each other, with how closely they go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avar_lightning.report.correlation import Correlation, pearson, spearman
from avar_lightning.report.figure import as_written, group_style, make_logarithmic, needs_log_scale, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One dot of `plot_relation`, for instance a checkpoint."""

    x: float
    y: float
    group: str = ""
    """Points of a group share colour and marker, and a line of the legend."""
    label: str = ""
    """Written beside the dot."""
    x_interval: tuple[float, float] | None = None
    """Ends of the horizontal error bar."""
    y_interval: tuple[float, float] | None = None
    """Ends of the vertical error bar."""


def plot_relation(
    points: Sequence[Point],
    *,
    x: str,
    y: str,
    log_x: bool | None = None,
    connect: bool = False,
    title: str = "",
) -> Figure:
    """Draw a scatter of points by group, with Pearson's and Spearman's correlation in a line below the title.

    Args:
        points: The dots; those with a coordinate that is not finite, or not positive on a logarithmic axis, are left
            out, of the correlations too.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        log_x: Whether x is logarithmic, and Pearson's correlation that of its logarithm; unset, where positive
            values span a factor over 30.
        connect: Join the points of a group in their order, for checkpoints of one run.
        title: Heading of the picture.

    Raises:
        ValueError: No point can be drawn.
    """
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    logarithmic = needs_log_scale([point.x for point in shown]) if log_x is None else log_x
    shown = [point for point in shown if point.x > 0 or not logarithmic]
    if not shown:
        raise ValueError(f"none of {len(points)} points has a finite {x!r} and {y!r}, expected at least one.")
    groups = list(dict.fromkeys(point.group for point in shown))
    # A legend beside the axes gets room of its own; the axes keep their size.
    width = 5.4 + (0.9 + 0.075 * max(map(len, groups)) if len(groups) > 1 else 0.0)
    with new_figure(width, max(4.2, 1.2 + 0.2 * len(groups))) as figure:
        axes = figure.add_subplot()
        for index, group in enumerate(groups):
            _draw_group(axes, [point for point in shown if point.group == group], index, connect=connect)
        axes.set(xlabel=as_written(x) + (" (log scale)" if logarithmic else ""), ylabel=as_written(y))
        if logarithmic:
            make_logarithmic(axes, "x")
        axes.margins(0.08)
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.set_title(title, pad=34)
        axes.text(0, 1.02, correlations(shown, logarithmic=logarithmic), transform=axes.transAxes, fontsize=9)
        if len(groups) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def correlations(points: Sequence[Point], *, logarithmic: bool) -> str:
    """Pearson's and Spearman's correlation of points in words, with 95 % intervals."""
    across, up = [point.x for point in points], [point.y for point in points]
    linear = pearson(np.log10(across) if logarithmic else across, up)
    name = "r (of log x)" if logarithmic else "r"
    return f"{correlation_text(name, linear)},  n = {linear.n}\n{correlation_text('Spearman ρ', spearman(across, up))}"


def correlation_text(name: str, correlation: Correlation) -> str:
    """A correlation in words, with its interval where it has one."""
    if not math.isfinite(correlation.r):
        return f"{name} is undefined"
    ends = f" ({_rounded(correlation.low)} to {_rounded(correlation.high)})" if math.isfinite(correlation.low) else ""
    return f"{name} = {_rounded(correlation.r)}{ends}"


def _rounded(r: float) -> str:
    """To two decimals, but to more where these would make a perfect correlation of another."""
    return f"{r:.2f}" if abs(r) < 0.995 or abs(r) == 1 else f"{r:.4f}"


def _draw_group(axes: Axes, points: Sequence[Point], index: int, *, connect: bool) -> None:
    colour, marker, line = group_style(index)
    across, up = [point.x for point in points], [point.y for point in points]
    if connect:
        axes.plot(across, up, color=colour, linestyle=line, linewidth=1, alpha=0.45, zorder=1)
    dots: dict[str, Any] = {
        "s": 38,
        "color": colour,
        "marker": marker,
        "edgecolors": "white",
        "linewidths": 0.7,
        "zorder": 3,
    }
    axes.scatter(across, up, label=as_written(points[0].group), **dots)
    for point in points:
        if point.x_interval is not None:
            axes.hlines(point.y, *point.x_interval, color=colour, linewidth=1.2, alpha=0.6, zorder=2)
        if point.y_interval is not None:
            axes.vlines(point.x, *point.y_interval, color=colour, linewidth=1.2, alpha=0.6, zorder=2)
        if point.label:
            words: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "#444444"}
            axes.annotate(as_written(point.label), (point.x, point.y), (4, 4), **words)
