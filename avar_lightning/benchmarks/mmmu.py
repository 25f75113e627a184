"""MMMU (validation, 900 questions of 30 subjects) and MMMU-Pro (1,730 questions, with ten options, and as screenshots).

Sources: Yue et al., "MMMU" (arXiv 2311.16502) and "MMMU-Pro" (arXiv 2409.02813), github.com/MMMU-Benchmark/MMMU:
prompts of mmmu/configs/llava1.5.yaml and mmmu-pro/prompts.yaml (`cot`), parsing of responses in eval/eval_utils.py.
Where the authors' parser finds nothing it guesses an option at random; here nothing is found then, which a judge may
decide, and counts as wrong otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from avar_lightning.benchmarks.answers import conclusion, stated
from avar_lightning.benchmarks.benchmark import Benchmark, Columns
from avar_lightning.benchmarks.drafting import draft, literal_list, need
from avar_lightning.benchmarks.judging import ask_letter, ask_value, read_letter, read_value
from avar_lightning.benchmarks.letters import choose, prescribed_line
from avar_lightning.benchmarks.openanswers import same_open_answer
from avar_lightning.benchmarks.options import lettered
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft
from avar_lightning.conversion.rejecting import BadRecord

MMMU_HUB, PRO_HUB = "MMMU/MMMU", "MMMU/MMMU_Pro"
CHOICE_CLOSING = "Answer with the option's letter from the given choices directly."
OPEN_CLOSING = "Answer the question using a single word or phrase."
_FORM = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER "
    "is one of options. Think step by step before answering."
)
STANDARD_CLOSING = f"Answer the preceding multiple choice question. {_FORM}"
VISION_PROMPT = f"Write out the multiple-choice question in the image and then solve it. {_FORM}"
MULTIPLE_CHOICE = "multiple-choice"
_DOUBT = re.compile(r"\b(?:if|would|not|never|wrong|incorrect|cannot|too|options?)\b|n't\b|\?")
_ID = re.compile(r"[^_]+_(.+)_\d+")


def read_mmmu(record: Mapping[str, Any], config: ConvertConfig) -> Draft | None:
    """A record of `SUBJECT/validation-*.parquet`; None for one of another split."""
    name, kind = str(need(record, "id")), str(need(record, "question_type"))
    if not name.startswith("validation_"):
        return None
    question, options = str(need(record, "question")), lettered(literal_list(record, "options"))
    lines = [question, *([*_bracketed(options), ""] if options else [])]  # with the authors' empty line
    closing = CHOICE_CLOSING if kind == MULTIPLE_CHOICE else OPEN_CLOSING
    answer = need(record, "answer")
    return draft(
        record,
        config,
        benchmark="mmmu",
        source=MMMU_HUB,
        id=name,
        answer=answer if kind == MULTIPLE_CHOICE else literal_list(record, "answer") or answer,
        prompt="\n".join([*lines, closing]),
        numbered=_images(record),
        question=question,
        options=options,
        question_type=kind,
        subject=_subject(name),
        **_more(record),
    )


def read_pro(record: Mapping[str, Any], config: ConvertConfig) -> Draft | None:
    """A record of `standard (10 options)/test-*.parquet`."""
    question, options = str(need(record, "question")), lettered(literal_list(record, "options"))
    lines = [question, *(f"{letter}. {text}" for letter, text in options.items()), STANDARD_CLOSING]
    return _pro(record, config, "mmmu_pro", question, options, prompt="\n".join(lines), numbered=_images(record))


def doubt_pro(records: Sequence[Mapping[str, Any]]) -> str:
    """The questions with four options have the columns, names and number of those with ten."""
    most = 0
    for record in records:
        with suppress(BadRecord):  # which the conversion names
            most = max(most, len(literal_list(record, "options")))
    return f"its questions have {most} options at most, as of standard (4 options)" if 0 < most <= 4 else ""


def read_vision(record: Mapping[str, Any], config: ConvertConfig) -> Draft | None:
    """A record of `vision/test-*.parquet`: the question is in the image."""
    options = lettered(literal_list(record, "options"))
    question = "(The question and its options are in an image.)"
    return _pro(
        record, config, "mmmu_pro_vision", question, options, prompt=VISION_PROMPT, images=[need(record, "image")]
    )


def extract(response: str, columns: Columns) -> str | None:
    """A letter, or for an open question the text that is searched for the answer."""
    if columns.get("question_type", MULTIPLE_CHOICE) != MULTIPLE_CHOICE:
        return stated(response) or conclusion(response) or None
    return choose(response, columns["options"], last=[option_said])


def extract_pro(response: str, columns: Columns) -> str | None:
    """A letter: that of the last `Answer: X`, which the prompt prescribes, or else as in MMMU."""
    return choose(response, columns["options"], first=[prescribed_line], last=[option_said])


def option_said(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text is in the last sentence of more than five words, as the authors look for it.

    >>> option_said("We add both. So the total comes to $7 then", {"A": "$6", "B": "$7"})
    'B'
    """
    if len(text.split()) <= 5:
        return None
    sentences = [part for part in re.split(r"(?<=[.!?;])\s+|\n", text.casefold()) if part.strip()]
    if not sentences or _DOUBT.search(sentences[-1]):
        return None
    said = [
        letter
        for letter, option in options.items()
        if option and re.search(rf"(?<![\w.]){re.escape(option.casefold())}(?!\w|\.\d)", sentences[-1])
    ]
    return said[0] if len(said) == 1 else None


