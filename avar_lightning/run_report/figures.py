"""The first and last figures of runs, as a table, and what is known of a run besides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avar_lightning.report.figure import format_number
from avar_lightning.run_report.page import Part, Table
from avar_lightning.run_report.runs import Run

COLUMNS = {
    "val/accuracy": ("Accuracy (%)", 100.0),
    "val/vas": ("VAS, user", 1.0),
    "val/vas_ratio_of_means": ("VAS, user, ratio of means", 1.0),
    "val/vas_ratio_of_means_response": ("VAS, response, ratio of means", 1.0),
    "val/image_share_response": ("Image share, response (%)", 100.0),
    "val/loss": ("Validation loss", 1.0),
    "reward/total": ("Reward", 1.0),
    "rollout/vas": ("VAS, rollouts", 1.0),
}
"""Metric → heading, factor to the shown unit; those that no run has are left out."""
LONGEST = 300
"""Characters of a fact of the configuration."""


def figures_part(runs: Sequence[Run]) -> Part:
    """First and last figures of every run."""
    known = {name for run in runs for metrics in run.ends() for name in metrics}
    columns = {name: of for name, of in COLUMNS.items() if name in known}
    rows = [
        [run.name, _steps(run), *(_from_to(run, name, factor) for name, (_, factor) in columns.items())] for run in runs
    ]
    caption = (
        "Before → after training, from vas/step_*.json and summary.json; – is not known. Where there is none before "
        "training, the first measurement stands there with its step. VAS, user, is the number that VASCallback logs as "
        "val/vas, in its own reduction."
    )
    headings = ["run", "steps", *(heading for heading, _ in columns.values())]
    return Part("First and last figures", tables=[Table(headings, rows, caption)])


def _steps(run: Run) -> str:
    steps = [measured.step for measured in run.measured]
    if not steps and (logged := [step for values in run.events.scalars.values() for step in values]):
        steps = [min(logged), max(logged)]
    return "–" if not steps else f"{steps[0]} → {steps[-1]}" if steps[0] != steps[-1] else str(steps[0])


def _from_to(run: Run, name: str, factor: float) -> str:
    before, after = run.ends()
    first = run.trained[0] if len(run.trained) > 1 else None
    if name not in before and first and name in first.metrics:
        start = f"{written(factor * first.metrics[name], percent=factor == 100)} ({first.when})"
    else:
        start = written(factor * before.get(name, math.nan), percent=factor == 100)
    end = written(factor * after.get(name, math.nan), percent=factor == 100)
    return "–" if start == end == "–" else f"{start} → {end}"


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """What stands below the name of a run."""
    yield "from", run.given
    model, data = _arguments(run.config, "model"), _arguments(run.config, "data")
    found = {
        "model": _arguments(model, "vlm").get("pretrained") or (run.measured[-1].model if run.measured else None),
        "seed": run.config.get("seed_everything"),
        "data": data.get("train") or data.get("style"),
        "steps": run.summary.get("steps"),
        "seconds": run.summary.get("seconds"),
    }
    guidance, visual = _arguments(model, "guidance"), _arguments(model, "visual")
    if guidance.get("form"):
        layers = guidance.get("layers") or "all"
        found["guidance"] = (
            f"{guidance['form']}, queries {' and '.join(guidance.get('queries') or ())}, layers {layers}"
        )
    if visual.get("transform"):
        found["visual reward"] = f"{visual['transform']}, weight {visual.get('weight')}"
    if run.measured:
        last = run.measured[-1]
        found["measured"] = f"{len(run.measured)} times, the last at step {last.step} on {last.num_samples} samples"
    for name, value in found.items():
        if value is not None:
            yield name, f"{value:.5g}" if isinstance(value, float) else str(value)[:LONGEST]


def _arguments(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a part of LightningCLI's configuration is built with, whether or not its class is named."""
    value = config.get(key)
    inner = value.get("init_args", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def written(value: float, *, percent: bool = False) -> str:
    """A number of a table.

    >>> written(0.5), written(math.nan), written(61.04, percent=True), written(-2.25)
    ('0.50', '–', '61.0', '-2.2')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if percent else ("-" if value < 0 else "") + format_number(abs(value))
