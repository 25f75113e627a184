"""The ground: is the demo world hard enough, and does its shortcut bite?"""

from __future__ import annotations

from pathlib import Path

from avar_lightning.data.demo import TASKS
from avar_lightning.report import markdown_table
from benchmarks.reproduction.recipes import ANCHORED, DIRECT, MIXED, MULTIMODAL, SMALL, TEXT_ONLY
from benchmarks.reproduction.results import ACCURACY, Model, Results, percentage, title_of

NEEDS: list[Model] = ["demo", "demo_small", DIRECT, MULTIMODAL, TEXT_ONLY, MIXED, ANCHORED, SMALL]
COLUMNS = {
    "accuracy (%)": ACCURACY,
    "note right": percentage("accuracy_note_right"),
    "note wrong": percentage("accuracy_note_wrong"),
    "says the wrong note": percentage("follows_wrong_note"),
    "no answer": percentage("no_answer"),
} | {task: percentage("accuracy_by_task", task) for task in TASKS}


def write(results: Results, output: Path) -> str:
    """Accuracy by what the note says and by kind of question."""
    rows = [[title_of(model), *results.row(model, *COLUMNS.values())] for model in results.finished(NEEDS)]
    return markdown_table(["model", "seeds", *COLUMNS], rows)
