"""Finding 1: does accuracy go with the Visual Attention Score, over models of different training?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avar_lightning.report import Correlation, Point, markdown_table, pearson, plot_relation, spearman
from benchmarks.reproduction.recipes import (
    ANCHORED,
    DIRECT,
    GUIDED,
    GUIDED_GRPO,
    GUIDED_VARS,
    MIXED,
    MULTIMODAL,
    PUBLISHED_T,
    REWARDS,
    SMALL,
    SMALL_GUIDED,
    TEXT_ONLY,
)
from benchmarks.reproduction.results import (
    ACCURACY,
    VAS,
    VAS_ANSWERS,
    VAS_PUBLISHED,
    VAS_USER,
    Model,
    Results,
    title_of,
)

KINDS: dict[str, list[Model]] = {
    "base": ["demo", "demo_small"],
    "data": [DIRECT, MULTIMODAL, TEXT_ONLY, MIXED, ANCHORED, SMALL],
    "guidance": [*GUIDED, SMALL_GUIDED],
    "RL": [*REWARDS.values(), GUIDED_GRPO, GUIDED_VARS],
}
NEEDS = [model for models in KINDS.values() for model in models]
MEASURES = {
    "user tokens, mean of ratios (the paper's)": VAS_PUBLISHED,
    "user tokens, ratio of means": VAS_USER,
    "responses, ratio of means": VAS,
    "own answers, ratio of means": VAS_ANSWERS,
}


def write(results: Results, output: Path) -> str:
    """Scatter and correlations; the unit is a training, since its seeds are not independent of each other."""
    models = results.finished(NEEDS)
    kind_of = {model: kind for kind, each in KINDS.items() for model in each}
    points = [
        Point(
            statistics.fmean(results.values(model, VAS)),
            100 * statistics.fmean(results.values(model, ACCURACY)),
            group=kind_of[model],
            x_interval=_range(results.values(model, VAS)),
            y_interval=_range([100 * value for value in results.values(model, ACCURACY)]),
        )
        for model in models
    ]
    x, y = "VAS of responses, ratio of means", "accuracy (%)"
    plot_relation(points, x=x, y=y, log_x=True).savefig(output / "relation.png", dpi=150)
    subsets: dict[str, list[Model]] = {
        "all": models,
        "all but published, Q = T": [m for m in models if m != PUBLISHED_T],
    }
    subsets |= {kind: [model for model in each if model in models] for kind, each in KINDS.items() if kind != "base"}
    rows = []
    for name, key in MEASURES.items():
        for label, chosen in subsets.items():
            across = np.array([statistics.fmean(results.values(model, key)) for model in chosen])
            up = [statistics.fmean(results.values(model, ACCURACY)) for model in chosen]
            found = pearson(across, up), pearson(np.log10(across), up), spearman(across, up)
            rows.append([name, label, str(len(chosen)), *map(_written, found)])
    by_model = [
        [title_of(model), kind_of[model], *results.row(model, ACCURACY, *MEASURES.values())] for model in models
    ]
    checkpoints = sum(len(results.of(model)) for model in models)
    return "\n\n".join(
        [
            f"{checkpoints} checkpoints of {len(models)} models; a dot is the mean over seeds, its bars their range.",
            "![Accuracy against VAS](results/reproduction/relation.png)",
            markdown_table(["VAS of", "models", "n", "Pearson r", "Pearson r with log VAS", "Spearman"], rows),
            markdown_table(
                ["model", "kind", "seeds", "accuracy (%)", *(f"VAS of {name}" for name in MEASURES)], by_model
            ),
        ]
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _written(found: Correlation) -> str:
    return f"{found.r:.2f} ({found.low:.2f} to {found.high:.2f})"
