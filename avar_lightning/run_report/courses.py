"""VAS, losses and rewards by step, of one run or of several in the same pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from avar_lightning.report.curves import Curve, Panel, plot_curves
from avar_lightning.run_report.figures import written
from avar_lightning.run_report.measurements import QUERIES, Measured
from avar_lightning.run_report.page import Part, Table
from avar_lightning.run_report.runs import Run

SCORES = {
    "mean_of_ratios": ("VAS, {}, mean of ratios", 1.0),
    "ratio_of_means": ("VAS, {}, ratio of means", 1.0),
    "median": ("VAS, {}, median", 1.0),
    "share": ("Image share, {} (%)", 100.0),
}
"""Reduction → heading, factor to the shown unit."""
FAMILIES: list[tuple[str, tuple[str, ...], float]] = [
    ("Loss", ("train/loss", "train/loss_lm", "val/loss"), 1.0),
    ("Guidance losses", ("train/loss_enhance_img", "train/loss_suppress_sys", "train/loss_share"), 1.0),
    ("Guided attention (%)", ("train/mass_image", "train/mass_system", "train/image_share"), 100.0),
    ("VAS while training", ("train/vas_ratio_of_means", "rollout/vas"), 1.0),
    ("Rewards", ("reward/total", "reward/visual"), 1.0),
    ("Right and well-formed rollouts (%)", ("reward/accuracy", "reward/format"), 100.0),
    ("Rollouts (%)", ("rollout/truncated", "rollout/empty", "rollout/groups_without_variance"), 100.0),
    ("Length of rollouts (tokens)", ("rollout/length",), 1.0),
    ("Policy", ("train/entropy", "train/kl", "train/clip_fraction_low", "train/clip_fraction_high"), 1.0),
    ("Accuracy (%)", ("val/accuracy",), 100.0),
]
"""Heading, tags and factor of each panel of a run's training; its other losses and rewards come after them."""
COMPARED = {
    "train/loss": ("Training loss", 1.0),
    "val/loss": ("Validation loss", 1.0),
    "reward/total": ("Reward", 1.0),
    "reward/accuracy": ("Accuracy of rollouts (%)", 100.0),
    "reward/format": ("Format of rollouts (%)", 100.0),
    "rollout/vas": ("VAS of rollouts", 1.0),
}
"""Tag → heading and factor of each panel of the training of several runs."""
NOISE = (
    "Of a curve of more than 40 values the faint line is what was logged, the other its running mean over a thirtieth "
    "of it; where values are not finite there is a gap."
)


def vas_part(runs: Sequence[Run]) -> Part:
    """VAS and accuracy by step; of a run with one measurement, a table of it."""
    part = Part("VAS by step")
    if len(runs) == 1 and len(runs[0].measured) == 1:
        (only,) = runs[0].measured
        part.notes.append(f"There is one measurement only, {only.when}: no course of it, and no change.")
        part.tables.append(_table(only))
        return part

    def panel(heading: str, factor: float, value: Callable[[Measured], float | None]) -> Panel:
        return Panel(heading, [_course(run, value) for run in runs], factor)

    panels = [
        panel(heading.format(query), factor, _score(query, reduction))
        for query in QUERIES
        for reduction, (heading, factor) in SCORES.items()
    ]
    panels.append(panel("Accuracy (%)", 100.0, lambda m: m.metrics.get("val/accuracy")))
    caption = (
        f"Means over samples, from {sum(len(run.measured) for run in runs)} vas/step_*.json; a ring marks what was "
        f"measured before training, a gap what is undefined.{_colours(runs)} Axes are logarithmic where values span a "
        "factor over 30."
    )
    nothing = "There is no VAS: nothing was measured, or no sample has image, system and query tokens at once."
    return _drawn(part, "vas_by_step", panels, caption, nothing=nothing, shared=True)


def _score(query: str, reduction: str) -> Callable[[Measured], float | None]:
    return lambda measured: measured.scores.get(query, {}).get(reduction)


def _table(only: Measured) -> Table:
    rows = [
        [query, *(written(factor * scores[name], percent=factor == 100) for name, (_, factor) in SCORES.items())]
        for query, scores in only.scores.items()
    ]
    headings = [heading.replace(" {},", "").replace(", {}", "") for heading, _ in SCORES.values()]
    return Table(["tokens", *headings], rows, f"Means over samples, from {only.path.name}.")


def _course(run: Run, of: Callable[[Measured], float | None]) -> Curve:
    values = {m.step: value for m in run.measured if (value := of(m)) is not None}
    baselines = [m.step for m in run.measured if m.baseline]
    return Curve(run.group, values, run.style, bool(baselines) and next(iter(values), None) == baselines[0])


def compared_part(runs: Sequence[Run]) -> Part:
    """Losses and rewards of several runs by step."""
    panels = [
        Panel(heading, [Curve(run.group, run.events.scalars.get(tag, {}), run.style) for run in runs], factor)
        for tag, (heading, factor) in COMPARED.items()
    ]
    caption = f"From the event files of every run. {NOISE}{_colours(runs)}"
    nothing = "No run has TensorBoard events with losses or rewards."
    return _drawn(Part("Training"), "training", panels, caption, nothing=nothing, shared=True)


def training_part(run: Run) -> Part:
    """Everything of a run's training that is a loss, a reward or known by name."""
    scalars, part = run.events.scalars, Part("Training")
    named = {tag for _, tags, _ in FAMILIES for tag in tags}
    others = [tag for tag in scalars if tag not in named and ("loss" in tag or tag.startswith("reward/"))]
    panels = [
        Panel(heading, [Curve(tag, scalars[tag], n) for n, tag in enumerate(t for t in tags if t in scalars)], factor)
        for heading, tags, factor in [*FAMILIES, *((tag, (tag,), 1.0) for tag in others[:6])]
    ]
    for curve in (curve for panel in panels for curve in panel.curves):
        lost = [step for step, value in curve.values.items() if not math.isfinite(value)]
        if lost:
            told = f"{curve.name} is not finite at {len(lost)} of {len(curve.values)} steps, first at {lost[0]}."
            part.notes.append(told)
    nothing = "The event files hold no losses or rewards."
    return _drawn(part, "training", panels, f"From the event files. {NOISE}", nothing=nothing)


def _drawn(part: Part, name: str, panels: list[Panel], caption: str, *, nothing: str, shared: bool = False) -> Part:
    panels = [panel for panel in panels if panel.known]
    if panels:
        alt = f"Line charts by training step of {', '.join(panel.heading for panel in panels)}."
        part.add(name, plot_curves(panels, shared_legend=shared), alt=alt, caption=caption)
    else:
        part.notes.append(nothing)
    return part


def groups_of(runs: Sequence[Run]) -> list[str]:
    """The groups of runs, each once."""
    return list(dict.fromkeys(run.group for run in runs))


def _colours(runs: Sequence[Run]) -> str:
    return " Runs of one folder share a colour." if len(groups_of(runs)) < len(runs) else ""
