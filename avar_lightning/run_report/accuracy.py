"""VAS against accuracy, over all checkpoints of all runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from avar_lightning.report.correlation import spearman
from avar_lightning.report.relation import Point, correlation_text, plot_relation
from avar_lightning.run_report.courses import SCORES, groups_of
from avar_lightning.run_report.layers import BEFORE
from avar_lightning.run_report.measurements import QUERIES, Measured
from avar_lightning.run_report.page import Part
from avar_lightning.run_report.runs import Run


def accuracy_part(runs: Sequence[Run], accuracy: str) -> Part:
    """A scatter for each query set and reduction, the median aside."""
    part = Part("VAS against accuracy")
    checkpoints = _checkpoints(runs, accuracy)
    if len(checkpoints) < 3:
        known = sorted({name for run in runs for measured in run.measured for name in measured.metrics})
        other = f" Measured were {', '.join(known)}; name another with --accuracy." if known else ""
        part.notes.append(f"{len(checkpoints)} checkpoints have VAS and {accuracy}; a scatter needs at least 3.{other}")
        return part
    # Other metrics may be small without being parts of 1.
    percent = "acc" in accuracy and max(measured.metrics[accuracy] for _, measured in checkpoints) <= 1
    label = accuracy.removeprefix("val/").capitalize() + (" (%)" if percent else "")
    for query, reduction in ((query, reduction) for query in QUERIES for reduction in SCORES if reduction != "median"):
        heading, factor = SCORES[reduction][0].format(query), SCORES[reduction][1]
        points = [
            Point(factor * m.scores[query][reduction], (100 if percent else 1) * m.metrics[accuracy], group)
            for group, m in checkpoints
            if query in m.scores
        ]
        if sum(math.isfinite(point.x) for point in points) >= 3:
            figure = plot_relation(points, x=heading, y=label, connect=len(groups_of(runs)) == len(runs))
            last = _of_last(runs, accuracy, query, reduction)
            caption = (
                f"{len(points)} checkpoints of {len(runs)} run{'s' * (len(runs) != 1)}, from vas/step_*.json.{last}"
            )
            part.add(f"relation_{query}_{reduction}", figure, alt=f"Scatter of {heading}, {label}.", caption=caption)
    part.notes.append(
        "Checkpoints of one run, and runs from one base, are not independent, so that intervals over them are too "
        "narrow. A base that several runs started from counts once."
    )
    return part


def _of_last(runs: Sequence[Run], accuracy: str, query: str, reduction: str) -> str:
    """The correlation over the last checkpoints alone, in a sentence."""
    last = [measured for run in runs for measured in run.trained[-1:] if query in measured.scores]
    rank = spearman([m.scores[query][reduction] for m in last], [m.metrics.get(accuracy, math.nan) for m in last])
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
