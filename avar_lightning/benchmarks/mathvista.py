"""MathVista, testmini: 1,000 questions of mathematics in figures, multiple choice or with a number or list as answer.

Source: Lu et al., "MathVista" (arXiv 2310.02255), github.com/lupantech/MathVista: the prompt's hints of
evaluation/build_query.py, in the order of the hub's column `query`; scoring of evaluation/calculate_score.py. There a
language model extracts answers; here rules do so first, and a judge where they find none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avar_lightning.benchmarks.benchmark import Benchmark, Columns
from avar_lightning.benchmarks.drafting import draft, need
from avar_lightning.benchmarks.judging import ask_letter, ask_value, read_letter, read_value
from avar_lightning.benchmarks.letters import choose
from avar_lightning.benchmarks.options import lettered
from avar_lightning.benchmarks.values import (
    find_list,
    find_value,
    number_in,
    option_with_value,
    parse_list,
    readings,
    same_number,
)
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft
from avar_lightning.conversion.rejecting import BadRecord, short

NAME, HUB, SPLIT = "mathvista", "AI4Math/MathVista", "testmini"
CHOICE = "multi_choice"
MAX_COMPARED = 1000  # characters
HINTS = {
    (CHOICE, None): "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    ("integer", None): "Please answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.",
    ("float", 1): "Please answer the question requiring a floating-point number with one decimal place and provide the "
    "final value, e.g., 1.2, 1.3, 1.4, at the end.",
    (
        "float",
        2,
    ): "Please answer the question requiring a floating-point number with two decimal places and provide the "
    "final value, e.g., 1.23, 1.34, 1.45, at the end.",
    ("list", None): "Please answer the question requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}
_METADATA = ("task", "category", "grade", "skills", "context", "language")


def read(record: Mapping[str, Any], config: ConvertConfig) -> Draft | None:
    """A record of `data/testmini-*.parquet`; None for one of another split."""
    metadata = need(record, "metadata")
    if metadata.get("split", SPLIT) != SPLIT:
        return None
    kind, answer_type = need(record, "question_type"), need(record, "answer_type")
    precision = None if record.get("precision") is None else int(record["precision"])
    question, unit, options = str(need(record, "question")), record.get("unit"), lettered(record.get("choices") or [])
    hint = HINTS.get((CHOICE, None) if kind == CHOICE else (answer_type, precision if answer_type == "float" else None))
    if hint is None or (kind == CHOICE and not options):
        raise BadRecord(
            "unknown type",
            f"question_type is {short(kind)}, answer_type {short(answer_type)}, precision {precision}, with "
            f"{len(options)} choices; expected choices, or an integer, a float of precision 1 or 2, or a list",
        )
    lines = [f"Hint: {hint}", f"Question: {question}" + (f" (Unit: {unit})" if unit else "")]
    if options:
        lines += ["Choices:", *(f"({letter}) {text}" for letter, text in options.items())]
    return draft(
        record,
        config,
        benchmark=NAME,
        source=HUB,
        id=need(record, "pid"),
        answer=record.get("answer"),
        prompt="\n".join(lines),
        images=[need(record, "decoded_image")],
        question=question,
        options=options,
        question_type=kind,
        answer_type=answer_type,
        precision=precision,
        unit=unit,
        dataset=metadata.get("source"),
        **{name: metadata.get(name) for name in _METADATA},
    )


def extract(response: str, columns: Columns) -> str | None:
    """A letter, also where the response names the value of its option; a number without unit; a list as in Python."""
    if columns["question_type"] == CHOICE:
        return choose(response, columns["options"]) or option_with_value(response, columns["options"])
    if columns["answer_type"] == "list":
        return find_list(response)
    value = find_value(response)
    return None if value is None else number_in(value)


def score(extracted: str, columns: Columns) -> bool:
    """The authors' comparison: of the nearest choice, of integers cut, of numbers rounded to the precision, of lists.

    A share may be written in percent, and "1.2 million" is either 1.2 or 1,200,000.

    >>> score("3.96", {"question_type": "free_form", "answer_type": "float", "precision": 1, "answer": "4.0"})
    True
    """
    answer, kind = str(columns["answer"]), columns["answer_type"]
    if columns["question_type"] == CHOICE:
        options: Mapping[str, str] = columns["options"]
        return options.get(extracted) == answer or (
            extracted not in options and nearest(extracted, list(options.values())) == answer
        )
    if kind == "list":
        ours, theirs = parse_list(extracted), parse_list(answer)
        return ours is not None and ours == theirs
    given, right = readings(extracted), readings(answer)
    if not right:
        return False
    if kind == "integer":  # cut, but neither a share nor "1.2 million" to less than they say
        whole = given if len(given) == 1 else [number for number in given if number.is_integer()]
        return any(int(number) == int(right[0]) for number in whole)
    return any(same_number(number, right[0], int(columns["precision"])) for number in given)


def nearest(text: str, choices: Sequence[str]) -> str:
    """The choice with the smallest edit distance, the first of several.

    >>> nearest("a dogs", ["a cat", "a dog"])
    'a dog'
    """
    return min(choices, key=lambda choice: edit_distance(text[:MAX_COMPARED], choice))


def edit_distance(ours: str, theirs: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of characters."""
    row = list(range(len(theirs) + 1))
    for index, mine in enumerate(ours, 1):
        before, row[0] = row[0], index
        for column, other in enumerate(theirs, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (mine != other))
    return row[-1]


def question_to_judge(response: str, columns: Columns) -> str | None:
    """Ask for the letter, or the value in the unit of the question."""
    return (ask_letter if columns["question_type"] == CHOICE else ask_value)(response, columns)


def read_judgement(reply: str, columns: Columns) -> str | None:
    """The letter, number or list in a judge's reply."""
    if columns["question_type"] == CHOICE:
        return read_letter(reply, columns) or read_value(reply, columns)
    value = read_value(reply, columns)
    return None if value is None else extract(f"<answer>{value}</answer>", columns)


MATHVISTA = Benchmark(
    name=NAME,
    title="MathVista (testmini)",
    questions=1000,
    hub=HUB,
    files=("data/testmini-*.parquet",),
    draft=read,
    extract=extract,
    score=score,
    extraction_prompt=question_to_judge,
    read_judgement=read_judgement,
    categories=("question_type", "answer_type", *_METADATA, "dataset"),
)
