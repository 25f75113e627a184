r"""MATH-Vision, test: 3,040 problems of mathematics competitions, with five options or a value as answer.

Source: Wang et al., "Measuring Multimodal Mathematical Reasoning with MATH-Vision Dataset" (arXiv 2402.14804),
github.com/mathllm/MATH-V: the prompt of models/Qwen-VL.py, scoring of evaluation/evaluate.py: the letter, or the value
of the right option; values are equal as text, or as numbers of two decimals. Expressions are compared by math-verify
here, which asks for equality where the authors round both sides to two decimals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avar_lightning.benchmarks.benchmark import Benchmark, Columns
from avar_lightning.benchmarks.drafting import draft, literal_list, need
from avar_lightning.benchmarks.judging import ask_letter, ask_value, read_letter, read_value
from avar_lightning.benchmarks.letters import choose
from avar_lightning.benchmarks.options import lettered
from avar_lightning.benchmarks.values import find_short_value, option_with_value, same_value
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft

NAME, HUB = "mathvision", "MathLLMs/MathVision"
OPENING = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
    'question, only one letter is allowed in the "\\boxed{}".'
)


def read(record: Mapping[str, Any], config: ConvertConfig) -> Draft:
    """A record of `data/test-*.parquet`. `<image1>` in a question names a part of its one image."""
    question, options = str(need(record, "question")), lettered(literal_list(record, "options"))
    drawn = "".join(options.values()) == "ABCDE"  # then the options are in the image
    lines = [] if drawn else [f"({letter}) {text}" for letter, text in options.items()]
    level = record.get("level")
    return draft(
        record,
        config,
        benchmark=NAME,
        source=HUB,
        id=need(record, "id"),
        answer=str(need(record, "answer")),
        prompt="\n".join([OPENING, question, *lines]),
        images=[need(record, "decoded_image")],
        question=question,
        options=options,
        question_type="multiple-choice" if options else "open",
        subject=record.get("subject"),
        level=None if level is None else str(level),
    )


def extract(response: str, columns: Columns) -> str | None:
    """A letter, also where the response names the value of its option; without options, the value."""
    options = columns.get("options")
    if not options:
        return find_short_value(response)
    return choose(response, options) or option_with_value(response, options, decimals=2)


def score(extracted: str, columns: Columns) -> bool:
    """Whether it is the right letter, or the right value; for options, that of the right one."""
    answer, options = str(columns["answer"]), columns.get("options") or {}
    if extracted in options:
        return extracted == answer
    return same_value(extracted, str(options.get(answer, answer)), decimals=2)


def question_to_judge(response: str, columns: Columns) -> str | None:
    """Ask for the letter or the value."""
    return (ask_letter if columns.get("options") else ask_value)(response, columns)


def read_judgement(reply: str, columns: Columns) -> str | None:
    """The letter or the value."""
    return (read_letter(reply, columns) if columns.get("options") else None) or read_value(reply, columns)


MATHVISION = Benchmark(
    name=NAME,
    title="MathVision",
    questions=3040,
    hub=HUB,
    files=("data/test-*.parquet",),
    draft=read,
    extract=extract,
    score=score,
    extraction_prompt=question_to_judge,
    read_judgement=read_judgement,
    categories=("subject", "level", "question_type"),
)