def score(extracted: str, columns: Columns) -> bool:
    """Whether the letter is the right one, or the text holds an open question's answer."""
    answer = columns["answer"]
    if columns.get("question_type", MULTIPLE_CHOICE) == MULTIPLE_CHOICE:
        return extracted == answer
    return same_open_answer(extracted, answer if isinstance(answer, list) else [str(answer)])


def question_to_judge(response: str, columns: Columns) -> str | None:
    """Ask for the letter or the value."""
    return (ask_letter if columns.get("options") else ask_value)(response, columns)


def read_judgement(reply: str, columns: Columns) -> str | None:
    """The letter or the value."""
    return (read_letter if columns.get("options") else read_value)(reply, columns)


def _pro(
    record: Mapping[str, Any],
    config: ConvertConfig,
    benchmark: str,
    question: str,
    options: dict[str, str],
    **shown: Any,
) -> Draft:
    return draft(
        record,
        config,
        benchmark=benchmark,
        source=PRO_HUB,
        id=need(record, "id"),
        answer=need(record, "answer"),
        question=question,
        options=options,
        question_type=MULTIPLE_CHOICE,
        subject=record.get("subject") or _subject(str(record["id"])),
        **_more(record),
        **shown,
    )


def _images(record: Mapping[str, Any]) -> dict[int, Any]:
    return {number: record.get(f"image_{number}") for number in range(1, 8)}


def _bracketed(options: Mapping[str, str]) -> list[str]:
    return [f"({letter}) {text}" for letter, text in options.items()]


def _subject(name: str) -> str:
    found = _ID.fullmatch(name)
    return found[1] if found else ""


def _more(record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that both have, where the record has them."""
    more = {name: record[name] for name in ("topic_difficulty", "subfield") if record.get(name)}
    if record.get("img_type"):
        more["img_type"] = literal_list(record, "img_type")
    return more


def _benchmark(name: str, title: str, **more: Any) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        score=score,
        extraction_prompt=question_to_judge,
        read_judgement=read_judgement,
        **more,
    )


MMMU = _benchmark(
    "mmmu",
    "MMMU",
    questions=900,
    hub=MMMU_HUB,
    files=("*/validation-*.parquet",),
    draft=read_mmmu,
    extract=extract,
    categories=("subject", "topic_difficulty", "img_type", "question_type"),
)
MMMU_PRO = _benchmark(
    "mmmu_pro",
    "MMMU-Pro (10 options)",
    questions=1730,
    hub=PRO_HUB,
    files=("standard (10 options)/test-*.parquet",),
    draft=read_pro,
    extract=extract_pro,
    doubt=doubt_pro,
    categories=("subject", "topic_difficulty", "img_type"),
)
MMMU_PRO_VISION = _benchmark(
    "mmmu_pro_vision",
    "MMMU-Pro (vision)",
    questions=1730,
    hub=PRO_HUB,
    files=("vision/test-*.parquet",),
    draft=read_vision,
    extract=extract_pro,
    categories=("subject",),
)
