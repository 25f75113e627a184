"""What all pictures share: canvas, house style, scales and numbers.

Every figure is made with matplotlib's object-oriented API on the Agg canvas: it needs no display and leaves
no state in `pyplot`. Colours are Okabe and Ito's, which people with colour-blindness can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

LOG_SCALE_RATIO = 30.0
"""Positive values that span more than this factor are drawn on a logarithmic scale."""

GROUP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, without the yellow that white paper swallows."""
_MARKERS, _LINES = "os^DvPX<", ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "figure.facecolor": "white",
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
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


def group_style(index: int) -> tuple[str, str, str]:
    """Colour, marker and line style of the group with this number; the first 28 differ also in print.

    >>> group_style(0), group_style(8)
    (('#0072B2', 'o', '-'), ('#D55E00', 'o', '--'))
    """
    line = _LINES[index // len(GROUP_COLOURS) % len(_LINES)]
    return GROUP_COLOURS[index % len(GROUP_COLOURS)], _MARKERS[index % len(_MARKERS)], line


def needs_log_scale(values: ArrayLike) -> bool:
    """Tell whether values are all positive and span more than `LOG_SCALE_RATIO`; NaN and inf do not count.

    >>> needs_log_scale([1.0, 20.0]), needs_log_scale([1.0, 50.0]), needs_log_scale([0.0, 50.0])
    (False, True, False)
    """
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return bool(array.size and array.min() > 0 and array.max() / array.min() > LOG_SCALE_RATIO)


def heat_colours(values: NDArray[np.float64]) -> tuple[Colormap, Normalize]:
    """Colours of a heat map and their scale: from 0, or logarithmic where finite positive values span that much."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    norm = LogNorm(low, high) if needs_log_scale(values) else Normalize(min(low, 0.0), high)
    return matplotlib.colormaps["viridis"].with_extremes(bad="#BBBBBB"), norm


def change_colours(most: float, *, ratio: bool) -> tuple[Colormap, Normalize]:
    """Colours of a change from orange (less) over white (none) to purple (more), which everybody can tell apart.

    Args:
        most: Largest change that is told apart; of a ratio, its natural logarithm.
        ratio: Whether the change is after / before.
    """
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    norm = LogNorm(math.exp(-most), math.exp(most)) if ratio else Normalize(-most, most)
    return matplotlib.colormaps["PuOr"].with_extremes(bad="#BBBBBB"), norm


def as_written(text: str) -> str:
    r"""Text of a file as matplotlib should show it: dollars are no mathematics, and no underscore hides a label.

    >>> as_written("a$b$"), as_written("_x")
    ('a\\$b\\$', ' _x')
    """
    return " " * text.startswith("_") + text.replace("$", r"\$")


def format_number(value: float) -> str:
    """Write a number in at most six characters.

    >>> [format_number(value) for value in (0.123, 7.46, 152.3, 1.2e9)]
    ['0.12', '7.5', '152', '1e9']
    """
    if value >= 10_000:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def make_logarithmic(axes: Axes, side: str) -> None:
    """Make an axis on which something was drawn logarithmic, with plain numbers beside it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if side == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e+0", "e").replace("e+", "e")))
    axis.set_minor_formatter(NullFormatter())


def index_ticks(axes: Axes, side: str, labels: Sequence[int]) -> None:
    """Label positions 0 … n-1, every k-th so that at most sixteen labels stand beside each other."""
    stride = math.ceil(len(labels) / 16)
    positions = list(range(0, len(labels), stride))
    names = [str(labels[position]) for position in positions]
    (axes.set_xticks if side == "x" else axes.set_yticks)(positions, names)
