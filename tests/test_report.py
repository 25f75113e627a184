"""Figures show what they were given, honestly scaled; tables carry mean and sample standard deviation."""

import math
import sys

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import LogNorm, Normalize
from PIL import Image

from avar_lightning.interventions import Difference
from avar_lightning.report import (
    format_number,
    interventions_table,
    needs_log_scale,
    plot_attention_shares,
    plot_differences,
    plot_overlay,
    plot_results,
    plot_sweep,
    plot_vas_map,
    render,
    results_table,
)

ROWS = [
    {"name": "before", "accuracy": [0.3], "vas": [3.0], "share": [0.7], "reference": True},
    {"name": "plain", "accuracy": [0.4, 0.6], "vas": [4.0, 6.0], "share": [0.8, 0.9]},
    {"name": "published", "accuracy": [0.2, 0.4], "vas": [1e9, 3e9], "share": [1.0, 1.0]},
]


def test_map_shows_the_scores_with_layer_zero_at_the_bottom() -> None:
    scores = np.array([[1.0, 2.0, math.nan], [3.0, 4.0, 5.0]])
    axes = plot_vas_map(scores, layers=[4, 9]).axes[0]
    picture = axes.images[0]
    shown = picture.get_array()
    assert shown is not None
    np.testing.assert_array_equal(np.ma.filled(shown, np.nan), scores)
    assert picture.origin == "lower"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "9"]
    assert type(picture.norm) is Normalize
    assert picture.norm.vmin == 0, "a linear scale starts at zero"


def test_map_is_logarithmic_only_when_scores_span_far() -> None:
    figure = plot_vas_map([[0.1, 100.0]])
    assert isinstance(figure.axes[0].images[0].norm, LogNorm)
    assert "log scale" in figure.axes[1].get_ylabel()


@pytest.mark.parametrize("scores", [[[math.nan, math.nan]], [[0.0, 0.0]], [[math.inf, 2.0]]])
def test_map_survives_degenerate_scores(scores: list[list[float]]) -> None:
    assert render(plot_vas_map(scores)).ndim == 3


def test_map_refuses_a_batch_of_maps() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), expected \(layers, heads\)"):
        plot_vas_map(np.ones((2, 3, 4)))


