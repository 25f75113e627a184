"""What the policy of a GRPO run answered to one prompt, at first and at last."""

from __future__ import annotations

import io
import math
from typing import Any

from avar_lightning.run_report.figures import written
from avar_lightning.run_report.overlays import read_image
from avar_lightning.run_report.page import Part, Table
from avar_lightning.run_report.runs import Run

MOST_ROWS, LONGEST = 8, 600
"""Completions of a prompt, and characters of each."""


def completions_part(run: Run) -> Part:
    """The completions of the first prompt of the first and the last file, with each part of the reward."""
    part = Part("Completions")
    for path, rows in run.completions:
        own = [row for row in rows if row.get("prompt") == rows[0].get("prompt")][:MOST_ROWS]
        if not own:
            part.notes.append(f"completions/{path.name} is empty.")
            continue
        numbers = [name for name, value in own[0].items() if isinstance(value, float)]
        told = f"first prompt of completions/{path.name}."
        caption = f"“{_text(own[0].get('question'))}” Right answer: {_text(own[0].get('answer'))}. The {told}"
        table = [[_text(row.get("completion")), *(written(_number(row.get(name))) for name in numbers)] for row in own]
        part.tables.append(Table(["completion", *numbers], table, caption))
        images = own[0].get("images")
        if not isinstance(images, list) or not images:
            continue
        # Only beside the file that names it, whatever the name is.
        image = read_image(path.parent / str(images[0]).rpartition("/")[2])
        if image:
            image.thumbnail((320, 320))
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            told = f"The image of the {told}"
            part.add(f"prompt_{path.stem}", buffer.getvalue(), alt=told, caption=told)
    return part


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _text(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
