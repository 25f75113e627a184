"""What a response finally says: its last word after the thinking, and the letter of an option in it."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from avar_lightning.rewards import accuracy_reward, extract_answer

LETTERS = string.ascii_uppercase[:10]  # no benchmark here has more options
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|should be|would be|must be))?\s*:?\s*"
    r"(?:(?:the\s+)?(?:option|choice))?)"
    r"[\s:*$`\"'{]*(?:\\(?:text|boxed)\{)?\(?([A-Z])\)?(?![\w'’-])"
)
_NAMED = re.compile(
    r"(?i)\b(?:answer|result|solution)\b(?:\s+(?:is|should be|would be)\b\s*:?|\s*:)\s*(?:\*\*)?\s*(\S.*)"
)
_SENTENCE = re.compile(r"(?<=[^\s.])\.(?:\s|$)")
_LEADING = re.compile(r"[\s*(\[]*([A-Z])(?:[).:\]*]|\s*$|\s*\n)")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_AFTER_A_LETTER = re.compile(r"\s+(?!is\b|because\b|since\b|as\b|and\b|for\b|but\b|which\b|from\b|in\b)[a-z]")
_LISTED = re.compile(r"(?:^|(?<=[\s,;]))\(?([A-J])(?:\)|[.:](?=\s|\S))\s*")


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


def named(text: str) -> str | None:
    """What follows the last "the answer is" or "Answer:", to the end of its sentence; None where neither is said.

    >>> named('The answer is "1.5 cm". It was long.')
    '1.5 cm'
    """
    found = _NAMED.findall(text)
    return _SENTENCE.split(found[-1], 1)[0].strip().rstrip(".").strip("*$`\"'“” ") if found else None


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a short answer means, by its letter, its text, or both in agreement; None for none or several.

    >>> options = {"A": "cat", "B": "a dog"}
    >>> letter_of("(B)", options), letter_of("A dog.", options), letter_of("B. cat and A", options)
    ('B', 'B', None)
    """
    letters = list(options) or list(LETTERS)
    tags = [f"<answer>{text}</answer>"] * len(letters)
    verdicts = accuracy_reward(tags, letters, options=[options or None] * len(letters))
    found = [letter for letter, same in zip(letters, verdicts) if same]
    return found[0] if len(found) == 1 else None


def choose(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that a response chooses; None where rules find none.

    In this order: what is tagged or boxed; the whole of a short response; the last "the answer is …", with a letter or
    the text of an option; a letter that begins the response like an item of a list; the last letter in brackets. A word
    "A" at the beginning of a sentence is no letter.

    Args:
        response: What the model wrote, thinking included.
        options: Texts by letter; empty where they are not known, then any letter from A to J counts.

    >>> options = {"A": "3", "B": "4"}
    >>> choose("A square has four sides, so the answer is (B).", options), choose("A square is a square.", options)
    ('B', None)
    """
    letters = set(options) or set(LETTERS)
    short = stated(response)
    text = conclusion(response) if short is None else short
    whole = letter_of(text, options)
    if whole is not None:
        return whole
    letter = (
        _last_statement(text) or letter_of(named(text) or "", options) or _first_letter(text) or _last_bracketed(text)
    )
    return letter if letter in letters else None


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


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Texts of options by letter."""
    return dict(zip(string.ascii_uppercase, map(str, options)))


def _last_statement(text: str) -> str | None:
    text = re.sub(r"\s+", " ", text)  # a model that fell into a loop writes thousands of them
    found = [match for match in _STATED.finditer(text) if not is_word(text, match[1], match.end(1))]
    return found[-1][1] if found else None


def _first_letter(text: str) -> str | None:
    found = _LEADING.match(text)
    return found[1] if found else None


def _last_bracketed(text: str) -> str | None:
    found = _BRACKETED.findall(text)
    return found[-1] if found else None


def is_word(text: str, letter: str, end: int) -> bool:
    """Whether a letter that ends there in a text is the article "A" or the pronoun "I"."""
    return letter in "AI" and _AFTER_A_LETTER.match(text, end) is not None
