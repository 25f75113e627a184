"""Finding 2: lazy attention localization. What do cold starts on different data do to attention?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avar_lightning.report import markdown_table, plot_shares_by_layer
from benchmarks.reproduction.differences import over_seeds
from benchmarks.reproduction.recipes import ANCHORED, HINGE_T, MULTIMODAL, TEXT_ONLY, Training
from benchmarks.reproduction.results import ACCURACY, VAS, VAS_PUBLISHED, VAS_USER, Model, Results, title_of

COLD_STARTS: list[Training] = [MULTIMODAL, TEXT_ONLY, ANCHORED, HINGE_T]
NEEDS: list[Model] = ["demo", *COLD_STARTS]
MEASURES = {"user, mean of ratios (the paper's)": VAS_PUBLISHED, "user": VAS_USER, "responses": VAS}
CONTRASTS = [*((each, "demo") for each in COLD_STARTS), (TEXT_ONLY, MULTIMODAL), (ANCHORED, MULTIMODAL)]
ROLES = ("system", "user", "image")


def write(results: Results, output: Path) -> str:
    """VAS of each, relative changes by seed, and where attention goes by layer."""
    rows = [[title_of(model), *results.row(model, ACCURACY, *MEASURES.values())] for model in results.finished(NEEDS)]
    changes = [
        [f"{title_of(model)} against {title_of(other)}",
         *(f"{results.difference(model, other, key, relative=True).scaled(100):+.0f}" for key in MEASURES.values())]
        for model, other in CONTRASTS
        if results.of(model) and results.of(other)
    ]  # fmt: skip
    parts = [
        markdown_table(["model", "seeds", "accuracy (%)", *(f"VAS of {name}" for name in MEASURES)], rows),
        markdown_table(["change (%) of VAS of", *MEASURES], changes),
    ]
    for query, words in (("user", "user tokens"), ("response", "responses")):
        groups = {title_of(model): _shares(results, model, query) for model in results.finished(NEEDS)}
        figure = plot_shares_by_layer(groups, title=f"Where attention of {words} goes")
        figure.savefig(output / f"shares_{query}.png", dpi=150)
        parts.append(f"![Attention of {words} by layer](results/reproduction/shares_{query}.png)")
        parts.append(_by_layer(results, query, words))
    return "\n\n".join(parts)


def _by_layer(results: Results, query: str, words: str) -> str:
    """Change of the image's share against the base in each layer, in points."""
    base = _shares(results, "demo", query)["image"][0]
    rows = []
    for training in results.finished(COLD_STARTS):
        change = 100 * (_shares(results, training, query)["image"] - base)
        rows.append([title_of(training), *(f"{over_seeds(list(layer)):+.1f}" for layer in change.T)])
    headings = [f"layer {layer}" for layer in range(len(base))]
    return markdown_table([f"image's share of attention of {words}, change against the base (points)", *headings], rows)


def _shares(results: Results, model: Model, query: str) -> dict[str, NDArray[np.float64]]:
    parts = [each["references"][query]["attention_shares"] for each in results.of(model).values()]
    return {role: np.array([part[role] for part in parts]) for role in ROLES}
