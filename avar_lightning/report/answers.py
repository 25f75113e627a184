"""Parts of a report on what a run answered: completions while it learned, and answers under interventions."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from PIL import Image

from avar_lightning.report.interventions import plot_differences, plot_sweep
from avar_lightning.report.page import Part, Picture, Table, file_name, picture
from avar_lightning.report.runs import Run
from avar_lightning.report.steered import METRICS, UNSTEERED, Steered
from avar_lightning.report.together import written

MOST_ROWS, LONGEST = 8, 600
"""Completions of a prompt, and characters of each."""
SETTING_HEADINGS = {
    "accuracy": ("Accuracy (%)", 100.0),
    "vas_ratio_of_means": ("VAS of user tokens", 1.0),
    "vas_ratio_of_means_response": ("VAS of answers", 1.0),
}


def completions_part(run: Run, prefix: str) -> Part:
    """What the policy answered to one prompt at first and at last."""
    part = Part("Completions")
    for path, rows in run.completions:
        own = [row for row in rows if row.get("prompt") == rows[0].get("prompt")][:MOST_ROWS]
        if not own:
            part.notes.append(f"completions/{path.name} is empty.")
            continue
        numbers = [name for name, value in own[0].items() if isinstance(value, float)]
        caption = (
            f"“{_text(own[0].get('question'))}” Right answer: {_text(own[0].get('answer'))}. The first prompt of "
            f"completions/{path.name}."
        )
        table = [[_text(row.get("completion")), *(written(_number(row.get(name))) for name in numbers)] for row in own]
        part.tables.append(Table(["completion", *numbers], table, caption))
        if png := _thumbnail(path.parent, own[0].get("images")):
            told = f"The image of the first prompt of completions/{path.name}."
            part.pictures.append(Picture(file_name(f"{prefix}prompt_{path.stem}"), png, alt=told, caption=told))
    return part


def _thumbnail(folder: Path, names: Any) -> bytes | None:
    """The first image that a completion names, small; none where it is not to be had."""
    if not isinstance(names, list) or not names:
        return None
    buffer = io.BytesIO()
    try:
        # Only beside the file that names it, whatever the name is.
        with Image.open(folder / Path(str(names[0])).name) as image:
            small = image.convert("RGB")
        small.thumbnail((320, 320))
        small.save(buffer, format="PNG")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return buffer.getvalue()


def steered_part(steered: Steered, prefix: str) -> Part:
    """What interventions, or a sweep, did to the answers."""
    part = Part(f"Interventions: {steered.path.parent.name}/{steered.path.name}")
    rows = []
    for name, result in steered.results.items():
        cells = [name]
        for metric, (_, factor) in SETTING_HEADINGS.items():
            change = result[f"{metric}_difference"]
            interval = f" ({factor * change.low:+.2f} to {factor * change.high:+.2f})" + " *" * change.significant
            known = name != UNSTEERED and math.isfinite(change.mean)
            cells.append(written(factor * result[metric], percent=factor == 100))
            cells.append(f"{factor * change.mean:+.2f}{interval}" if known else "")
        rows.append(cells)
    headings = ["setting"]
    for heading, _ in SETTING_HEADINGS.values():
        headings += [heading, "change"]
    caption = "Change: mean paired difference with its 95 % bootstrap interval; a star where it leaves out 0."
    part.tables.append(Table(headings, rows, caption))
    steered_at_all = {name for name in steered.results if name != UNSTEERED}
    if steered_at_all:
        alt = "Change of accuracy and VAS under each setting, with intervals."
        figure = plot_differences(steered.results)
        part.pictures.append(
            picture(f"{prefix}differences", figure, alt=alt, caption=f"{caption} From {steered.path.name}.")
        )
    for metric in METRICS if steered.grid and UNSTEERED in steered.results else ():
        heading = SETTING_HEADINGS[metric][0]
        figure = plot_sweep(steered.grid, metric, reference=steered.results[UNSTEERED][metric], title=heading)
        told = f"{heading} at each pair of strengths, and its change; from {steered.path.name}."
        part.pictures.append(
            picture(f"{prefix}sweep_{metric}", figure, alt=f"Heat map of {heading} by strengths.", caption=told)
        )
    return part


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _text(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
