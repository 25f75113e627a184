"""Parts of a report that put all runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from avar_lightning.report.attention import plot_shares_by_layer
from avar_lightning.report.curves import Curve, Panel, plot_curves
from avar_lightning.report.figure import format_number
from avar_lightning.report.page import Part, Table, picture
from avar_lightning.report.runs import QUERIES, Measured, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "val/accuracy": ("Accuracy (%)", 100.0),
    "val/vas": ("VAS, user", 1.0),
    "val/vas_ratio_of_means": ("VAS, user, ratio of means", 1.0),
    "val/vas_ratio_of_means_response": ("VAS, response, ratio of means", 1.0),
    "val/image_share_response": ("Image share, response (%)", 100.0),
    "val/loss": ("Validation loss", 1.0),
    "reward/total": ("Reward", 1.0),
    "rollout/vas": ("VAS, rollouts", 1.0),
}
"""Metric → heading, factor to the shown unit; those that no run has are left out."""
BEFORE = "before training"
SCORES = {
    "mean_of_ratios": ("VAS, {}, mean of ratios", 1.0),
    "ratio_of_means": ("VAS, {}, ratio of means", 1.0),
    "share": ("Image share, {} (%)", 100.0),
}
TRAINING = {
    "train/loss": ("Training loss", 1.0),
    "val/loss": ("Validation loss", 1.0),
    "reward/total": ("Reward", 1.0),
    "reward/accuracy": ("Accuracy of rollouts (%)", 100.0),
    "reward/format": ("Format of rollouts (%)", 100.0),
    "rollout/vas": ("VAS of rollouts", 1.0),
}


def figures_table(runs: Sequence[Run]) -> Part:
    """First and last figures of every run."""
    ends = [run.ends() for run in runs]
    known = {name for pair in ends for metrics in pair for name in metrics}
    columns = {name: of for name, of in COLUMNS.items() if name in known}
    rows = []
    for run, (before, after) in zip(runs, ends, strict=True):
        cells = [_from_to(before.get(name), after.get(name), factor) for name, (_, factor) in columns.items()]
        rows.append([run.name, _steps(run), *cells])
    caption = (
        "Before → after training, from vas/step_*.json (first and last) and summary.json; – is not known. VAS, user, "
        "is the number that VASCallback logs as val/vas, in its own reduction."
    )
    headings = ["run", "steps", *(heading for heading, _ in columns.values())]
    return Part("First and last figures", tables=[Table(headings, rows, caption)])


def vas_by_step(runs: Sequence[Run], prefix: str) -> Part:
    """VAS and accuracy of all runs by step."""
    styles = _styles(runs)
    panels = []
    for query in QUERIES:
        for reduction, (heading, factor) in SCORES.items():
            values = {
                run.name: {m.step: m.scores[query][reduction] for m in run.measured if query in m.scores}
                for run in runs
            }
            panels.append(_panel(runs, values, styles, heading.format(query), factor, baseline=True))
    accuracy = {run.name: {m.step: m.metrics.get("val/accuracy", math.nan) for m in run.measured} for run in runs}
    panels.append(_panel(runs, accuracy, styles, "Accuracy (%)", 100.0, baseline=True))
    part = Part("VAS by step")
    if not (panels := _with_values(panels)):
        part.notes.append("No run has a measurement of VASCallback, so there is no VAS to show.")
        return part
    caption = (
        "Every vas/step_*.json of every run; a ring marks what was measured before training. "
        f"{_colours(runs)} Axes are logarithmic where values span a factor over 30."
    )
    alt = f"Line charts of VAS, image share and accuracy by training step, for {len(runs)} runs."
    figure = plot_curves(panels, shared_legend=True)
    part.pictures.append(picture(f"{prefix}vas_by_step", figure, alt=alt, caption=caption))
    return part


def training(runs: Sequence[Run], prefix: str) -> Part:
    """Losses and rewards of all runs by step."""
    styles = _styles(runs)
    panels = [
        _panel(
            runs, {run.name: run.events.scalars.get(tag, {}) for run in runs}, styles, heading, factor, baseline=False
        )
        for tag, (heading, factor) in TRAINING.items()
    ]
    part = Part("Training")
    if not (panels := _with_values(panels)):
        part.notes.append("No run has TensorBoard events with losses or rewards.")
        return part
    caption = (
        "From the event files of every run. Of a long curve the faint line is what was logged, the other its running "
        f"mean over a thirtieth of it. {_colours(runs)}"
    )
    alt = f"Line charts of losses and rewards by training step, for {len(runs)} runs."
    figure = plot_curves(panels, shared_legend=True)
    part.pictures.append(picture(f"{prefix}training", figure, alt=alt, caption=caption))
    return part


def shares(runs: Sequence[Run], prefix: str) -> Part:
    """Attention of the last measurement of all runs by layer."""
    part = Part("Attention by layer, after training")
    for query in QUERIES:
        by_depth: dict[int, list[Run]] = {}
        for run in runs:
            if run.measured and query in run.measured[-1].shares:
                by_depth.setdefault(len(run.measured[-1].layers), []).append(run)
        for depth, alike in by_depth.items():
            groups = {group: [run.measured[-1] for run in alike if run.group == group] for group in groups_of(alike)}
            before = [run.measured[0] for run in alike if run.measured[0].baseline and query in run.measured[0].shares]
            if len(before) == len(alike) > 1 and len({_same(m, query) for m in before}) == 1:
                groups[BEFORE] = before[:1]
            figure = plot_layers(groups, query)
            caption = (
                f"Attention of {query} tokens on each role, mean over heads and samples, from the last vas/step_*.json "
                "of each run. Bands are standard deviations over the runs of a group."
            )
            alt = f"Line charts of the attention of {query} tokens on system, user and image tokens by layer."
            name = f"{prefix}shares_{query}" + (f"_{depth}_layers" if len(by_depth) > 1 else "")
            part.pictures.append(picture(name, figure, alt=alt, caption=caption))
    if not part.pictures:
        part.notes.append("No run has shares of attention by layer.")
    return part


def plot_layers(groups: Mapping[str, Sequence[Measured]], query: str) -> Figure:
    """Shares by layer of measurements of models with as many layers; of the response, on itself too."""
    measured = [m for own in groups.values() for m in own]
    roles = [role for role in ("system", "user", "image", "response") if all(role in m.shares[query] for m in measured)]
    if not any(np.any(m.shares[query].get("response", 0)) for m in measured):
        roles = [role for role in roles if role != "response"]
    stacked = {
        name: {role: np.stack([m.shares[query][role] for m in own]) for role in roles} for name, own in groups.items()
    }
    return plot_shares_by_layer(stacked, layers=measured[0].layers, roles=roles, title=f"Where {query} tokens attend")


def _same(measured: Measured, query: str) -> tuple[float, ...]:
    return tuple(np.round(np.concatenate(list(measured.shares[query].values())), 6))


def groups_of(runs: Sequence[Run]) -> list[str]:
    """The groups of runs, each once."""
    return list(dict.fromkeys(run.group for run in runs))


def _styles(runs: Sequence[Run]) -> dict[str, int]:
    return {group: number for number, group in enumerate(groups_of(runs))}


def _colours(runs: Sequence[Run]) -> str:
    return "Runs of one folder share a colour." if len(groups_of(runs)) < len(runs) else ""


def _panel(
    runs: Sequence[Run],
    values: Mapping[str, Mapping[int, float]],
    styles: Mapping[str, int],
    heading: str,
    factor: float,
    *,
    baseline: bool,
) -> Panel:
    curves = [
        Curve(
            run.group, values[run.name], styles[run.group], baseline and bool(run.measured and run.measured[0].baseline)
        )
        for run in runs
        if values[run.name]
    ]
    return Panel(heading, curves, factor)


def _with_values(panels: Sequence[Panel]) -> list[Panel]:
    return [panel for panel in panels if any(math.isfinite(v) for c in panel.curves for v in c.values.values())]


def _steps(run: Run) -> str:
    steps = [measured.step for measured in run.measured]
    if not steps and (logged := [step for values in run.events.scalars.values() for step in values]):
        steps = [min(logged), max(logged)]
    return "–" if not steps else f"{steps[0]} → {steps[-1]}" if steps[0] != steps[-1] else str(steps[0])


def _from_to(before: float | None, after: float | None, factor: float) -> str:
    cells = [None if value is None else factor * value for value in (before, after)]
    if cells[1] is None or cells[0] is None:
        return written(cells[1] if cells[0] is None else cells[0], percent=factor == 100.0)
    return " → ".join(written(cell, percent=factor == 100.0) for cell in cells)


def written(value: float | None, *, percent: bool = False) -> str:
    """A number of a table.

    >>> written(0.5), written(None), written(61.04, percent=True), written(-2.25)
    ('0.50', '–', '61.0', '-2.2')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if percent else ("-" if value < 0 else "") + format_number(abs(value))
