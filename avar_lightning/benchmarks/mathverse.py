"""MathVerse, the 788 vision-only problems of testmini: the whole question is in the image.

Source: Zhang et al., "MathVerse" (arXiv 2403.14624), github.com/ZrrSkywalker/MathVerse; the prompt is the hub's column
`query_cot`. The authors let a language model extract the answer and then compare it with the right one; here rules do
both (letters, texts of options, numbers with units, expressions by math-verify), and a judge may extract where they
find nothing, but never compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avar_lightning.benchmarks.benchmark import Benchmark, Columns
from avar_lightning.benchmarks.drafting import draft, need
from avar_lightning.benchmarks.judging import ask_letter, ask_value, read_letter, read_value
from avar_lightning.benchmarks.letters import choose
from avar_lightning.benchmarks.options import letter_of, options_in
from avar_lightning.benchmarks.values import find_short_value, option_with_value, same_value
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft

NAME, HUB, VERSION = "mathverse_vo", "AI4Math/MathVerse", "Vision Only"
CHOICE = "multi-choice"


def read(record: Mapping[str, Any], config: ConvertConfig) -> Draft | None:
    """A record of `testmini.parquet`; None for another version of a problem."""
    if need(record, "problem_version") != VERSION:
        return None
    metadata = need(record, "metadata")
    question = str(need(record, "question_for_eval")).strip()
    return draft(
        record,
        config,
        benchmark=NAME,
        source=HUB,
        id=need(record, "sample_index"),
        answer=str(need(record, "answer")).strip(),
        prompt=str(need(record, "query_cot")).strip(),
        images=[need(record, "image")],
        question=question,
        options=options_in(question),
        question_type=need(record, "question_type"),
        problem_index=record.get("problem_index"),
        dataset=metadata.get("source"),
        subject=metadata.get("subject"),
        subfield=metadata.get("subfield"),
    )


def extract(response: str, columns: Columns) -> str | None:
    """A letter, also where the response names the value of its option; of a free question, the value."""
    if columns["question_type"] != CHOICE:
        return find_short_value(response)
    options = columns.get("options") or {}
    return choose(response, options) or option_with_value(response, options)


def score(extracted: str, columns: Columns) -> bool:
    """Whether it is the right letter or the same value."""
    answer, options = str(columns["answer"]), columns.get("options") or {}
    if columns["question_type"] == CHOICE:
        right = letter_of(answer, options)
        if extracted == (right or answer):
            return True
        return extracted not in options and right in options and same_value(extracted, options[right])
    return same_value(extracted, answer)


def question_to_judge(response: str, columns: Columns) -> str | None:
    """Ask for the letter or the value; options are in the question."""
    asked = {**columns, "options": None}
    return (ask_letter if columns["question_type"] == CHOICE else ask_value)(response, asked)


def read_judgement(reply: str, columns: Columns) -> str | None:
    """The letter or the value."""
    return (read_letter(reply, columns) if columns["question_type"] == CHOICE else None) or read_value(reply, columns)


MATHVERSE_VO = Benchmark(
    name=NAME,
    title="MathVerse (vision only)",
    questions=788,
    hub=HUB,
    files=("testmini.parquet",),
    draft=read,
    extract=extract,
    score=score,
    extraction_prompt=question_to_judge,
    read_judgement=read_judgement,
    categories=("subject", "subfield", "question_type", "dataset"),
)
