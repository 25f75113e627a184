"""Open questions of MMMU: whether a response holds the right answer, by its numbers and its key phrases.

After eval/eval_utils.py of github.com/MMMU-Benchmark/MMMU: the tails of sentences behind words like "is" or "so", and
the numbers in them, are candidates; numbers are compared at two decimals, and a text is right where a candidate has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Value = str | float
MAX_SEARCHED = 1000  # characters of a phrase, from its end, in which numbers are looked for


def same_open_answer(response: str, answers: Sequence[str]) -> bool:
    """Whether one of the right answers is among the candidates of a response.

    >>> same_open_answer("So the total is $1,200.", ["1200"]), same_open_answer("It is 12.", ["1.2"])
    (True, False)
    """
    right = [value for answer in answers for value in normalize(str(answer))]
    for value in candidates(response):
        if isinstance(value, float):
            if value in right:
                return True
        elif any(isinstance(answer, str) and answer in value for answer in right):
            return True
    return False


def candidates(response: str) -> list[Value]:
    """Key phrases of a response and the numbers in them, normalised."""
    phrases = key_phrases(response)
    ends = [phrase[-MAX_SEARCHED:] for phrase in phrases]
    numbers = [number for end in ends for pattern in _NUMBERS for number in pattern.findall(end)]
    return [value for text in (*phrases, *numbers) for value in normalize(text)]


def key_phrases(response: str) -> list[str]:
    """For each line the shortest tail behind an indicator; the whole response where no line has one.

    An equals sign counts in the last line only.
    """
    text = response.strip().strip(".").lower()
    lines = text.split("\n")  # the authors also split before capitals, which their lowered text has none of
    phrases = []
    for index, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if index == len(lines) - 1 else _INDICATORS
        tails = [line.rsplit(word, 1)[-1].strip() for word in indicators if word in line]
        tails = [tail for tail in tails if tail]
        if tails and (shortest := min(tails, key=len)) not in set(":,.!?;'"):
            phrases.append(shortest)
    return phrases or [text]


def normalize(text: str) -> list[Value]:
    """A number at two decimals, or lower-case text; a single letter only beside a space, lest it is found anywhere."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
