"""Finding 1: does accuracy go with the Visual Attention Score, over models of different training?"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
from recipes import (
    ANCHORED,
    DIRECT,
    GUIDED,
    GUIDED_GRPO,
    GUIDED_VARS,
    MULTIMODAL,
    REWARDS,
    SMALL,
    SMALL_GUIDED,
    TEXT_ONLY,
)
from results import ACCURACY, VAS, VAS_ANSWERS, VAS_PUBLISHED, VAS_USER, Model, Results, spread, table

from avar_lightning.report import Correlation, Point, pearson, plot_relation, spearman

KINDS: dict[str, list[Model]] = {
    "base": ["demo", "demo_small", "demo_sft"],
    "data": [DIRECT, MULTIMODAL, TEXT_ONLY, ANCHORED, SMALL],
    "guidance": [*GUIDED, SMALL_GUIDED],
    "RL": [*REWARDS.values(), GUIDED_GRPO, GUIDED_VARS],
}
NEEDS = [model for models in KINDS.values() for model in models]
MEASURES = {
    "responses, ratio of means": VAS,
    "own answers, ratio of means": VAS_ANSWERS,
    "user tokens, ratio of means": VAS_USER,
    "user tokens, mean of ratios (the paper's)": VAS_PUBLISHED,
}


def write(results: Results, output: Path) -> str:
    """Scatter and correlations, over trainings and over all checkpoints."""
    models = {model: kind for kind, each in KINDS.items() for model in each if results.of(model)}
    points = []
    for model, kind in models.items():
        for x, y in zip(results.values(model, VAS), results.values(model, ACCURACY), strict=True):
            points.append(Point(x, 100 * y, group=kind))
    figure = plot_relation(points, x="VAS of responses, ratio of means", y="accuracy (%)", log_x=True)
    figure.savefig(output / "relation.png", dpi=150)
    rows = []
    for name, key in MEASURES.items():
        found: dict[str, list[Correlation]] = {}
        for label, chosen in (
            ("all", list(models)),
            ("one style of data: anchored", [ANCHORED, *(model for model in GUIDED if model in models)]),
        ):
            xs = [[math.log10(value) for value in results.values(model, key)] for model in chosen]
            ys = [[100 * value for value in results.values(model, ACCURACY)] for model in chosen]
            means = [statistics.fmean(x) for x in xs], [statistics.fmean(y) for y in ys]
            every = np.concatenate(xs), np.concatenate(ys)
            found[label] = [pearson(*means), spearman(*means), pearson(*every)]
        for label, correlations in found.items():
            rows.append([name, label, *map(_written, correlations)])
    by_model = [
        [_title(model), kind, str(len(results.of(model))), spread(results.values(model, ACCURACY), factor=100),
         spread(results.values(model, VAS), digits=2), spread(results.values(model, VAS_USER), digits=2)]
        for model, kind in models.items()
    ]  # fmt: skip
    headings = ["VAS of", "models", "Pearson r of trainings' means", "Spearman", "Pearson r of all checkpoints"]
    return "\n\n".join(
        [
            f"{len(points)} checkpoints of {len(models)} trainings. Correlations are of accuracy with the logarithm of "
            "VAS; intervals take checkpoints as independent, which seeds of one training are not, so the means over "
            "seeds come first.",
            "![Accuracy against VAS](results/reproduction/relation.png)",
            table(headings, rows),
            table(["model", "kind", "seeds", "accuracy (%)", "VAS of responses", "VAS of user tokens"], by_model),
        ]
    )


def _title(model: Model) -> str:
    titles = {"demo": "base", "demo_small": "small base", "demo_sft": "cold start on mixed styles"}
    return titles[model] if isinstance(model, str) else model.title


def _written(found: Correlation) -> str:
    return f"{found.r:.2f} ({found.low:.2f} to {found.high:.2f}), n = {found.n}"
