"""Finding 4: the paper's three stages one after the other."""

from __future__ import annotations

from pathlib import Path

from recipes import ANCHORED, GUIDED_GRPO, GUIDED_VARS, HINGE_T
from results import ACCURACY, SHARE, VAS, VAS_ANSWERS, Model, Results, spread, table

from avar_lightning.report import plot_results

STEPS: dict[str, tuple[Model, Model | None]] = {
    "base": ("demo", None),
    "+ VARD (anchored responses)": (ANCHORED, "demo"),
    "+ AGTO (hinge, Q = T)": (HINGE_T, ANCHORED),
    "+ VARS (GRPO with visual reward)": (GUIDED_VARS, HINGE_T),
    "control: GRPO without VARS": (GUIDED_GRPO, HINGE_T),
}
"""Each model, and the one that it is compared with."""
NEEDS = [model for model, _ in STEPS.values()]
PAPER = {"base": (49.1, 7.5), "+ VARD (anchored responses)": (51.0, 10.1), "+ AGTO (hinge, Q = T)": (52.6, 13.8),
         "+ VARS (GRPO with visual reward)": (56.1, 18.9)}  # fmt: skip
"""Accuracy (%) and VAS of the paper's ablation, arXiv 2603.03825."""


def write(results: Results, output: Path) -> str:
    """Accuracy and VAS of each step, with what it added."""
    rows, drawn = [], []
    for name, (model, before) in STEPS.items():
        if not results.of(model):
            continue
        gained = ["", ""]
        if before is not None:
            gained = [
                f"{results.difference(model, before, ACCURACY).scaled(100):+.1f}",
                f"{results.difference(model, before, VAS):+.2f}",
            ]
        rows.append(
            [name, str(len(results.of(model))), spread(results.values(model, ACCURACY), factor=100), gained[0],
             spread(results.values(model, VAS), digits=2), gained[1],
             spread(results.values(model, VAS_ANSWERS), digits=2), *map(str, PAPER.get(name, ("", "")))]
        )  # fmt: skip
        figures = {"accuracy": ACCURACY, "vas": VAS, "share": SHARE}
        drawn.append({"name": name} | {key: results.values(model, at) for key, at in figures.items()})
    drawn[0]["reference"] = True
    plot_results(drawn).savefig(output / "ablation.png", dpi=150)
    headings = ["model", "seeds", "accuracy (%)", "step (95 %)", "VAS of responses", "step (95 %)",
                "VAS of own answers", "paper: accuracy", "paper: VAS"]  # fmt: skip
    return "\n\n".join([table(headings, rows), "![The steps](results/reproduction/ablation.png)"])
