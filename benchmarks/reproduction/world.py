"""The ground: is the demo world hard enough, and does its shortcut bite?"""

from __future__ import annotations

from pathlib import Path

from avar_lightning.data.demo import TASKS
from benchmarks.reproduction.differences import spread, table
from benchmarks.reproduction.recipes import ANCHORED, DIRECT, MIXED, MULTIMODAL, SMALL, TEXT_ONLY
from benchmarks.reproduction.results import ACCURACY, Model, Results

NEEDS: dict[Model, str] = {
    "demo": "base",
    "demo_small": "small base",
    DIRECT: DIRECT.title,
    MULTIMODAL: MULTIMODAL.title,
    TEXT_ONLY: TEXT_ONLY.title,
    MIXED: MIXED.title,
    ANCHORED: ANCHORED.title,
    SMALL: SMALL.title,
}


def write(results: Results, output: Path) -> str:
    """Accuracy by what the note says and by kind of question."""
    columns = {
        "accuracy (%)": ACCURACY,
        "note right": ("accuracy_note_right",),
        "note wrong": ("accuracy_note_wrong",),
        "says the wrong note": ("follows_wrong_note",),
        "no answer": ("no_answer",),
    } | {task: ("accuracy_by_task", task) for task in TASKS}
    rows = [
        [
            NEEDS[model],
            str(len(results.of(model))),
            *(spread(results.values(model, at), factor=100) for at in columns.values()),
        ]
        for model in results.finished(NEEDS)
    ]
    return table(["model", "seeds", *columns], rows)
