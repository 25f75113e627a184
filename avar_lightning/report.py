"""Pictures and tables of visual attention: arrays in, matplotlib figures or Markdown out.

Every figure is made with matplotlib's object-oriented API on the Agg canvas: it needs no display and leaves
no state in `pyplot`. Colours are Okabe and Ito's, which people with colour-blindness can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

ROLE_COLOURS = {
    "system": "#E69F00",
    "user": "#56B4E9",
    "image": "#009E73",
    "response": "#CC79A7",
    "other": "#DDDDDD",
}
"""Colour of each role, and the order in which shares are stacked."""

LOG_SCALE_RATIO = 30.0
"""Positive values that span more than this factor are drawn on a logarithmic scale."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure of `width` × `height` inches, with the house style while it is being drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib; install it with `pip install matplotlib`.") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def render(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure to pixels.

    Args:
        figure: a figure of this module.

    Returns:
        uint8 array (height, width, 3), RGB.
    """
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def needs_log_scale(values: ArrayLike) -> bool:
    """Tell whether values are all positive and span more than `LOG_SCALE_RATIO`; NaN and inf do not count.

    >>> needs_log_scale([1.0, 20.0]), needs_log_scale([1.0, 50.0]), needs_log_scale([0.0, 50.0])
    (False, True, False)
    """
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return bool(array.size and array.min() > 0 and array.max() / array.min() > LOG_SCALE_RATIO)


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
    finite = scores[np.isfinite(scores)]
    width, height = min(10.0, 2.4 + 0.36 * num_heads), min(9.0, 1.3 + 0.30 * num_layers)
    with _figure(max(4.8, width), max(3.2, height)) as figure:
        import matplotlib
        from matplotlib.colors import LogNorm, Normalize

        axes = figure.add_subplot()
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        norm = LogNorm(low, high) if needs_log_scale(finite) else Normalize(min(low, 0.0), high)
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="#BBBBBB")
        shown = np.ma.masked_invalid(scores)
        picture = axes.imshow(shown, origin="lower", aspect="auto", cmap=colours, norm=norm)
        axes.set(xlabel="head", ylabel="layer", title=title)
        _index_ticks(axes, "x", range(num_heads))
        _index_ticks(axes, "y", layers if layers is not None else range(num_layers))
        axes.spines[:].set_visible(False)
        if num_layers * num_heads <= 96:
            for (layer, head), score in np.ndenumerate(scores):
                if math.isfinite(score):
                    ink = "black" if norm(score) > 0.6 else "white"
                    label = format_number(score)
                    axes.text(head, layer, label, ha="center", va="center", color=ink, fontsize=8)
        scale = ", log scale" if isinstance(norm, LogNorm) else ""
        figure.colorbar(picture, ax=axes, label=f"VAS (image / system{scale})")
    return figure


def plot_attention_shares(
    shares: Mapping[str, ArrayLike],
    *,
    layers: Sequence[int] | None = None,
    title: str = "Where attention goes, by layer",
) -> Figure:
    """Draw, as one stacked bar a layer, the part of the attention that each role gets.

    Args:
        shares: role name (`system`, `user`, `image`, `response`) to (L,) parts of 1; what they leave of
            1 (BOS, turn headers) is drawn as `other`.
        layers: number of each layer; 0 … L-1 when not given.
        title: heading of the picture.

    Raises:
        ValueError: no share is given, a role is unknown, or a layer's shares sum to more than 1.
    """
    unknown = set(shares) - set(ROLE_COLOURS)
    if not shares or unknown:
        raise ValueError(f"shares has the roles {sorted(shares)}, expected some of {list(ROLE_COLOURS)}.")
    parts = {role: np.asarray(shares[role], dtype=float) for role in ROLE_COLOURS if role in shares}
    total = np.sum(list(parts.values()), axis=0)
    if np.nanmax(total, initial=0.0) > 1.01:
        raise ValueError(f"a layer's shares sum to {np.nanmax(total):.3f}, expected at most 1: pass mean masses.")
    if "other" not in parts:
        parts["other"] = np.clip(1.0 - total, 0.0, 1.0)
    num_layers = len(total)
    with _figure(max(4.8, min(11.0, 2.2 + 0.34 * num_layers)), 3.6) as figure:
        axes = figure.add_subplot()
        bottom = np.zeros(num_layers)
        for role, part in parts.items():
            height = 100 * np.nan_to_num(part)
            axes.bar(range(num_layers), height, bottom=bottom, width=0.9, color=ROLE_COLOURS[role], label=role)
            bottom += height
        axes.set(xlabel="layer", ylabel="share of attention (%)", title=title)
        axes.set(ylim=(0, 100), xlim=(-0.6, num_layers - 0.4))
        _index_ticks(axes, "x", layers if layers is not None else range(num_layers))
        # Reversed, so that the legend reads from top to bottom as the bars do.
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    return figure


def plot_overlay(image: Image | ArrayLike, grid: ArrayLike, *, title: str = "Attention of the response") -> Figure:
    """Draw an image beside itself under the attention that its tokens receive.

    Args:
        image: PIL image or uint8 array (height, width, 3).
        grid: (rows, columns) attention on each image token, in reading order; its ratio to the mean is
            shown.
        title: heading of the right picture.

    Raises:
        ValueError: the grid is not two-dimensional.
    """
    heat = np.asarray(grid, dtype=float)
    if heat.ndim != 2:
        raise ValueError(f"grid has shape {heat.shape}, expected (rows, columns) of image tokens.")
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    heat = heat / max(float(heat.mean()), np.finfo(float).tiny)
    panel = 3.4
    with _figure(2 * panel + 1.0, min(6.0, max(2.2, panel * height / width)) + 0.5) as figure:
        plain, covered = figure.subplots(1, 2)
        plain.imshow(pixels)
        plain.set_title("Image")
        covered.imshow(pixels.mean(axis=2) if pixels.ndim == 3 else pixels, cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        # At least 2, so that the mean is never the brightest colour.
        top = max(float(heat.max()), 2.0)
        veil = covered.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, interpolation="nearest", vmin=0, vmax=top)
        covered.set_title(title)
        for axes in (plain, covered):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#888888", linewidth=0.6)
        label = "attention per token\n(1 = mean of this image)"
        figure.colorbar(veil, ax=covered, label=label, fraction=0.046)
    return figure


def plot_results(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Draw accuracy, VAS and image share of several trainings, a dot a seed and a bar for mean ± sd.

    Args:
        rows: one mapping a training: `name`, and lists with one number a seed: `accuracy` (0 to 1), `vas` and
            `share` (0 to 1). A row with `reference=True` (the model before training) also gets a dashed line
            down the panels.
        title: heading of the whole picture.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows is empty, expected one mapping a training.")
    with _figure(10.0, 1.5 + 0.42 * len(rows)) as figure:
        panels = figure.subplots(1, len(_COLUMNS), sharey=True)
        for axes, (key, (heading, factor)) in zip(panels, _COLUMNS.items(), strict=True):
            _result_panel(axes, rows, key, factor)
            axes.set_title(heading)
        panels[0].set_yticks(range(len(rows)), [str(row["name"]) for row in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.set_layout_engine("constrained", wspace=0.06, h_pad=0.08)
        figure.supxlabel("dot: one seed · bar: mean ± standard deviation", fontsize=9, color="#555555")
    return figure


_COLUMNS = {
    "accuracy": ("Accuracy (%)", 100.0),
    "vas": ("VAS (image / system)", 1.0),
    "share": ("Image share (%)", 100.0),
}
"""Key of a row → heading, factor to the shown unit."""


def _result_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, factor: float) -> None:
    everything = factor * np.concatenate([np.asarray(row[key], dtype=float) for row in rows])
    logarithmic = key == "vas" and needs_log_scale(everything)
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


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows of `plot_results` as a Markdown table of mean ± standard deviation over seeds.

    The standard deviation is the sample's (divided by n - 1), and left out where there is one seed.

    >>> print(results_table([{"name": "plain", "accuracy": [0.5, 0.7], "vas": [4.0, 6.0], "share": [0.75]}]))
    | training | seeds | Accuracy (%) | VAS (image / system) | Image share (%) |
    |---|---|---|---|---|
    | plain | 2 | 60.0 ± 14.1 | 5.0 ± 1.4 | 75.0 |
    """
    headings = ["training", "seeds", *(heading for heading, _ in _COLUMNS.values())]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [str(row["name"]), str(len(row["accuracy"]))]
        for key, (_, factor) in _COLUMNS.items():
            values = factor * np.asarray(row[key], dtype=float)
            mean, spread = _mean_sd(values)
            style = ".1f" if mean < 10_000 else ".1e"
            cells.append(f"{mean:{style}} ± {spread:{style}}" if len(values) > 1 else f"{mean:{style}}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_number(value: float) -> str:
    """Write a number in at most six characters.

    >>> [format_number(value) for value in (0.123, 7.46, 152.3, 1.2e9)]
    ['0.12', '7.5', '152', '1e9']
    """
    if value >= 10_000:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _mean_sd(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _index_ticks(axes: Axes, side: str, labels: Sequence[int]) -> None:
    """Label positions 0 … n-1, every k-th so that at most sixteen labels stand beside each other."""
    stride = math.ceil(len(labels) / 16)
    positions = list(range(0, len(labels), stride))
    names = [str(labels[position]) for position in positions]
    (axes.set_xticks if side == "x" else axes.set_yticks)(positions, names)
