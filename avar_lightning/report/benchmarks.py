"""An evaluation on benchmarks: beside the paper's rows, in detail, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avar_lightning.report.figure import format_number, needs_log_scale, new_figure
from avar_lightning.report.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VAS = {"vas": "VAS", "vas_ratio_of_means": "VAS, ratio of means"}
LINES = {"Qwen2.5-VL-7B": ("#999999", "s"), "AVAR-Thinker": ("#D55E00", "D")}
"""Published rows that the picture shows, with colour and marker."""


def benchmarks_table(
    *,
    name: str,
    columns: Mapping[str, str],
    own: Mapping[str, Any],
    partly: Collection[str],
    unread: Mapping[str, int],
    vas: Any,
    vas_partly: bool,
    published: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Mapping[str, str]],
) -> str:
    """Write a model's accuracies as a Markdown table beside published ones, in percent.

    Args:
        name: Of the model.
        columns: Name to heading.
        own: The model's accuracies by column, and perhaps their `average`, as `evaluation.Interval`.
        partly: Those for which only some questions were answered.
        unread: By column, answers that nobody could read.
        vas: On MathVista, where it was evaluated; else None.
        vas_partly: Whether on some of its questions only.
        published: Rows with `model`, `accuracy`, `average`, `vas`, `source`, `vas_source`, and perhaps a `note`.
        sources: Of these rows, `address` and `what` it is.
    """
    marks = {column: " *" * (column in partly) for column in own}
    marks |= {
        column: marks[column] + f", {unread[column]} unread"
        for column in columns
        if own.keys() & {column} and unread[column]
    }
    cells = [_percent(own[column]) + marks[column] if column in own else "–" for column in (*columns, "average")]
    cells.append("–" if vas is None else _vas(vas) + " *" * vas_partly)
    rows = [[f"**{_escaped(name)}** (here)", *cells]]
    notes: list[str] = []
    for row in published:
        mark = ""
        if row.get("note"):
            notes.append(f"[{len(notes) + 1}] {row['model']}: {row['note']}.")
            mark = f" [{len(notes)}]"
        values = [_value(row["accuracy"].get(column)) for column in columns]
        rows.append([row["model"] + mark, *values, _value(row["average"]), _value(row["vas"])])
    told = [
        "Accuracy in percent, here with its 95 % bootstrap interval. The other rows report arXiv 2603.03825, which has "
        "prompts, image sizes, lengths and a judge of its own. MMMU-Pro is the mean of its ten-option part and its "
        "vision part; the paper measures VAS on 200 samples of MathVista."
    ]
    if any(unread[column] for column in columns if column in own):
        told.append("Unread: neither rules nor a judge found an answer in them; they count as wrong.")
    if partly or vas_partly:
        told.append("\\* of a part of the benchmark's questions only.")
    table = markdown_table(["model", *columns.values(), "Average", "VAS on MathVista"], rows)
    return "\n\n".join([table, " ".join([*told, *notes]), _sources(published, sources)])


def _sources(published: Sequence[Mapping[str, Any]], sources: Mapping[str, Mapping[str, str]]) -> str:
    """Where published rows are from, one line a source."""
    parts = []
    for name, source in sources.items():
        rows = [row["model"] for row in published if row["source"] == name]
        rows += [f"VAS of {row['model']}" for row in published if row.get("vas_source") == name]
        parts.append(f"- {', '.join(rows)}: {source['what']}, <{source['address']}>")
    return "\n".join(parts)


def figures_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write every figure of every benchmark with its 95 % interval, VAS, and who read the answers.

    Args:
        results: By benchmark `title`, `num_questions`, `num_samples`, `num_cut`, `extracted_by`, `metrics`, `vas` and
            `categories`.
    """
    answers = "answers read by rules, judge, nobody"
    rows = []
    for result in results.values():
        by = ", ".join(str(number) for number in result["extracted_by"].values())
        start = [result["title"], f"{result['num_samples']} of {result['num_questions']}"]
        vas = [_vas(result["vas"][name]) for name in VAS]
        cut = f"{result['num_cut']} ({100 * result['num_cut'] / result['num_samples']:.1f} %)"
        for metric, interval in result["metrics"].items():
            rows.append([*start, metric, _percent(interval), *vas, by, cut])
            start, vas, by, cut = ["", ""], [""] * len(VAS), "", ""
    return markdown_table(["benchmark", "samples", "figure", "%", *VAS.values(), answers, "cut before their end"], rows)


def categories_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the first figure and VAS by category, a table for each kind of category."""
    parts = []
    for result in results.values():
        for column, values in result["categories"].items():
            rows = []
            for value, part in values.items():
                first = next(iter(part["metrics"].values()))
                vas = [_vas(part["vas"][name]) for name in VAS]
                rows.append([_escaped(value), str(part["num_samples"]), _percent(first), *vas])
            parts += [f"{result['title']} by {column}", markdown_table([column, "samples", "%", *VAS.values()], rows)]
    return "\n\n".join(parts)


def plot_benchmarks(
    results: Mapping[str, Mapping[str, Any]],
    *,
    comparable: Collection[str],
    published: Sequence[Mapping[str, Any]],
) -> Figure:
    """Draw the first figure of each benchmark with its interval beside the paper's, and VAS.

    Args:
        results: As for `figures_table`.
        comparable: Benchmarks that are a published column by themselves.
        published: As for `benchmarks_table`; the rows of `LINES` are drawn.
    """
    with new_figure(10.0, 1.6 + 0.42 * len(results)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for row, (name, result) in enumerate(results.items()):
            _interval(left, row, next(iter(result["metrics"].values())), 100.0, "this model" if not row else "")
            _interval(right, row, result["vas"]["vas"], 1.0, "")
            for line in (line for line in published if line["model"] in LINES and name in comparable):
                colour, marker = LINES[line["model"]]
                if name in line["accuracy"]:
                    left.plot([line["accuracy"][name]], [row], marker, color=colour, markersize=5, zorder=2)
        for model, (colour, marker) in LINES.items():
            left.plot([], [], marker, color=colour, markersize=5, label=f"{model} (published)")
        left.set_yticks(range(len(results)), [result["title"] for result in results.values()])
        left.set_ylim(len(results) - 0.5, -0.5)
        left.set(title="Accuracy (%)")
        right.set(title="VAS of user tokens")
        if needs_log_scale([result["vas"]["vas"].value for result in results.values()]):
            right.set_xscale("log")
        for axes in (left, right):
            axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
            axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle("bars: 95 % bootstrap intervals", x=0.99, ha="right", fontsize=9)
    return figure


def _interval(axes: Axes, row: int, interval: Any, factor: float, label: str) -> None:
    if math.isfinite(interval.value):
        axes.hlines(row, factor * interval.low, factor * interval.high, color="#0072B2", linewidth=4, alpha=0.4)
        axes.plot([factor * interval.value], [row], "o", color="#0072B2", markersize=6, label=label or None, zorder=3)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _value(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _percent(interval: Any) -> str:
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _vas(interval: Any) -> str:
    if not math.isfinite(interval.value):
        return "–"
    return f"{format_number(interval.value)} ({format_number(interval.low)} to {format_number(interval.high)})"
