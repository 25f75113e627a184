"""MMStar: 1,500 multiple-choice questions that need their image, six core capabilities of 250.

Source: Chen et al., "Are We on the Right Way for Evaluating Large Vision-Language Models?" (arXiv 2403.20330) and the
authors' github.com/MMStar-Benchmark/MMStar (eval/vlmeval). Their prompt is `Question: …` with the options, which the
hub's questions hold already, and the closing line below. They take a letter that begins the response, or follows
"(", "option " or "the answer is ".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avar_lightning.benchmarks.benchmark import Benchmark, Columns
from avar_lightning.benchmarks.drafting import draft, need
from avar_lightning.benchmarks.judging import ask_letter, read_letter
from avar_lightning.benchmarks.letters import choose
from avar_lightning.benchmarks.options import options_in
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft

NAME, HUB = "mmstar", "Lin-Chen/MMStar"
CLOSING = "Please select the correct answer from the options above."


def read(record: Mapping[str, Any], config: ConvertConfig) -> Draft:
    """A record of `mmstar.parquet`."""
    question = str(need(record, "question")).strip()
    return draft(
        record,
        config,
        benchmark=NAME,
        source=HUB,
        id=need(record, "index"),
        answer=str(need(record, "answer")).strip().upper(),
        prompt=f"Question: {question}\n{CLOSING}",
        images=[need(record, "image")],
        question=question,
        options=options_in(question),
        category=need(record, "category"),
        l2_category=record.get("l2_category"),
    )


def extract(response: str, columns: Columns) -> str | None:
    """The letter that a response chooses."""
    return choose(response, columns.get("options") or {})


def score(extracted: str, columns: Columns) -> bool:
    """Whether it is the right one."""
    return extracted == columns["answer"]


MMSTAR = Benchmark(
    name=NAME,
    title="MMStar",
    questions=1500,
    hub=HUB,
    files=("mmstar.parquet",),
    draft=read,
    extract=extract,
    score=score,
    extraction_prompt=ask_letter,
    read_judgement=read_letter,
    categories=("category", "l2_category"),
)
