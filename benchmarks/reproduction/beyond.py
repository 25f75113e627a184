"""Finding 5, beyond the paper: which guidance, which reward, a controller, and whether VAS is a proxy that is gamed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from recipes import ANCHORED, CONTROLLED, GUIDED, HINGE_T, PUBLISHED_T, REWARDS, Training
from results import ACCURACY, GAIN, LOSS, SHARE, VAS, VAS_ANSWERS, Results, spread, table

from avar_lightning.report import Point, pearson, plot_relation, plot_results

NEEDS = ["demo", "demo_sft", ANCHORED, *GUIDED, *REWARDS.values()]
FIGURES = {"accuracy": ACCURACY, "vas": VAS, "share": SHARE}


def write(results: Results, output: Path) -> str:
    """All four."""
    return "\n\n".join(
        [
            "### Which form, which queries, which layers",
            _guidance(results, output),
            "### Which transform of the reward",
            _rewards(results, output),
            "### A controller against fixed weights",
            _controller(results),
            "### Is VAS gamed, and what shows it",
            _gaming(results, output),
        ]
    )


def _guidance(results: Results, output: Path) -> str:
    models = [model for model in (ANCHORED, *GUIDED) if results.of(model)]
    rows = [_row(results, model, ANCHORED) for model in models]
    drawn = [{"name": m.title} | {key: results.values(m, at) for key, at in FIGURES.items()} for m in models]
    drawn[0]["reference"] = True
    plot_results(drawn).savefig(output / "guidance.png", dpi=150)
    headings = ["training", "seeds", "accuracy (%)", "against no guidance (95 %)", "VAS of responses",
                "image share (%)", "loss of references", "need of the picture (nats)"]  # fmt: skip
    return f"{table(headings, rows)}\n\n![Guidance](results/reproduction/guidance.png)"


def _row(results: Results, model: Training, plain: Training) -> list[str]:
    against = "" if model == plain else f"{results.difference(model, plain, ACCURACY).scaled(100):+.1f}"
    return [
        model.title, str(len(results.of(model))), spread(results.values(model, ACCURACY), factor=100), against,
        spread(results.values(model, VAS), digits=2), spread(results.values(model, SHARE), factor=100),
        spread(results.values(model, LOSS), digits=3), spread(results.values(model, GAIN), digits=2),
    ]  # fmt: skip


def _rewards(results: Results, output: Path) -> str:
    models = {"cold start on mixed styles": "demo_sft"} | {each.title: each for each in REWARDS.values()}
    plain = REWARDS["none"]
    rows, drawn = [], []
    for name, model in models.items():
        if not results.of(model):
            continue
        against = (
            "" if model in ("demo_sft", plain) else f"{results.difference(model, plain, ACCURACY).scaled(100):+.1f}"
        )
        rows.append(
            [name, str(len(results.of(model))), spread(results.values(model, ACCURACY), factor=100), against,
             spread(results.values(model, VAS_ANSWERS), digits=2), spread(results.values(model, VAS), digits=2),
             spread(results.values(model, ("describes",)), factor=100)]
        )  # fmt: skip
        drawn.append({"name": name} | {key: results.values(model, at) for key, at in FIGURES.items()})
    drawn[0]["reference"] = True
    plot_results(drawn).savefig(output / "rewards.png", dpi=150)
    headings = ["training", "seeds", "accuracy (%)", "against GRPO alone (95 %)", "VAS of own answers",
                "VAS of references", "answers that describe (%)"]  # fmt: skip
    return f"{table(headings, rows)}\n\n![Rewards](results/reproduction/rewards.png)"


def _controller(results: Results) -> str:
    rows = []
    for other in (PUBLISHED_T, HINGE_T, ANCHORED):
        gains = [results.difference(CONTROLLED, other, key) for key in (ACCURACY, LOSS)]
        rows.append([other.title, f"{gains[0].scaled(100):+.1f}", f"{gains[1]:+.4f}"])
    held = spread(results.values(CONTROLLED, VAS), digits=2)
    headings = ["controller against", "accuracy (points, 95 %)", "loss of references (nats, 95 %)"]
    return f"{table(headings, rows)}\n\nVAS of responses under the controller, whose target is 4: {held}."


def _gaming(results: Results, output: Path) -> str:
    models = [model for model in (ANCHORED, *GUIDED) if results.of(model)]
    points = [
        Point(x, y, group=model.title)
        for model in models
        for x, y in zip(results.values(model, VAS), results.values(model, GAIN), strict=True)
    ]
    y = "need of the picture (nats a token)"
    plot_relation(points, x="VAS of responses, ratio of means", y=y, log_x=True).savefig(output / "gaming.png", dpi=150)
    rows = []
    for name, key in (("accuracy", ACCURACY), ("need of the picture", GAIN), ("loss of references", LOSS)):
        found = _with_vas(results, models, key)
        rows.append([name, f"{found.r:.2f} ({found.low:.2f} to {found.high:.2f}), n = {found.n}"])
    return "\n\n".join(
        [
            "Need of the picture: how many nats a token the reference responses lose when each question gets the "
            "picture of another of its kind. A model that uses more of what it sees loses more.",
            table(["over trainings of one style: correlation of log VAS with", "Pearson r of trainings' means"], rows),
            "![Need of the picture against VAS](results/reproduction/gaming.png)",
        ]
    )


def _with_vas(results: Results, models: Sequence[Training], key: Sequence[str]):  # type: ignore[no-untyped-def]
    across = [statistics.fmean(map(math.log10, results.values(model, VAS))) for model in models]
    return pearson(across, [statistics.fmean(results.values(model, key)) for model in models])
