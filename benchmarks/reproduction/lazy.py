"""Finding 2: lazy attention localization. What do cold starts on different data do to attention?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from recipes import ANCHORED, HINGE_T, MULTIMODAL, TEXT_ONLY
from results import ACCURACY, VAS, VAS_ANSWERS, VAS_USER, Results, interval, spread, table

from avar_lightning.report import plot_shares_by_layer

COLD_STARTS = [MULTIMODAL, TEXT_ONLY, ANCHORED, HINGE_T]
NEEDS = ["demo", *COLD_STARTS]


def write(results: Results, output: Path) -> str:
    """Change of VAS against the base, and where attention goes by layer."""
    base = results.of("demo")[0]
    rows = [
        ["base", "1", spread(results.values("demo", ACCURACY), factor=100),
         *(spread(results.values("demo", key), digits=2) for key in (VAS_USER, VAS, VAS_ANSWERS)), "", ""]
    ]  # fmt: skip
    for training in COLD_STARTS:
        if not results.of(training):
            continue
        changes = []
        for key in (VAS_USER, VAS):
            before = results.values("demo", key)[0]
            changes.append(f"{interval([100 * (x / before - 1) for x in results.values(training, key)]):+.0f}")
        rows.append(
            [training.title, str(len(results.of(training))), spread(results.values(training, ACCURACY), factor=100),
             *(spread(results.values(training, key), digits=2) for key in (VAS_USER, VAS, VAS_ANSWERS)), *changes]
        )  # fmt: skip
    pictures = []
    for query, words in (("user", "user tokens"), ("response", "responses")):
        groups = {"base": _shares([base], query)}
        groups |= {each.title: _shares(results.of(each), query) for each in COLD_STARTS if results.of(each)}
        figure = plot_shares_by_layer(groups, title=f"Where attention of {words} goes")
        figure.savefig(output / f"shares_{query}.png", dpi=150)
        pictures.append(f"![Attention of {words} by layer](results/reproduction/shares_{query}.png)")
    headings = ["model", "seeds", "accuracy (%)", "VAS of user tokens", "VAS of responses", "VAS of own answers"]
    return "\n\n".join([table([*headings, "change, user tokens (%)", "change, responses (%)"], rows), *pictures])


def _shares(measured: list[dict], query: str) -> dict[str, np.ndarray]:
    parts = [each["references"][query]["attention_shares"] for each in measured]
    return {role: np.array([part[role] for part in parts]) for role in ("system", "user", "image")}
