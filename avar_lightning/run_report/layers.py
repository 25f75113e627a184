"""VAS by layer and head, and attention by layer, of one run and of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from avar_lightning.report.attention import plot_shares_by_layer
from avar_lightning.report.maps import plot_map_change, plot_vas_map
from avar_lightning.run_report.courses import groups_of
from avar_lightning.run_report.measurements import QUERIES, Measured
from avar_lightning.run_report.page import Part
from avar_lightning.run_report.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE = "before training"


def maps_part(run: Run) -> Part:
    """VAS in every layer and head at the first and the last measurement, and what changed."""
    part = Part("Layers and heads")
    for query in QUERIES:
        drawn = [measured for measured in run.first_and_last if query in measured.maps]
        title = f"VAS of {query} tokens"
        told = f"{title} in every layer and head, mean over samples"
        if len({measured.maps[query].shape for measured in drawn}) == 1 < len(drawn):
            one, two = drawn
            figure = plot_map_change(
                one.maps[query], two.maps[query], layers=two.layers, names=(one.when, two.when), title=title
            )
            caption = f"{told}, and what changed; from {one.path.name} and {two.path.name}."
        elif drawn:
            only = drawn[-1]
            figure = plot_vas_map(only.maps[query], layers=only.layers, title=f"{title}, {only.when}")
            caption = f"{told}, from {only.path.name}."
        else:
            continue
        part.add(f"map_{query}", figure, alt=f"Heat map of {title} by layer and head.", caption=caption)
    return _or_nothing(part, [run])


def shares_part(run: Run) -> Part:
    """Attention on each role by layer, at the first and the last measurement."""
    part = Part("Attention by layer")
    for query in QUERIES:
        groups = {measured.when: [measured] for measured in run.first_and_last if query in measured.shares}
        if len({len(measured.layers) for (measured,) in groups.values()}) == 1:
            files = " and ".join(measured.path.name for (measured,) in groups.values())
            _add_shares(part, f"shares_{query}", groups, query, f"from {files}.")
    return _or_nothing(part, [run])


def compared_shares_part(runs: Sequence[Run]) -> Part:
    """Attention on each role by layer, at the last measurement of each run that was measured since training began."""
    part = Part("Attention by layer, after training")
    for query in QUERIES:
        by_depth: dict[int, list[Run]] = {}
        for run in runs:
            if query in run.measured[-1].shares if run.trained else False:
                by_depth.setdefault(len(run.measured[-1].layers), []).append(run)
        for depth, alike in by_depth.items():
            groups = {group: [run.measured[-1] for run in alike if run.group == group] for group in groups_of(alike)}
            before = [run.measured[0] for run in alike if run.measured[0].baseline and query in run.measured[0].shares]
            if len(before) == len(alike) > 1 and len({_same(measured, query) for measured in before}) == 1:
                groups[BEFORE] = before[:1]
            name = f"shares_{query}" + (f"_{depth}_layers" if len(by_depth) > 1 else "")
            told = "from the last vas/step_*.json of each run. Bands are standard deviations over the runs of a group."
            _add_shares(part, name, groups, query, told)
    if untrained := [run.name for run in runs if run.measured and not run.trained]:
        part.notes.append(f"Measured before training only, and left out here: {', '.join(untrained)}.")
    return _or_nothing(part, runs)


def _add_shares(part: Part, name: str, groups: Mapping[str, Sequence[Measured]], query: str, told: str) -> None:
    caption = f"Attention of {query} tokens on each role, mean over heads and samples, {told}"
    alt = f"Line charts of the attention of {query} tokens on each role by layer."
    part.add(name, _plot_shares(groups, query), alt=alt, caption=caption)


def _plot_shares(groups: Mapping[str, Sequence[Measured]], query: str) -> Figure:
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


def _or_nothing(part: Part, runs: Sequence[Run]) -> Part:
    if not part.pictures:
        files = " and ".join(measured.path.name for measured in runs[0].first_and_last if len(runs) == 1)
        part.notes.append(f"{files or 'The runs'} hold nothing of it: no sample has an image.")
    return part
