"""Finding 5, beyond the paper: which guidance, which reward, a controller, and whether VAS is a proxy that is gamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avar_lightning.report import Point, markdown_table, plot_relation, plot_results
from benchmarks.reproduction.differences import Interval, marked
from benchmarks.reproduction.recipes import (
    ANCHORED,
    CONTROLLED,
    GUIDED,
    HINGE_T,
    MIXED,
    PUBLISHED_T,
    PUBLISHED_WEAK,
    REWARDS,
    Training,
)
from benchmarks.reproduction.results import (
    ACCURACY,
    DESCRIBES,
    LOSS,
    NEED,
    SHARE,
    SYSTEM_MASS,
    VAS,
    VAS_ANSWERS,
    Figure,
    Model,
    Results,
)

NEEDS: list[Model] = [ANCHORED, *GUIDED, MIXED, *REWARDS.values()]
MARGIN = 0.03
"""Accuracies that differ by less, interval included, count as unchanged; set before anything was measured."""


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
    columns = {
        "VAS of responses": VAS,
        "image share (%)": SHARE,
        "loss of references (nats)": LOSS,
    }
    arms = _arms(results, [ANCHORED, *GUIDED], ANCHORED, "no guidance", columns, output / "guidance.png")
    return f"{arms}\n\n![Guidance](results/reproduction/guidance.png)"


def _rewards(results: Results, output: Path) -> str:
    columns = {
        "VAS of own answers": VAS_ANSWERS,
        "VAS of references": VAS,
        "answers that describe (%)": DESCRIBES,
    }
    arms = _arms(results, [MIXED, *REWARDS.values()], REWARDS["none"], "GRPO alone", columns, output / "rewards.png")
    return f"{arms}\n\n![Rewards](results/reproduction/rewards.png)"


def _arms(
    results: Results, arms: Sequence[Training], plain: Training, against: str, columns: dict[str, Figure], picture: Path
) -> str:
    """Trainings side by side: a table with differences to one of them, and a picture with the first as reference."""
    models = [model for model in arms if results.of(model)]
    drawn = [results.drawn(model.title, model) | {"reference": model == arms[0]} for model in models]
    if drawn:
        plot_results(drawn).savefig(picture, dpi=150)
    gains = marked([None if model == plain else results.accuracy_difference(model, plain) for model in models], "+.1f")
    rows = []
    for model, gain in zip(models, gains, strict=True):
        seeds, accuracy, *others = results.row(model, ACCURACY, *columns.values())
        rows.append([model.title, seeds, accuracy, gain, *others])
    return markdown_table(["training", "seeds", "accuracy (%)", f"against {against}, points", *columns], rows)


def _controller(results: Results) -> str:
    others = [model for model in (PUBLISHED_T, PUBLISHED_WEAK, HINGE_T, ANCHORED) if results.of(model)]
    if not results.of(CONTROLLED):
        return "Not finished."
    gains = marked([results.accuracy_difference(CONTROLLED, other) for other in others], "+.1f")
    rows = [
        [other.title, results.row(other, VAS)[1], gain, f"{results.difference(CONTROLLED, other, LOSS):+.4f}"]
        for other, gain in zip(others, gains, strict=True)
    ]
    headings = ["controller against", "its VAS of responses", "accuracy, points", "loss of references, nats"]
    _, held = results.row(CONTROLLED, VAS)
    return f"{markdown_table(headings, rows)}\n\nVAS of responses under the controller, whose target is 4: {held}."


def _gaming(results: Results, output: Path) -> str:
    arms: list[tuple[Training, Training]] = [(model, ANCHORED) for model in GUIDED]
    arms += [(model, REWARDS["none"]) for name, model in REWARDS.items() if name != "none"]
    arms = [(model, plain) for model, plain in arms if results.of(model) and results.of(plain)]
    gains = [results.accuracy_difference(*arm) for arm in arms]
    rows, points = [], []
    for (model, plain), gain in zip(arms, gains, strict=True):
        vas = results.difference(model, plain, VAS_ANSWERS, relative=True)
        rows.append(
            [model.title, f"{vas.scaled(100):+.0f}", _verdict(gain, vas),
             f"{results.difference(model, plain, NEED).scaled(100):+.1f}",
             f"{results.difference(model, plain, LOSS):+.4f}",
             f"{results.difference(model, plain, SYSTEM_MASS, relative=True).scaled(100):+.0f}"]
        )  # fmt: skip
    for model in dict.fromkeys(model for arm in arms for model in arm):
        pairs = zip(results.values(model, VAS_ANSWERS), results.values(model, NEED), strict=True)
        points += [Point(x, 100 * y, group="RL" if "GRPO" in model.title else "SFT") for x, y in pairs]
    y = "need of the picture (points of accuracy)"
    if points:
        figure = plot_relation(points, x="VAS of own answers, ratio of means", y=y, log_x=True)
        figure.savefig(output / "gaming.png", dpi=150)
    headings = ["against the same without it", "VAS of own answers (%)", "accuracy", "need of the picture, points",
                "loss of references, nats", "attention to the system prompt (%)"]  # fmt: skip
    return f"{markdown_table(headings, rows)}\n\n![Need of the picture against VAS](results/reproduction/gaming.png)"


def _verdict(gain: Interval | None, vas: Interval) -> str:
    """What happened to accuracy while VAS moved."""
    if gain is None:
        return "–"
    if gain.low > -MARGIN and gain.high < MARGIN:
        return "unchanged, VAS up" if vas.low > 0 else "unchanged"
    return f"{gain.scaled(100):+.1f}"
