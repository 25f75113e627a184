"""What the paper reports of the seven benchmarks, and the same columns of an evaluation of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from avar_lightning.evaluation.intervals import Interval, bootstrap_mean, mean_of

AVERAGE = "average"


@dataclass(frozen=True)
class Published:
    """The paper's columns and rows.

    Attributes:
        columns: Name to heading, in the paper's order.
        parts: Name to the benchmarks whose mean the column is: MMMU-Pro's own total is that of ten options and vision.
        sources: Name to `address` and `what` it is, the authors' own or second-hand.
        rows: `model`, `accuracy` (percent by column, absent where no source was seen), `average`, `vas`, `source` of
            accuracies and average, `vas_source`, and perhaps a `note`.
    """

    columns: dict[str, str]
    parts: dict[str, tuple[str, ...]]
    sources: dict[str, dict[str, str]]
    rows: tuple[dict[str, Any], ...]


@cache
def published() -> Published:
    """Rows of arXiv 2603.03825, each with its source."""
    known = json.loads(Path(__file__).with_name("published.json").read_text())
    return Published(
        {each["name"]: each["title"] for each in known["benchmarks"]},
        {each["name"]: tuple(each["of"]) for each in known["benchmarks"]},
        known["sources"],
        tuple(known["rows"]),
    )


def columns_of(headlines: Mapping[str, Interval], rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """The paper's columns, as far as their benchmarks were evaluated, and `average` where all seven were.

    A column of several benchmarks is the mean of their accuracies; questions that they share, as those of MMMU-Pro, are
    drawn together.

    Args:
        headlines: Benchmark to its first figure.
        rows: Judged answers: `benchmark`, `id` and `correct`.
    """
    found: dict[str, Interval] = {}
    for name, of in published().parts.items():
        if not all(part in headlines for part in of):
            continue
        if of == (name,):
            found[name] = headlines[name]
        else:
            own = [row for row in rows if row["benchmark"] in of]
            names = [row["benchmark"] for row in own]
            found[name] = bootstrap_mean([row["correct"] for row in own], [row["id"] for row in own], parts=names)
    if len(found) == len(published().parts):
        found[AVERAGE] = mean_of(list(found.values()))
    return found
