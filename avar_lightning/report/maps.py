"""VAS by layer and head, before and after, and what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avar_lightning.report.figure import (
    change_colours,
    format_number,
    heat_colours,
    index_ticks,
    needs_log_scale,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MOST_WRITTEN = 96
"""Cells of a map in which numbers are written."""


def plot_vas_map(
    vas_map: ArrayLike, *, layers: Sequence[int] | None = None, title: str = "VAS by layer and head"
) -> Figure:
    """Draw a layer × head heat map of the Visual Attention Score.

    Args:
        vas_map: (L, H) scores, NaN (drawn grey) where undefined.
        layers: number of each row's layer; 0 … L-1 when not given.
        title: heading of the picture.

    Returns:
        The figure; layer 0 is at the bottom, colours are logarithmic where the scores span a factor over 30.

    Raises:
        ValueError: the map is not two-dimensional.
    """
    scores = np.asarray(vas_map, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"vas_map has shape {scores.shape}, expected (layers, heads): average over samples.")
    num_layers, num_heads = scores.shape
    width, height = min(10.0, 2.4 + 0.36 * num_heads), min(9.0, 1.3 + 0.30 * num_layers)
    with new_figure(max(4.8, width), max(3.2, height)) as figure:
        axes = figure.add_subplot()
        picture = _draw(axes, scores, heat_colours(scores[np.isfinite(scores)]), layers)
        axes.set(ylabel="layer", title=title)
        figure.colorbar(picture, ax=axes, label=_label(scores))
    return figure


def plot_map_change(
    before: ArrayLike,
    after: ArrayLike,
    *,
    layers: Sequence[int] | None = None,
    names: tuple[str, str] = ("before", "after"),
    title: str = "",
) -> Figure:
    """Draw two maps of VAS on one scale, and their change.

    Args:
        before: (L, H) scores, NaN (drawn grey) where undefined.
        after: The same, measured later.
        layers: Number of each row's layer; 0 … L-1 when not given.
        names: Headings of the two.
        title: Heading of the picture.

    Returns:
        The figure; layer 0 is at the bottom. Where the scores span a factor over 30, their colours are logarithmic
        and the change is the ratio after / before; else it is after - before. White is no change.

    Raises:
        ValueError: The maps are not two-dimensional and of one shape.
    """
    one, two = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if one.ndim != 2 or one.shape != two.shape:
        raise ValueError(f"maps have shapes {one.shape} and {two.shape}, expected (layers, heads) twice.")
    both = np.stack([one, two])
    num_layers, num_heads = one.shape
    width = min(5.2, max(3.0, 1.4 + 0.3 * num_heads))
    with new_figure(3 * width, min(9.0, max(3.2, 1.5 + 0.3 * num_layers))) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        colours = heat_colours(both[np.isfinite(both)])
        for axes, scores, name in zip(panels, both, names):
            picture = _draw(axes, scores, colours, layers)
            axes.set_title(name)
        panels[0].set_ylabel("layer")
        figure.colorbar(picture, ax=list(panels[:2]), label=_label(both))
        _draw_change(figure, panels[2], one, two, names, layers)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_change(
    figure: Figure,
    axes: Axes,
    one: NDArray[np.float64],
    two: NDArray[np.float64],
    names: tuple[str, str],
    layers: Sequence[int] | None,
) -> None:
    ratio = needs_log_scale([one, two])
    change = two / one if ratio else two - one
    size = np.abs(np.log(change)) if ratio else np.abs(change)
    finite = size[np.isfinite(size)]
    many = finite.size > MOST_WRITTEN
    # A few heads of many must not take the colours from all others.
    most = max(float(np.quantile(finite, 0.98 if many else 1.0)) if finite.size else 0.0, 0.1 if ratio else 1e-3)
    picture = _draw(axes, change, change_colours(most, ratio=ratio), layers, signed=not ratio)
    axes.set_title("change" + (" (ratio)" if ratio else ""))
    label = f"{names[1]} / {names[0]}, log scale" if ratio else f"{names[1]} - {names[0]}"
    bar = figure.colorbar(picture, ax=axes, label=label, extend="both" if many else "neither")
    if ratio:
        ticks = np.exp(np.linspace(-most, most, 5))
        bar.set_ticks(list(ticks), labels=[f"{tick:.3g}" for tick in ticks], minor=False)
        bar.minorticks_off()


def _draw(
    axes: Axes,
    values: NDArray[np.float64],
    colours: tuple[Colormap, Normalize],
    layers: Sequence[int] | None,
    *,
    signed: bool = False,
) -> AxesImage:
    """Draw one map, with its numbers where there are few, in an ink that its colours let read."""
    shown = np.ma.masked_invalid(values)
    picture = axes.imshow(shown, origin="lower", aspect="auto", cmap=colours[0], norm=colours[1])
    light = picture.to_rgba(shown)[..., :3] @ (0.299, 0.587, 0.114) > 0.5
    for (layer, head), value in np.ndenumerate(values) if values.size <= MOST_WRITTEN else ():
        if np.isfinite(value):
            sign = "" if not signed else "-" if value < 0 else "+"
            text = sign + format_number(abs(value) if signed else value)
            ink = "black" if light[layer, head] else "white"
            axes.text(head, layer, text, ha="center", va="center", color=ink, fontsize=8)
    axes.set_xlabel("head")
    index_ticks(axes, "x", range(values.shape[1]))
    index_ticks(axes, "y", layers if layers is not None else range(len(values)))
    axes.spines[:].set_visible(False)
    return picture


def _label(scores: NDArray[np.float64]) -> str:
    return f"VAS (image / system{', log scale' if needs_log_scale(scores) else ''})"
