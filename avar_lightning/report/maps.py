"""Layer × head maps before and after, and what changed between them."""

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
    from matplotlib.figure import Figure

MOST_WRITTEN = 64
"""Cells of a map in which numbers are written."""


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
        after: The same of the trained model.
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
    logarithmic = needs_log_scale(both)
    num_layers, num_heads = one.shape
    numbers = list(layers) if layers is not None else list(range(num_layers))
    width = min(5.2, max(3.0, 1.4 + 0.3 * num_heads))
    with new_figure(3 * width, min(9.0, max(3.2, 1.5 + 0.3 * num_layers))) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        colours, norm = heat_colours(both[np.isfinite(both)])
        for axes, scores, name in zip(panels, both, names):
            picture = axes.imshow(np.ma.masked_invalid(scores), origin="lower", aspect="auto", cmap=colours, norm=norm)
            _write(axes, scores, dark=np.ma.filled(norm(np.ma.masked_invalid(scores)), 0) <= 0.6)
            axes.set_title(name)
        scale = ", log scale" if logarithmic else ""
        figure.colorbar(picture, ax=list(panels[:2]), label=f"VAS (image / system{scale})")
        _draw_change(figure, panels[2], one, two, logarithmic=logarithmic)
        for axes in panels:
            axes.set_xlabel("head")
            index_ticks(axes, "x", range(num_heads))
            index_ticks(axes, "y", numbers)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("layer")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_change(
    figure: Figure, axes: Axes, one: NDArray[np.float64], two: NDArray[np.float64], *, logarithmic: bool
) -> None:
    change = two / one if logarithmic else two - one
    size = np.abs(np.log(change)) if logarithmic else np.abs(change)
    finite = size[np.isfinite(size)]
    # A few heads of many must not take the colours from all others.
    most = max(
        float(np.quantile(finite, 0.98 if finite.size > MOST_WRITTEN else 1.0)) if finite.size else 0.0,
        0.1 if logarithmic else 1e-3,
    )
    shown = np.ma.masked_invalid(change)
    colours, norm = change_colours(most, ratio=logarithmic)
    picture = axes.imshow(shown, origin="lower", aspect="auto", cmap=colours, norm=norm)
    _write(axes, change, dark=size > 0.6 * most, signed=not logarithmic)
    axes.set_title("change" + (" (ratio)" if logarithmic else ""))
    label = "after / before, log scale" if logarithmic else "after - before"
    bar = figure.colorbar(picture, ax=axes, label=label, extend="both" if finite.size > MOST_WRITTEN else "neither")
    if logarithmic:
        ticks = np.exp(np.linspace(-most, most, 5))
        bar.set_ticks(list(ticks), labels=[f"{tick:.3g}" for tick in ticks], minor=False)
        bar.minorticks_off()


def _write(axes: Axes, values: NDArray[np.float64], *, dark: NDArray[np.bool_], signed: bool = False) -> None:
    if values.size > MOST_WRITTEN:
        return
    for (layer, head), value in np.ndenumerate(values):
        if np.isfinite(value):
            sign = "" if not signed else "-" if value < 0 else "+"
            ink = "white" if dark[layer, head] else "black"
            text = sign + format_number(abs(value) if signed else value)
            axes.text(head, layer, text, ha="center", va="center", color=ink, fontsize=8)
