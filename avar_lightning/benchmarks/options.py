"""Options of a multiple-choice question: by letter, out of a question's text, and which one a short answer means."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from avar_lightning.rewards.answers import chosen_option

LETTERS = string.ascii_uppercase[:10]  # no benchmark here has more options
_LISTED = re.compile(r"(?:^|(?<=[\s,;]))\(?([A-J])(?:\)|[.:](?=\s|\S))\s*")


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Texts of options by letter."""
    return dict(zip(string.ascii_uppercase, map(str, options)))


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a short answer means, by its letter, its text, or both in agreement; None for none or several.

    >>> options = {"A": "cat", "B": "a dog"}
    >>> letter_of("(B)", options), letter_of("A dog.", options), letter_of("B. cat and A", options)
    ('B', 'B', None)
    """
    letter = chosen_option(text, options)
    return letter if letter is not None and letter in (options or LETTERS) else None


def options_in(question: str) -> dict[str, str]:
    """Options that a question holds in its own text after `Options:` or `Choices:`, by letter; empty for none.

    >>> options_in("What is it?\\nOptions: A: a cat, B: a dog on a mat., C: none")
    {'A': 'a cat', 'B': 'a dog on a mat.', 'C': 'none'}
    >>> options_in("How long?\\nChoices:\\n(A) 1 m\\n(B) 2 m")
    {'A': '1 m', 'B': '2 m'}
    """
    head = re.search(r"(?i)\b(?:options|choices)\s*:", question)
    if head is None:
        return {}
    text, options = question[head.end() :], {}
    found: list[re.Match[str]] = []
    for match in _LISTED.finditer(text):
        if match[1] == LETTERS[len(found)]:  # letters inside the texts of options come out of order
            found.append(match)
        if len(found) == len(LETTERS):
            break
    for match, following in zip(found, [*found[1:], None]):
        end = following.start() if following is not None else len(text)
        options[match[1]] = text[match.end() : end].strip().rstrip(",").strip()
    return options if len(options) > 1 else {}
