"""What a response finally says: its last word after the thinking, and what it calls its answer."""

from __future__ import annotations

import re

from avar_lightning.rewards import extract_answer

_WRAPPED = re.compile(r"\\(?:boxed|text|textbf|textit|mathbf|mathrm|mathit|boldsymbol|bm)\s*\{([^{}]*)\}")
_MARKS = re.compile(r"\\[()\[\]]|```\w*|[*`#\"“”]|\$\$?|</?answer>|(?<![A-Za-z0-9])__?|__?(?![A-Za-z0-9])")
_FULL_WIDTH = str.maketrans({"（": "(", "）": ")", "：": ":", "，": ",", "。": ".", "．": ".", "；": ";", "？": "?"})
_NAMED = re.compile(
    r"(?i)\b(?:answer|result|solution|final (?:value|number|list))\b"
    r"(?:\s+(?:is|should be|would be|must be)\b\s*:?|\s*:)[\s,]*(?=\S)"
)
_ADVERBS = re.compile(
    r"(?i)^(?:(?:clearly|obviously|simply|exactly|therefore|thus|then|indeed|just|about|approximately|around|roughly|≈)"
    r"[\s,:]+|≈\s*)*"
)
_SENTENCE = re.compile(r"(?<=[^\s.])\.(?:\s|$)")
_NEGATED = re.compile(r"(?i)(?:not|never|neither)\b")


def conclusion(response: str) -> str:
    """A response without its thinking; nothing of one that was cut while it thought, unless it has answered already.

    >>> conclusion("<think>A? No.</think> B")
    'B'
    >>> conclusion("<think>It may be A, or")
    ''
    """
    before, closed, after = response.rpartition("</think>")
    if closed:
        return after.strip() or before[before.rfind("<answer>") :].strip() * ("<answer>" in before)
    if "<think>" in response:
        start = response.rfind("<answer>")
        return response[start:].strip() if start >= 0 else ""
    return response.strip()


def stated(response: str) -> str | None:
    r"""What a reasoning model names as its answer, in `<answer>…</answer>` or `\boxed{…}`; None where it names none."""
    return extract_answer(conclusion(response)) or None


def unmarked(text: str) -> str:
    r"""A text without Markdown, and without what TeX and tags put around words.

    >>> unmarked(r"**Answer:** $\mathbf{B}$ or \boxed{\text{C}}")
    'Answer: B or C'
    """
    for _ in range(3):  # \boxed{\textbf{(B)}} and the like
        text, count = _WRAPPED.subn(r"\1", text)
        if not count:
            break
    return re.sub(r"[^\S\n]+", " ", _MARKS.sub("", text.translate(_FULL_WIDTH))).strip()


def named(text: str) -> str | None:
    """What follows the last "the answer is" or "Answer:", to the end of its sentence; None where neither is said.

    What the answer is not is no answer.

    >>> named('The answer is "1.5 cm". It was long.'), named("The answer is not 5.")
    ('1.5 cm', None)
    """
    text = re.sub(r"\*\*|```\w*|\$\$|\\\[|\\\]", " ", text)
    for head in reversed(list(_NAMED.finditer(text))):
        line = text[head.end() :].split("\n", 1)[0]
        value = _SENTENCE.split(line, maxsplit=1)[0].strip().rstrip(".").strip("*$`\"'“” ")
        if value:
            return None if _NEGATED.match(value) else without_adverbs(value)
    return None


def without_adverbs(value: str) -> str:
    """A value without "clearly" or "about" before it."""
    return _ADVERBS.sub("", value, count=1)
