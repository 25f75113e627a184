"""From responses to verdicts: a benchmark's rules first, and a judge where they find no answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from avar_lightning.benchmarks import benchmark_of
from avar_lightning.evaluation.judge import Judge

RULES, JUDGE, NOBODY = "rules", "judge", "nobody"
"""Who extracted an answer."""


def by_rules(response: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What the benchmark's own rules make of a response: `extracted`, `extracted_by` and `correct` (0 or 1).

    Raises:
        ValueError: The sample names no benchmark, or an unknown one.
    """
    extracted = benchmark_of(columns.get("benchmark")).extract(response, columns)
    return _verdict(extracted, columns, RULES)


def judge_again(rows: Iterable[dict[str, Any]]) -> None:
    """Verdicts by the rules of today, for answers of earlier runs; in place."""
    for row in rows:
        row |= by_rules(row["response"], row["columns"])


def ask_judge(judge: Judge, rows: Iterable[dict[str, Any]]) -> None:
    """Have a judge read the responses in which rules found no answer, and mark its verdicts; in place."""
    unread = [row for row in rows if row["extracted_by"] != RULES]
    judging = [benchmark_of(row["benchmark"]) for row in unread]
    prompts = [each.extraction_prompt(row["response"], row["columns"]) for each, row in zip(judging, unread)]
    replies = judge.ask(prompts)
    for each, row, prompt in zip(judging, unread, prompts, strict=True):
        reply = replies.get(prompt)
        extracted = None if reply is None else each.read_judgement(reply, row["columns"])
        row |= _verdict(extracted, row["columns"], JUDGE)


def _verdict(extracted: str | None, columns: Mapping[str, Any], by: str) -> dict[str, Any]:
    if extracted is None:
        return {"extracted": None, "extracted_by": NOBODY, "correct": 0}
    right = benchmark_of(columns.get("benchmark")).score(extracted, columns)
    return {"extracted": extracted, "extracted_by": by, "correct": int(right)}