def test_shares_stack_to_one_hundred_percent() -> None:
    shares = {"image": [0.2, 0.3], "system": [0.5, 0.4], "user": [0.1, 0.1]}
    axes = plot_attention_shares(shares).axes[0]
    bars = {container.get_label(): [bar.get_height() for bar in container] for container in axes.containers}
    assert list(bars) == ["system", "user", "image", "other"]
    np.testing.assert_allclose(bars["image"], [20, 30])
    np.testing.assert_allclose(np.sum(list(bars.values()), axis=0), 100)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "expected some of"),
        ({"picture": [0.5]}, r"\['picture'\], expected some of"),
        ({"image": [0.8], "system": [0.7]}, "sum to 1.500, expected at most 1"),
    ],
)
def test_shares_refuse_what_is_no_share(shares: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_attention_shares(shares)


def test_overlay_covers_the_image_with_attention_relative_to_its_mean() -> None:
    grid = np.array([[0.01, 0.03], [0.02, 0.02]])
    axes = plot_overlay(Image.new("RGB", (60, 40), "white"), grid).axes
    veil = axes[1].images[1]
    shown = veil.get_array()
    assert shown is not None
    np.testing.assert_allclose(np.asarray(shown), grid / 0.02)
    assert tuple(veil.get_extent()) == (-0.5, 59.5, 39.5, -0.5)
    with pytest.raises(ValueError, match="expected \\(rows, columns\\)"):
        plot_overlay(Image.new("RGB", (6, 4)), [1.0, 2.0])


def test_results_show_every_seed_on_honest_axes() -> None:
    accuracy, vas, share = plot_results(ROWS).axes
    dots = [np.asarray(collection.get_offsets())[:, 0] for collection in accuracy.collections[1::2]]
    np.testing.assert_allclose(np.concatenate(dots), [30, 40, 60, 20, 40])
    assert accuracy.get_xlim()[0] == share.get_xlim()[0] == 0
    assert vas.get_xscale() == "log"
    assert plot_results(ROWS[:2]).axes[1].get_xscale() == "linear"
    assert plot_results(ROWS[:2]).axes[1].get_xlim()[0] == 0
    with pytest.raises(ValueError, match="rows is empty"):
        plot_results([])


def test_table_has_mean_and_sample_standard_deviation() -> None:
    lines = results_table(ROWS).splitlines()
    assert lines[2] == "| before | 1 | 30.0 | 3.0 | 70.0 |"
    assert lines[3] == "| plain | 2 | 50.0 ± 14.1 | 5.0 ± 1.4 | 85.0 ± 7.1 |"
    assert lines[4] == "| published | 2 | 30.0 ± 14.1 | 2.0e+09 ± 1.4e+09 | 100.0 ± 0.0 |"


def test_render_gives_pixels_of_the_figure_size() -> None:
    figure = plot_results(ROWS)
    pixels = render(figure)
    width, height = (figure.get_size_inches() * figure.dpi).astype(int)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (height, width, 3)
    assert pixels.std() > 5


def test_numbers_and_scale() -> None:
    assert [format_number(value) for value in (0.0, 0.948, 99.6, 10_000)] == ["0.00", "0.95", "100", "1e4"]
    assert not needs_log_scale([])
    assert needs_log_scale([1.0, 31.0, math.nan, math.inf])


def test_drawing_leaves_nothing_in_pyplot() -> None:
    render(plot_vas_map([[1.0]]))
    assert pyplot.get_fignums() == []


def test_missing_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_vas_map([[1.0]])


def outcome(accuracy: float, change: Difference) -> dict:
    vas = dict.fromkeys(("vas_ratio_of_means", "vas_ratio_of_means_response"), 2.0)
    undefined = {f"{name}_difference": Difference(math.nan, math.nan, math.nan, 0) for name in vas}
    return vas | undefined | {"accuracy": accuracy, "accuracy_difference": change}


BETTER, UNCERTAIN = Difference(0.1, 0.05, 0.2, 9), Difference(-0.02, -0.1, 0.06, 9)
OUTCOMES = {"unsteered": outcome(0.5, Difference(0, 0, 0, 9)), "a": outcome(0.6, BETTER), "b": outcome(0.48, UNCERTAIN)}


def test_the_table_of_interventions_marks_what_leaves_out_zero() -> None:
    lines = interventions_table(OUTCOMES).splitlines()
    assert lines[2].startswith("| unsteered | 50.0 |  | 2.0 |")
    assert lines[3].startswith("| a | 60.0 | +10.00 (+5.00 to +20.00) * | 2.0 | – |")
    assert lines[4].startswith("| b | 48.0 | -2.00 (-10.00 to +6.00) | 2.0 | – |")


def test_differences_are_drawn_with_their_intervals() -> None:
    axes = plot_differences(OUTCOMES).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    ends = [segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert ends == [pytest.approx([5, 20]), pytest.approx([-10, 6])]
    assert len({str(lines.get_color()) for lines in axes.collections}) == 2, "an interval that holds 0 is grey"
    with pytest.raises(ValueError, match="no steered setting"):
        plot_differences({"unsteered": OUTCOMES["unsteered"]})


def test_of_many_settings_the_largest_changes_are_drawn() -> None:
    many = {f"{n}": outcome(0.5, Difference(n / 1000, 0, 1, 9)) for n in range(100)}
    axes = plot_differences(OUTCOMES | many).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 60
    assert {"a", "99", "50"} <= set(names)
    assert "0" not in names


def test_a_sweep_is_a_heat_map_of_changes_around_the_unsteered_cell() -> None:
    rows = [
        {"mode": "mass", "image": 0.3, "system": 0.0} | OUTCOMES["a"],
        {"mode": "mass", "image": 0.0, "system": 0.4} | OUTCOMES["b"],
    ]
    axes = plot_sweep(rows, "accuracy", reference=0.5).axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[0, -2], [10, np.nan]], atol=1e-12)
    assert axes.images[0].norm.vmax == pytest.approx(10)
    assert {text.get_text() for text in axes.texts} == {"50.0", "60.0\n+10*", "48.0\n-2"}
    with pytest.raises(ValueError, match="rows is empty"):
        plot_sweep([], "accuracy", reference=0.5)
