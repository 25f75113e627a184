"""Finding 4: the paper's three stages one after the other."""

from __future__ import annotations

from pathlib import Path

from avar_lightning.report import markdown_table, plot_results
from benchmarks.reproduction.differences import marked
from benchmarks.reproduction.recipes import ANCHORED, GUIDED_GRPO, GUIDED_VARS, HINGE_T, PUBLISHED_U
from benchmarks.reproduction.results import ACCURACY, VAS, VAS_ANSWERS, VAS_PUBLISHED, Model, Results

STEPS: dict[str, tuple[Model, Model | None]] = {
    "base": ("demo", None),
    "+ VARD (anchored responses)": (ANCHORED, "demo"),
    "+ AGTO (hinge, Q = T)": (HINGE_T, ANCHORED),
    "control: AGTO as published (Q = U)": (PUBLISHED_U, ANCHORED),
    "control: + GRPO without VARS": (GUIDED_GRPO, HINGE_T),
    "+ VARS (share)": (GUIDED_VARS, GUIDED_GRPO),
}
"""Each model, and the one that it is compared with; VARS with the same GRPO without it."""
NEEDS = [model for model, _ in STEPS.values()]
PAPER = {"base": (49.1, 7.5), "+ VARD (anchored responses)": (51.0, 10.1), "+ AGTO (hinge, Q = T)": (52.6, 13.8),
         "+ VARS (share)": (56.1, 18.9)}  # fmt: skip
"""Accuracy (%) and VAS of the paper's ablation, arXiv 2603.03825."""


def write(results: Results, output: Path) -> str:
    """Accuracy and VAS of each step, with what it added."""
    steps = {name: step for name, step in STEPS.items() if results.of(step[0])}
    gains = [None if other is None else results.accuracy_difference(model, other) for model, other in steps.values()]
    rows, drawn = [], []
    for (name, (model, other)), gain in zip(steps.items(), marked(gains, "+.1f"), strict=True):
        vas = "" if other is None else f"{results.difference(model, other, VAS):+.2f}"
        seeds, accuracy, published, of_responses, of_answers = results.row(
            model, ACCURACY, VAS_PUBLISHED, VAS, VAS_ANSWERS
        )
        rows.append(
            [
                name,
                seeds,
                accuracy,
                gain,
                published,
                of_responses,
                vas,
                of_answers,
                *map(str, PAPER.get(name, ("", ""))),
            ]
        )
        drawn.append(results.drawn(name, model) | {"reference": other is None})
    if drawn:
        plot_results(drawn).savefig(output / "ablation.png", dpi=150)
    headings = ["model", "seeds", "accuracy (%)", "this step, points", "VAS as in the paper (user, mean of ratios)",
                "VAS of responses (ratio of means)", "this step", "VAS of own answers", "paper: accuracy",
                "paper: VAS"]  # fmt: skip
    return "\n\n".join([markdown_table(headings, rows), "![The steps](results/reproduction/ablation.png)"])
