"""Pictures of visual attention by role, and on the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from avar_lightning.report.figure import as_written, group_style, index_ticks, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

ROLE_COLOURS = {"system": "#E69F00", "user": "#56B4E9", "image": "#009E73", "response": "#CC79A7", "other": "#DDDDDD"}
"""Colour of each role, and the order in which shares are stacked."""


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
    with new_figure(max(4.8, min(11.0, 2.2 + 0.34 * num_layers)), 3.6) as figure:
        axes = figure.add_subplot()
        bottom = np.zeros(num_layers)
        for role, part in parts.items():
            height = 100 * np.nan_to_num(part)
            axes.bar(range(num_layers), height, bottom=bottom, width=0.9, color=ROLE_COLOURS[role], label=role)
            bottom += height
        axes.set(xlabel="layer", ylabel="share of attention (%)", title=title)
        axes.set(ylim=(0, 100), xlim=(-0.6, num_layers - 0.4))
        index_ticks(axes, "x", layers if layers is not None else range(num_layers))
        # Reversed, so that the legend reads from top to bottom as the bars do.
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    return figure


def plot_shares_by_layer(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    *,
    layers: Sequence[int] | None = None,
    roles: Sequence[str] = ("system", "user", "image"),
    title: str = "",
) -> Figure:
    """Draw the attention that roles get by layer, a panel a role and a line a group, for runs side by side.

    Args:
        groups: name of each group to its shares, role name to (L,) parts of 1 of one run, or (runs, L) of several,
            for instance seeds, whose mean is the line and whose sample standard deviation the band.
        layers: number of each layer; 0 … L-1 when not given.
        roles: the panels.
        title: heading of the picture.

    Raises:
        ValueError: there is no group, one lacks a role, or they differ in their number of layers.
    """
    lines = {
        name: {role: 100 * np.atleast_2d(np.asarray(shares[role], dtype=float)) for role in roles if role in shares}
        for name, shares in groups.items()
    }
    lacking = [(name, role) for name in lines for role in roles if role not in lines[name]]
    if not lines or lacking:
        raise ValueError(
            f"groups has no {lacking[0] if lacking else 'group'}, expected the roles {list(roles)} of each."
        )
    depths = sorted({values.shape[-1] for shares in lines.values() for values in shares.values()})
    if len(depths) > 1:
        raise ValueError(f"groups have {depths} layers, expected as many in each.")
    numbers = list(layers) if layers is not None else list(range(depths[0]))
    with new_figure(2.0 + 3.0 * len(roles), 3.4 + 0.17 * math.ceil(len(lines) / 3)) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(roles), sharey=True))
        for axes, role in zip(panels, roles, strict=True):
            for index, (name, shares) in enumerate(lines.items()):
                colour, marker, line = group_style(index)
                mean = shares[role].mean(axis=0)
                # So that one layer, or a crowd of lines, can be told apart too.
                dots: dict[str, Any] = {"marker": marker, "markersize": 4, "markevery": 0.12}
                axes.plot(mean, color=colour, linestyle=line, label=as_written(name), **dots)
                if len(shares[role]) > 1:
                    spread = shares[role].std(axis=0, ddof=1)
                    axes.fill_between(range(len(mean)), mean - spread, mean + spread, color=colour, alpha=0.18, lw=0)
            axes.set(title=role, xlabel="layer", xlim=(-0.4, len(numbers) - 0.6))
            axes.grid(color="#E5E5E5", linewidth=0.8)
            index_ticks(axes, "x", numbers)
        panels[0].set_ylabel("share of attention (%)")
        panels[0].set_ylim(bottom=0)
        if len(lines) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
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
    with new_figure(2 * panel + 1.0, min(6.0, max(2.2, panel * height / width)) + 0.5) as figure:
        plain, covered = figure.subplots(1, 2)
        plain.imshow(pixels)
        plain.set_title("Image")
        covered.imshow(pixels.mean(axis=2) if pixels.ndim == 3 else pixels, cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        # At least 2, so that the mean is never the brightest colour.
        top = max(float(heat.max()), 2.0)
        veil = covered.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, interpolation="nearest", vmin=0, vmax=top)
        covered.set_title(as_written(title))
        for axes in (plain, covered):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#888888", linewidth=0.6)
        label = "attention per token\n(1 = mean of this image)"
        figure.colorbar(veil, ax=covered, label=label, fraction=0.046)
    return figure
