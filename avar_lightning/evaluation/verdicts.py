"""From responses to verdicts: a benchmark's rules first, and a judge where they find no answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from avar_lightning.benchmarks import benchmark_of
from avar_lightning.evaluation.judge import Judge

RULES, JUDGE, NOBODY = "rules", "judge", "nobody"
"""Who extracted an answer."""


def whole(row: Mapping[str, Any]) -> str:
    """A response with the `<think>` that its prompt opened for it, so that what never got out of it is not read."""
    return "<think>" * bool(row.get("thinking")) + str(row["response"])


def by_rules(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the benchmark's own rules make of a response: `extracted`, `extracted_by` and `correct` (0 or 1).

    Args:
        row: `response`, `thinking` (whether its prompt opened `<think>`) and `columns`.

    Raises:
        ValueError: The sample names no benchmark, or an unknown one.
    """
    columns = row["columns"]
    return _verdict(benchmark_of(columns.get("benchmark")).extract(whole(row), columns), columns, RULES)


def judge_again(rows: Iterable[dict[str, Any]]) -> None:
    """Verdicts by the rules of today, for answers of earlier runs; in place."""
    for row in rows:
        row |= by_rules(row)


def ask_judge(judge: Judge, rows: Iterable[dict[str, Any]]) -> None:
    """Have a judge read the responses in which rules found no answer, and mark its verdicts; in place.

    A response that was cut while it thought has no answer to be found, and is not shown to anybody.
    """
    asked: list[tuple[dict[str, Any], str]] = []
    for row in rows:
        prompt = None
        if row["extracted_by"] != RULES:
            prompt = benchmark_of(row["benchmark"]).extraction_prompt(whole(row), row["columns"])
        if prompt is not None:
            asked.append((row, prompt))
    replies = judge.ask([prompt for _, prompt in asked])
    for row, prompt in asked:
        reply, read = replies.get(prompt), benchmark_of(row["benchmark"]).read_judgement
        row |= _verdict(None if reply is None else read(reply, row["columns"]), row["columns"], JUDGE)


def _verdict(extracted: str | None, columns: Mapping[str, Any], by: str) -> dict[str, Any]:
    if extracted is None:
        return {"extracted": None, "extracted_by": NOBODY, "correct": 0}
    right = benchmark_of(columns.get("benchmark")).score(extracted, columns)
    return {"extracted": extracted, "extracted_by": by, "correct": int(right)}
