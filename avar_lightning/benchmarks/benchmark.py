"""What a benchmark is: where its files are, what a record asks, and how an answer to it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft

Columns = Mapping[str, Any]
"""What a converted sample carries beside messages and images: `benchmark`, `id`, `answer`, categories, …"""
Row = Mapping[str, Any]
"""One judged answer: the sample's columns, and `response`, `extracted`, `correct` (0 or 1)."""


def mean_accuracy(rows: Sequence[Row]) -> dict[str, float]:
    """The share of right answers, as most benchmarks report it."""
    return {"accuracy": sum(row["correct"] for row in rows) / len(rows)}


def own_id(columns: Columns) -> str:
    """Every sample stands for itself."""
    return str(columns["id"])


def no_doubt(records: Sequence[Mapping[str, Any]]) -> str:
    """Other parts of most datasets have other columns, or say in a column what they are."""
    return ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as its authors run it.

    Everything but `draft` sees only columns, which travel in the shards; so scoring needs none of the original files.
    """

    name: str
    """Of `avar convert --benchmark`, and the column `benchmark` of its samples."""
    title: str
    """For tables."""
    questions: int
    """Number of questions of the reported split."""
    hub: str
    """Its dataset on the Hugging Face Hub."""
    files: tuple[str, ...]
    """Globs of the reported split's files in a checkout of `hub`, relative to it; where none matches, to the folder."""
    draft: Callable[[Mapping[str, Any], ConvertConfig], Draft | None]
    """A record as prompt, right answer and columns; None for one that is no part of it (another version)."""
    extract: Callable[[str, Columns], str | None]
    """The answer in a response, by rules; None where rules find none."""
    score: Callable[[str, Columns], bool]
    """Whether an extracted answer is right, as the authors decide it."""
    extraction_prompt: Callable[[str, Columns], str | None]
    """What a judge is asked where `extract` finds nothing; its reply goes through `read_judgement`. None where nobody
    is to be asked, since the response has no conclusion."""
    read_judgement: Callable[[str, Columns], str | None]
    """The answer in a judge's reply; None where the response has none."""
    doubt: Callable[[Sequence[Mapping[str, Any]]], str] = no_doubt
    """What says of a file's first records that they are of another part of `hub`, for a message; "" where nothing
    does."""
    categories: tuple[str, ...] = ()
    """Columns by which results are also given; a sample whose column is a list counts under each of its items."""
    unit: Callable[[Columns], str] = own_id
    """What is drawn together in the bootstrap: samples that share a figure or a question group."""
    metrics: Callable[[Sequence[Row]], dict[str, float]] = mean_accuracy
    """Figures of some rows, the headline first; values in [0, 1]. Rows that a bootstrap draws several times carry
    `draw`, a number of the draw, so that groups of rows (HallusionBench's figures) are formed within one draw."""
