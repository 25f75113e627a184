"""HallusionBench: 1,129 yes/no questions on figures that contradict what one knows, 178 of them without a figure.

Source: Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual
Illusion in Large Vision-Language Models" (arXiv 2310.14566), github.com/tianyi-lab/HallusionBench (utils.py), whose
judge tells correct, incorrect and unclear; here rules read yes or no first, as VLMEvalKit does. On questions that the
figure only supplements (VS), asked without it, an unclear answer counts as right. The closing words are VLMEvalKit's
for Qwen-VL (vlmeval/vlm/qwen2_vl/prompt.py).

Figures of accuracy: aAcc of all questions; fAcc of figures whose questions are all answered right (questions without a
figure have none); qAcc of questions that are right on each of their figures. The headline is the mean of the three.
VLMEvalKit asks the 951 questions with a figure only: category `figure`, "with".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from avar_lightning.benchmarks.answers import conclusion, stated, unmarked
from avar_lightning.benchmarks.benchmark import Benchmark, Columns, Row
from avar_lightning.benchmarks.drafting import draft, need
from avar_lightning.benchmarks.judging import ask
from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.formats import Draft
from avar_lightning.conversion.rejecting import BadRecord, short

NAME, HUB = "hallusionbench", "lmms-lab/HallusionBench"
CLOSING = " Please answer yes or no."
UNCLEAR = "unclear"
_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
# "No difference" is no "no".
_NO_NO = re.compile(r"\bno (?:one|longer|more|difference|change|doubt|matter|problem|question|two)\b", re.IGNORECASE)
_STATED = re.compile(
    r"\banswer\b(?: to (?:the|this) question)?(?:\s+(?:is|should be|would be))?\s*:?\s*(yes|no)\b"
    r"(?=\s*(?:[.,;:!]|$|because|since|as\b|although|but\b))",
    re.IGNORECASE,
)
_LEADING = re.compile(r"(?:(yes)\b|(no)\b(?=\s*(?:[.,;:!\n]|$)))", re.IGNORECASE)
_STANDING = re.compile(r"\b(?:(yes)\b|(no)\b(?=\s*(?:[.,;:!\n]|$)))", re.IGNORECASE)
_OPEN = re.compile(r"\bnot (?:a )?(?:yes|no)\b|\b(?:yes|no) or (?:yes|no)\b|\b(?:yes|no)\?", re.IGNORECASE)
_REPLY = re.compile(
    rf"(?:the )?(?:final )?(?:answer\b(?: of the response)?(?: is|:) )?(yes|no|{UNCLEAR})", re.IGNORECASE
)
_UNCLEAR = re.compile(
    r"\b(?:unclear|uncertain|unknown|not (?:clear|certain|sure)|"
    r"(?:can(?:not|'t| not)|impossible to|unable to|not possible to) (?:be )?(?:determine|tell|say|answer|know)\w*)",
    re.IGNORECASE,
)


def read(record: Mapping[str, Any], config: ConvertConfig) -> Draft:
    """A record of the split `image` or `non_image`."""
    keys = {name: str(need(record, name)) for name in _KEYS}
    gold = str(need(record, "gt_answer")).strip()
    if gold not in ("0", "1"):
        raise BadRecord("bad answer", f"gt_answer is {short(gold)}; expected 0 for no or 1 for yes")
    image = record.get("image")
    question = str(need(record, "question")).strip()
    return draft(
        record,
        config,
        benchmark=NAME,
        source=HUB,
        id="_".join(keys.values()),
        answer="yes" if gold == "1" else "no",
        prompt=question + CLOSING,
        images=[] if image is None else [image],
        question=question,
        figure="without" if image is None else "with",
        visual_input=str(record.get("visual_input")),
        gt_answer_details=record.get("gt_answer_details"),
        sample_note=record.get("sample_note"),
        category=keys["category"],
        subcategory=keys["subcategory"],
        set_id=keys["set_id"],
        figure_id=keys["figure_id"],
        question_id=keys["question_id"],
    )


def extract(response: str, columns: Columns) -> str | None:
    """yes, no or unclear; None where a response says both or neither.

    The last "the answer is yes"; else a word that begins the response and that no other contradicts; else, as in
    VLMEvalKit, the only one of both words.

    >>> extract("Yes, there is no difference.", {}), extract("I see no cat.", {}), extract("It is hard.", {})
    ('yes', 'no', None)
    """
    short_answer = stated(response)
    text = " ".join(unmarked(conclusion(response) if short_answer is None else short_answer).split())
    statements = _STATED.findall(text)
    if statements:
        return str(statements[-1]).lower()
    if _OPEN.search(text):
        return None
    leading = _LEADING.match(text)
    standing = {"yes" if yes else "no" for yes, no in _STANDING.findall(text)}
    if leading:
        return leading[0].lower() if len(standing) == 1 else None
    said = {word.lower() for word in _YES_OR_NO.findall(text)}
    if len(said) == 1 and not _UNCLEAR.search(text):
        return None if _NO_NO.search(text) else said.pop()
    return UNCLEAR if not said and _UNCLEAR.search(text) else None


def score(extracted: str, columns: Columns) -> bool:
    """Whether it is the right one; an unclear answer is, where the figure that would tell is not shown."""
    if extracted == UNCLEAR:
        return columns["category"] == "VS" and str(columns["figure_id"]) == "0"
    return extracted == columns["answer"]


def question_to_judge(response: str, columns: Columns) -> str | None:
    """As the authors' judge, without the reference: yes, no, or unclear."""
    return ask(response, columns, f"yes, no, or {UNCLEAR} if the response does not commit itself,")


def read_judgement(reply: str, columns: Columns) -> str | None:
    """yes, no or unclear."""
    text = unmarked(conclusion(reply))
    found = _REPLY.match(text)
    return found[1].lower() if found and re.match(r"\s*(?:[.,;:!\n]|$)", text[found.end() :]) else None


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of the three, aAcc, fAcc and qAcc; those without any group are left out of the mean."""
    figures: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    pairs: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for row in rows:
        place = (row.get("draw"), row["category"], row["subcategory"], row["set_id"])
        pairs[(*place, row["question_id"])].append(row["correct"])
        if not (row["category"] == "VS" and str(row["figure_id"]) == "0"):
            figures[(*place, row["figure_id"])].append(row["correct"])
    found = {"aAcc": sum(row["correct"] for row in rows) / len(rows)}
    for name, groups in (("fAcc", figures), ("qAcc", pairs)):
        if groups:
            found[name] = sum(all(group) for group in groups.values()) / len(groups)
    return {"mean": sum(found.values()) / len(found), **found}


def unit(columns: Columns) -> str:
    """Figures and question pairs cross within a set."""
    return "_".join(str(columns[name]) for name in _KEYS[:3])


HALLUSIONBENCH = Benchmark(
    name=NAME,
    title="HallusionBench",
    questions=1129,
    hub=HUB,
    files=("data/image-*.parquet", "data/non_image-*.parquet"),
    draft=read,
    extract=extract,
    score=score,
    extraction_prompt=question_to_judge,
    read_judgement=read_judgement,
    categories=("category", "subcategory", "visual_input", "figure"),
    unit=unit,
    metrics=metrics,
)
