"""The part of a report that puts VAS against accuracy, over all checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from avar_lightning.report.correlation import spearman
from avar_lightning.report.page import Part, picture
from avar_lightning.report.relation import Point, correlation_text, plot_relation
from avar_lightning.report.runs import QUERIES, Measured, Run
from avar_lightning.report.together import BEFORE, SCORES, groups_of


def relations(runs: Sequence[Run], accuracy: str, prefix: str) -> Part:
    """VAS against accuracy over all checkpoints of all runs."""
    part = Part("VAS against accuracy")
    checkpoints = _checkpoints(runs, accuracy)
    if len(checkpoints) < 3:
        known = sorted({name for run in runs for measured in run.measured for name in measured.metrics})
        other = f" Measured were {', '.join(known)}; name another with --accuracy." if known else ""
        part.notes.append(f"{len(checkpoints)} checkpoints have VAS and {accuracy}; a scatter needs at least 3.{other}")
        return part
    values = [measured.metrics[accuracy] for _, measured in checkpoints]
    # Other metrics may be small without being parts of 1.
    percent = "acc" in accuracy and max(values) <= 1
    connect = len(groups_of(runs)) == len(runs)
    for query in QUERIES:
        for reduction, (heading, factor) in SCORES.items():
            points = [
                Point(factor * m.scores[query][reduction], (100 if percent else 1) * m.metrics[accuracy], group)
                for group, m in checkpoints
                if query in m.scores
            ]
            if sum(math.isfinite(point.x) for point in points) < 3:
                continue
            label = accuracy.removeprefix("val/").capitalize() + (" (%)" if percent else "")
            figure = plot_relation(points, x=heading.format(query), y=label, connect=connect)
            last = _of_last(runs, accuracy, query, reduction)
            caption = f"{len(points)} checkpoints of {len(runs)} runs, from vas/step_*.json.{last}"
            alt = f"Scatter of {heading.format(query)} against {label}."
            part.pictures.append(picture(f"{prefix}relation_{query}_{reduction}", figure, alt=alt, caption=caption))
    part.notes.append(
        "Checkpoints of one run, and runs from one base, are not independent, so that intervals over them are too "
        "narrow. A base that several runs started from counts once."
    )
    return part


def _of_last(runs: Sequence[Run], accuracy: str, query: str, reduction: str) -> str:
    """The correlation over the last checkpoints alone, in a sentence."""
    last = [run.measured[-1] for run in runs if run.measured and query in run.measured[-1].scores]
    pairs = [(m.scores[query][reduction], m.metrics.get(accuracy, math.nan)) for m in last]
    rank = spearman([x for x, _ in pairs], [y for _, y in pairs])
    if rank.n < 4 or not math.isfinite(rank.r):
        return ""
    return f" Of the last checkpoint of each run alone: {correlation_text('Spearman ρ', rank)}, n = {rank.n}."


def _checkpoints(runs: Sequence[Run], accuracy: str) -> list[tuple[str, Measured]]:
    """Group and measurement of every checkpoint; a base that several runs started from is a group of its own."""
    known = [(run, m) for run in runs for m in run.measured if math.isfinite(m.metrics.get(accuracy, math.nan))]
    bases = Counter(_base(measured) for _, measured in known if measured.baseline)
    own = [(run.group, m) for run, m in known if not m.baseline or bases[_base(m)] == 1]
    shared = {_base(m): (BEFORE, m) for _, m in known if m.baseline and bases[_base(m)] > 1}
    return own + list(shared.values())


def _base(measured: Measured) -> tuple[object, ...]:
    """By this a base is known again, whatever its folder is called; by more digits rounding would tell it apart."""
    metrics = [measured.metrics.get(name, math.nan) for name in ("val/accuracy", "val/loss")]
    shares = [scores["share"] for scores in measured.scores.values()]
    return measured.num_samples, *(f"{value:.4g}" for value in [*metrics, *shares])
