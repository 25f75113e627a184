"""What the paper reports of the seven benchmarks, and the same columns of an evaluation of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """The paper's columns and rows.

    Attributes:
        columns: Name to heading, in the paper's order.
        parts: Name to the benchmarks whose mean the column is: MMMU-Pro's own total is that of ten options and vision.
        rows: `model`, `accuracy` (percent by column, absent where no source was seen), `average`, `vas`, `source`, and
            perhaps a `note`.
    """

    columns: dict[str, str]
    parts: dict[str, tuple[str, ...]]
    rows: tuple[dict[str, Any], ...]


@cache
def published() -> Published:
    """Rows of arXiv 2603.03825, each with its source."""
    known = json.loads(Path(__file__).with_name("published.json").read_text())
    return Published(
        {each["name"]: each["title"] for each in known["benchmarks"]},
        {each["name"]: tuple(each["of"]) for each in known["benchmarks"]},
        tuple(known["rows"]),
    )


def columns_of(headlines: Mapping[str, float]) -> dict[str, float]:
    """The paper's columns, as far as their benchmarks were evaluated, and `average` where all seven were.

    Args:
        headlines: Benchmark to its first figure, in [0, 1].

    >>> columns_of({"mathvista": 0.7, "mmmu_pro": 0.4})
    {'mathvista': 70.0}
    """
    parts = published().parts
    found = {
        name: 100 * sum(headlines[part] for part in of) / len(of)
        for name, of in parts.items()
        if all(part in headlines for part in of)
    }
    return found | ({"average": sum(found.values()) / len(found)} if len(found) == len(parts) else {})
