"""Small pictures show every value, honestly scaled; changes of maps are what they say."""

import math

import numpy as np
import pytest
from matplotlib.colors import LogNorm

from avar_lightning.report.curves import MOST_DRAWN, Curve, Panel, plot_curves
from avar_lightning.report.figure import group_style
from avar_lightning.report.maps import plot_map_change


def test_a_curve_has_gaps_where_it_is_not_finite_and_its_baseline_a_ring() -> None:
    curve = Curve("user", {0: 0.5, 1: math.nan, 2: 0.25, 3: math.inf}, baseline=True)
    axes = plot_curves([Panel("Image share (%)", [curve], 100.0)]).axes[0]
    line, ring = axes.lines
    np.testing.assert_equal(line.get_xydata(), [[0, 50], [1, math.nan], [2, 25], [3, math.nan]])
    np.testing.assert_allclose(ring.get_xydata(), [[0, 50]])
    assert axes.get_ylim()[0] == 0
    assert axes.get_yscale() == "linear"
    assert axes.get_xlim()[1] >= 3, "steps without a value are steps too"


@pytest.mark.parametrize("length", [30, 300, 20 * MOST_DRAWN])
def test_a_long_curve_that_diverges_ends_there(length: int) -> None:
    """Whether it is drawn as it is, with a running mean, or averaged; and a value between gaps is a dot."""
    values = np.ones(length)
    values[length // 2 :] = math.nan
    values[-length // 30 :] = [7.0] + (length // 30 - 1) * [math.nan] if length <= 300 else 7.0
    axes = plot_curves([Panel("a", [Curve("x", dict(enumerate(values)))])]).axes[0]
    bold = axes.lines[-1]
    steps, drawn = bold.get_xdata(), bold.get_ydata()
    lost = (steps > length // 2 + 1) & (steps < length - length // 30 - 1)
    assert np.isnan(drawn[lost]).all()
    np.testing.assert_allclose(drawn[steps < length // 2 - 1], 1.0)
    np.testing.assert_allclose(drawn[~np.isnan(drawn) & (steps > length // 2 + 1)], 7.0)
    assert [drawn[place] for place in bold.get_markevery()] == ([7.0] if length <= 300 else [])


def test_a_panel_is_logarithmic_where_values_span_far_and_empty_panels_are_left_out() -> None:
    figure = plot_curves([Panel("a", [Curve("x", {0: 1.0, 1: 1e6})]), Panel("b", [Curve("x", {0: math.nan})])])
    (axes,) = (axes for axes in figure.axes if axes.get_visible())
    assert axes.get_yscale() == "log"
    with pytest.raises(ValueError, match="none of 1 panels has a finite value"):
        plot_curves([Panel("b", [])])


def test_a_long_curve_keeps_its_mean_and_gets_a_running_mean() -> None:
    values = np.random.default_rng(0).normal(5, 1, 10 * MOST_DRAWN)
    axes = plot_curves([Panel("a", [Curve("x", dict(enumerate(values)))])]).axes[0]
    faint, bold = axes.lines
    assert len(faint.get_ydata()) == MOST_DRAWN
    np.testing.assert_allclose(faint.get_ydata()[0], values[:10].mean())
    assert np.std(bold.get_ydata()) < 0.5 * np.std(faint.get_ydata())


def test_one_legend_names_every_group_once() -> None:
    curves = [Curve(name, {0: 1.0, 1: 2.0}, style) for style, name in enumerate("aab")]
    figure = plot_curves([Panel("p", curves), Panel("q", curves)], shared_legend=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_names_with_dollars_and_underscores_are_shown_as_they_are() -> None:
    curves = [Curve(name, {0: 1.0, 1: 2.0}) for name in (r"$\frac$", "_hidden")]
    figure = plot_curves([Panel("$_$", curves)])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [r"\$\frac\$", " _hidden"]


def test_the_first_fifty_six_groups_look_different() -> None:
    styles = [group_style(number) for number in range(28)]
    assert len({(colour, line) for colour, _, line in styles}) == 28
    assert len({(colour, marker) for colour, marker, _ in map(group_style, range(56))}) == 56


def test_the_change_of_maps_is_a_difference_and_of_far_apart_scores_a_ratio() -> None:
    before, after = np.array([[1.0, 2.0], [3.0, math.nan]]), np.array([[2.0, 2.0], [1.0, 4.0]])
    axes = plot_map_change(before, after, layers=[5, 6]).axes
    shown = [np.ma.filled(panel.images[0].get_array(), np.nan) for panel in axes[:3]]
    np.testing.assert_equal(shown, [before, after, after - before])
    assert axes[0].images[0].norm is axes[1].images[0].norm, "one scale"
    norm = axes[2].images[0].norm
    assert -norm.vmin == norm.vmax == 2
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["5", "6"]

    figure = plot_map_change([[1.0, 100.0]], [[2.0, 50.0]])
    np.testing.assert_allclose(figure.axes[2].images[0].get_array(), [[2.0, 0.5]])
    assert isinstance(figure.axes[2].images[0].norm, LogNorm)
    assert "ratio" in figure.axes[2].get_title(loc="left")


def test_maps_of_degenerate_scores_are_drawn_and_of_other_shapes_refused() -> None:
    plot_map_change([[math.nan, 0.0]], [[math.nan, 0.0]]).canvas.draw()
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(2, 1\), expected"):
        plot_map_change([[1.0, 2.0]], [[1.0], [2.0]])
