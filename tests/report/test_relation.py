"""Correlations agree with torchmetrics and published examples; pictures of relations show every point and group."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from avar_lightning.report import Point, pearson, plot_relation, plot_shares_by_layer, render, spearman

# The example of Bonett's own ci.spear (R package statpsych), with ties in both columns.
BONETT_X = [67, 28, 30, 28, 52, 40, 25, 37, 44, 10, 14, 20, 28, 40, 51]
BONETT_Y = [21, 4, 9, 12, 35, 18, 10, 22, 24, 1, 6, 8, 13, 16, 19]


@pytest.mark.parametrize("seed", range(5))
def test_correlations_agree_with_torchmetrics(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 8, 20).astype(float)  # with ties
    y = 0.5 * x + draw.normal(size=20)
    tensors = torch.tensor(x), torch.tensor(y)
    assert pearson(x, y).r == pytest.approx(float(pearson_corrcoef(*tensors)), abs=1e-9)
    assert spearman(x, y).r == pytest.approx(float(spearman_corrcoef(*tensors)), abs=1e-6)


def test_pearson_has_fishers_interval() -> None:
    """By hand: atanh 0.8 = ln 3 = 1.098612, ± 1.959964 / √2 = 1.385904; tanh gives the ends."""
    found = pearson([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    assert (found.r, found.low, found.high, found.n) == pytest.approx((0.8, -0.279642, 0.986196, 5), abs=1e-4)


def test_spearman_has_the_interval_of_bonett_and_wright() -> None:
    found = spearman(BONETT_X, BONETT_Y)
    assert (found.r, found.low, found.high) == pytest.approx((0.8699639, 0.5840951, 0.9638297), abs=1e-6)


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_what_is_undefined_is_nan(correlation) -> None:
    assert math.isnan(correlation([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]).r)
    assert math.isnan(correlation([0.1 + 0.2] * 7, range(7)).r)
    assert math.isnan(correlation([], []).r)
    few = correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    assert (few.r, few.n) == (0.5, 3)
    assert math.isnan(few.low)
    perfect = correlation([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0])
    assert perfect.r == 1
    assert math.isnan(perfect.high), "Fisher's z is infinite"
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\), expected two columns of the same length"):
        correlation([1, 2], [1, 2, 3])


def test_pairs_that_are_not_finite_are_left_out_and_large_numbers_do_not_overflow() -> None:
    x = [1e200, 2e200, math.nan, 3e200, 4e200, 5.0]
    y = [2.0, 1.0, 7.0, 4.0, 3.0, math.inf]
    found = pearson(x, y)
    assert found.n == 4
    assert found.r == pytest.approx(0.6)


POINTS = [
    Point(1.0, 40.0, "plain", "0", y_interval=(35.0, 45.0)),
    Point(2.0, 50.0, "plain"),
    Point(400.0, 45.0, "share", x_interval=(300.0, 500.0)),
    Point(math.nan, 50.0, "share"),
]


def test_a_relation_shows_points_by_group_with_both_correlations() -> None:
    axes = plot_relation(POINTS, x="VAS", y="Accuracy (%)").axes[0]
    dots = {item.get_label(): np.asarray(item.get_offsets()).tolist() for item in axes.collections}
    assert dots["plain"] == [[1, 40], [2, 50]]
    assert dots["share"] == [[400, 45]]
    assert axes.get_xscale() == "log"
    words = next(text.get_text() for text in axes.texts if "ρ" in text.get_text())
    expected = np.corrcoef(np.log10([1, 2, 400]), [40, 50, 45])[0, 1]
    assert words.splitlines() == [f"r (of log x) = {expected:.2f},  n = 3", "Spearman ρ = 0.50"]
    assert axes.get_legend() is not None


def test_a_relation_may_be_linear_and_of_one_point() -> None:
    axes = plot_relation([Point(1.0, 2.0)], x="a", y="b", log_x=False).axes[0]
    assert axes.get_xscale() == "linear"
    assert "r is undefined" in axes.texts[0].get_text()
    with pytest.raises(ValueError, match="none of 1 points has a finite 'a' and 'b'"):
        plot_relation([Point(math.nan, 2.0)], x="a", y="b")


def test_shares_by_layer_have_a_line_a_group_and_a_band_over_seeds() -> None:
    seeds = np.array([[0.2, 0.4], [0.4, 0.4]])
    groups = {
        "plain": {"system": seeds, "user": seeds / 2, "image": seeds / 4},
        "one": {"system": [0.1, 0.2], "user": [0.3, 0.4], "image": [0.5, 0.3]},
    }
    figure = plot_shares_by_layer(groups, layers=[3, 7])
    system, user, image = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["system", "user", "image"]
    np.testing.assert_allclose(system.lines[0].get_ydata(), [30, 40])
    np.testing.assert_allclose(image.lines[1].get_ydata(), [50, 30])
    band = system.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(30 + 100 * math.sqrt(0.02)), "the sample standard deviation of 0.2 and 0.4"
    assert len(user.collections) == 1, "one run has no band"
    assert [label.get_text() for label in image.get_xticklabels()] == ["3", "7"]
    assert render(figure).std() > 5


def shares(*parts: float) -> dict[str, list[float]]:
    return {role: list(parts) for role in ("system", "user", "image")}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "expected the roles"),
        ({"a": {"system": [0.1]}}, r"no \('a', 'user'\)"),
        ({"a": shares(0.1), "b": shares(0.1, 0.2)}, r"\[1, 2\] layers"),
    ],
)
def test_shares_by_layer_refuse_what_cannot_stand_side_by_side(groups, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_shares_by_layer(groups)
