"""The section of a report on one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from avar_lightning.report.answers import completions_part, steered_part
from avar_lightning.report.attention import plot_vas_map
from avar_lightning.report.curves import Curve, Panel, plot_curves
from avar_lightning.report.events import event_files
from avar_lightning.report.maps import plot_map_change
from avar_lightning.report.overlays import overlay_part
from avar_lightning.report.page import Part, Section, Table, picture
from avar_lightning.report.runs import QUERIES, Measured, Run
from avar_lightning.report.together import plot_layers, written

REDUCED = {
    "mean_of_ratios": ("VAS, mean of ratios (the paper's)", 1.0),
    "ratio_of_means": ("VAS, ratio of means", 1.0),
    "median": ("VAS, median", 1.0),
    "share": ("Image share (%)", 100.0),
}
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
"""Heading, tags and factor of each small picture of the training; other losses and rewards come after them."""
LONGEST = 300
"""Characters of a fact of the configuration."""


def describe(run: Run, prefix: str, *, overlays: int) -> Section:
    """Everything that is known of a run.

    Args:
        run: The run.
        prefix: Of its pictures' names.
        overlays: Most samples whose attention on the image is shown.
    """
    section = Section(run.name, list(_facts(run)), list(run.problems))
    if run.measured:
        section.parts += [_vas(run, prefix), *_by_layer(run, prefix)]
        section.parts.append(overlay_part(run, prefix, most=overlays))
    if run.events.scalars:
        section.parts.insert(1, _training(run, prefix))
    elif event_files(run.path):
        section.notes.append("The event files hold no numbers yet.")
    section.parts += [completions_part(run, prefix)] if run.completions else []
    section.parts += [steered_part(steered, f"{prefix}{number}_") for number, steered in enumerate(run.steered)]
    return section


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield "from", run.given
    model = _arguments(run.config, "model")
    found = {
        "model": _arguments(model, "vlm").get("pretrained") or (run.measured[-1].model if run.measured else None),
        "seed": run.config.get("seed_everything"),
        "data": _arguments(run.config, "data").get("train") or _arguments(run.config, "data").get("style"),
        "steps": run.summary.get("steps"),
        "seconds": run.summary.get("seconds"),
    }
    guidance, visual = model.get("guidance"), model.get("visual")
    if isinstance(guidance, dict) and guidance.get("form"):
        found["guidance"] = (
            f"{guidance['form']}, queries {guidance.get('queries')}, layers {guidance.get('layers') or 'all'}"
        )
    if isinstance(visual, dict) and visual.get("transform"):
        found["visual reward"] = f"{visual['transform']}, weight {visual.get('weight')}"
    if run.measured:
        last = run.measured[-1]
        found["measured"] = f"{len(run.measured)} times, the last at step {last.step} on {last.num_samples} samples"
    for name, value in found.items():
        if value is not None:
            yield name, f"{value:.5g}" if isinstance(value, float) else str(value)[:LONGEST]


def _arguments(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a part of LightningCLI's configuration is built with, whether or not its class is named."""
    value = config.get(key)
    inner = value.get("init_args", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _vas(run: Run, prefix: str) -> Part:
    part = Part("VAS by step")
    first, last = run.measured[0], run.measured[-1]
    queries = [query for query in QUERIES if query in first.scores or query in last.scores]
    if len(run.measured) == 1:
        part.notes.append(f"There is one measurement only, of step {last.step}: no course of it, and no change.")
        rows = [
            [
                query,
                *(
                    written(factor * last.scores[query][name], percent=factor == 100)
                    for name, (_, factor) in REDUCED.items()
                ),
            ]
            for query in queries
        ]
        headings = ["tokens", *(heading for heading, _ in REDUCED.values())]
        part.tables.append(Table(headings, rows, f"Means over samples, from {last.path.name}."))
        return part
    panels = []
    for reduction, (heading, factor) in REDUCED.items():
        curves = [
            Curve(
                f"{query} tokens",
                {m.step: m.scores[query][reduction] for m in run.measured if query in m.scores},
                style,
                first.baseline,
            )
            for style, query in enumerate(queries)
        ]
        if any(math.isfinite(value) for curve in curves for value in curve.values.values()):
            panels.append(Panel(heading, curves, factor))
    if not panels:
        part.notes.append("VAS is undefined at every step: no sample has image, system and query tokens at once.")
        return part
    ring = "; the ring is the baseline, before training" if first.baseline else "; there is no baseline"
    caption = f"Means over samples, from {first.path.name} to {last.path.name} ({len(run.measured)} files){ring}."
    alt = f"Line charts of VAS by step, from step {first.step} to {last.step}."
    part.pictures.append(picture(f"{prefix}vas_by_step", plot_curves(panels), alt=alt, caption=caption))
    return part


def _training(run: Run, prefix: str) -> Part:
    scalars, panels, part = run.events.scalars, [], Part("Training")
    shown = {tag for _, tags, _ in FAMILIES for tag in tags}
    others = [tag for tag in scalars if tag not in shown and ("loss" in tag or tag.startswith("reward/"))]
    more = [(tag, (tag,), 1.0) for tag in others[:6]]
    for heading, tags, factor in [*FAMILIES, *more]:
        curves = [Curve(tag, scalars[tag], style) for style, tag in enumerate(tag for tag in tags if tag in scalars)]
        for curve in curves:
            lost = [step for step, value in curve.values.items() if not math.isfinite(value)]
            if lost:
                part.notes.append(
                    f"{curve.name} is not finite at {len(lost)} of {len(curve.values)} steps, first at {lost[0]}."
                )
        if any(math.isfinite(value) for curve in curves for value in curve.values.values()):
            panels.append(Panel(heading, curves, factor))
    if not panels:
        part.notes.append("The event files hold no losses or rewards.")
        return part
    caption = (
        "From the event files. Of a curve of more than 40 values the faint line is what was logged, the other its "
        "running mean over a thirtieth of it."
    )
    alt = f"Line charts by step of {', '.join(panel.heading for panel in panels)}."
    part.pictures.append(picture(f"{prefix}training", plot_curves(panels), alt=alt, caption=caption))
    return part


def _by_layer(run: Run, prefix: str) -> Iterator[Part]:
    ends = run.first_and_last
    names = [_when(measured) for measured in ends]
    files = " and ".join(measured.path.name for measured in ends)
    maps, shares = Part("Layers and heads"), Part("Attention by layer")
    for query in QUERIES:
        drawn = [(name, m) for name, m in zip(names, ends, strict=True) if query in m.maps]
        title = f"VAS of {query} tokens"
        if len(drawn) == 2 and drawn[0][1].maps[query].shape == drawn[1][1].maps[query].shape:
            (one, before), (two, after) = drawn
            figure = plot_map_change(
                before.maps[query], after.maps[query], layers=after.layers, names=(one, two), title=title
            )
            caption = f"{title} in every layer and head, mean over samples, and what changed; from {files}."
        elif drawn:
            name, only = drawn[-1]
            figure = plot_vas_map(only.maps[query], layers=only.layers, title=f"{title}, {name}")
            caption = f"{title} in every layer and head, mean over samples, from {only.path.name}."
        else:
            continue
        alt = f"Heat map of {title} by layer and head."
        maps.pictures.append(picture(f"{prefix}map_{query}", figure, alt=alt, caption=caption))
    for query in QUERIES:
        groups = {name: [m] for name, m in zip(names, ends, strict=True) if query in m.shares}
        if groups and len({len(m.layers) for (m,) in groups.values()}) == 1:
            caption = f"Attention of {query} tokens on each role, mean over heads and samples; from {files}."
            alt = f"Line charts of the attention of {query} tokens on each role by layer."
            figure = plot_layers(groups, query)
            shares.pictures.append(picture(f"{prefix}shares_{query}", figure, alt=alt, caption=caption))
    for part in (maps, shares):
        if not part.pictures:
            part.notes.append(f"{files} hold nothing of it: no sample has an image.")
        yield part


def _when(measured: Measured) -> str:
    return f"step {measured.step}" + (" (baseline)" if measured.baseline else "")
