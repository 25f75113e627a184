"""Which responses are worth training on: pure functions of a text, and the configuration of their limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_PICTURE = r"(?:image|picture|figure|photo(?:graph)?|diagram|chart|graph|plot|drawing|map|table|scene|screenshot)"
ANCHORS = (
    r"\blook(?:ing|ed)?\s+(?:\w+\s+)?(?:back|again|closer|closely|once more|more closely|carefully)\b",
    r"\b(?:I|me|us)\s+(?:\w+\s+)?look\s+at\b",
    rf"\b(?:in|on|at|to|from|of|with|against)\s+(?:the|this)\s+(?:\w+\s+)?{_PICTURE}\b",
    rf"\b(?:the|this)\s+{_PICTURE}\s+(?:shows?|has|contains?|depicts?|confirms?|displays?)\b",
    rf"\b(?:check|re-?check|examin|inspect|consult|revisit|re-?read)(?:e|s|ed|ing)?\s+(?:the|this)\s+{_PICTURE}\b",
    r"\bI\s+(?:can\s+)?(?:also\s+|clearly\s+|now\s+|still\s+)?see\b",
    r"\b(?:zoom(?:ing)?|glanc(?:e|ing)|go(?:ing)?|return(?:ing)?)\s+(?:in|back)\s+(?:on|at|to)\s+the\b",
    r"\bvisually\b|\bvisual(?:ly)? (?:check|inspection|evidence)\b",
)
"""Phrases that return to the image."""
FORBIDDEN = (
    r"\b(?:the|this|that|a|your|my|given|provided|above|image|visual|textual|detailed)\s+(?:\w+\s+)?"
    r"(?:descriptions?|captions?)\b",
    r"\b(?:descriptions?|captions?)\s+(?:says?|states?|mentions?|tells?|notes?|given|provided|above)\b",
    r"\b(?:as|was|is|are|were)\s+described\b|\bdescribed (?:above|earlier|as|in)\b",
    r"\b(?:the|this)\s+(?:provided|given)\s+text\b",
)
"""Phrases that give away that the chain was written from a text."""
_WORD = re.compile(r"\w+(?:[.,'’]\w+)*")


@dataclass
class FilterConfig:
    """Limits that a response keeps."""

    agreement: bool = True
    """The final answer is the gold one, by the project's scorer."""
    min_anchors: int = 2
    """Fewest returns to the image in the chain."""
    anchors: list[str] = field(default_factory=lambda: list(ANCHORS))
    """Regular expressions of a return to the image; case is ignored."""
    anchor_parts: int = 3
    """Equal parts into which the chain is cut to see where its anchors are."""
    min_parts: int = 2
    """Fewest of these parts that have an anchor."""
    forbidden: list[str] = field(default_factory=lambda: list(FORBIDDEN))
    """Regular expressions of what a chain must not say; case is ignored."""
    min_words: int = 20
    """Shortest chain."""
    max_words: int = 6000
    """Longest chain."""
    ngram: int = 8
    """Words in a row that count as repeated."""
    max_repetition: float = 0.2
    """Largest share of such rows that came before."""
    duplicate_responses: bool = True
    """Reject a response that an earlier sample has too; the same image and question are never asked twice."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing can keep, and expressions that cannot be read."""
        if self.min_words > self.max_words:
            raise ValueError(f"filters.min_words={self.min_words} is above max_words={self.max_words}; lower it.")
        if not 0 <= self.min_parts <= self.anchor_parts or self.anchor_parts < 1:
            raise ValueError(
                f"filters.min_parts={self.min_parts} of anchor_parts={self.anchor_parts}, expected 0 ≤ min_parts ≤ "
                "anchor_parts and at least one part."
            )
        if self.ngram < 1 or not 0 <= self.max_repetition <= 1:
            raise ValueError(
                f"filters.ngram={self.ngram}, max_repetition={self.max_repetition}; expected ngram ≥ 1 and a share in "
                "[0, 1]."
            )
        for name in ("anchors", "forbidden"):
            for pattern in getattr(self, name):
                _compile_checked(pattern, name)


@dataclass(frozen=True)
class Scores:
    """What was measured of a chain.

    Attributes:
        anchors: Returns to the image.
        spread: Share of the chain's parts that have one, in [0, 1].
        words: Length.
        repetition: Share of rows of words that came before, in [0, 1).
    """

    anchors: int
    spread: float
    words: int
    repetition: float


def anchor_positions(chain: str, patterns: Sequence[str] = ANCHORS) -> list[int]:
    """Where a chain returns to the image, in characters; phrases that overlap count once.

    >>> anchor_positions("I look back at the image. Two dots. Looking again, I see three.")
    [2, 36, 51]
    """
    joined = re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE) if patterns else None
    found = [match.span() for match in joined.finditer(chain)] if joined else []
    positions: list[int] = []
    end = -2
    for start, stop in found:
        # "look back at the image" is one return: its second half begins where its first half ends.
        if start > end + 1:
            positions.append(start)
        end = stop
    return positions


def anchor_spread(chain: str, positions: Sequence[int], parts: int = 3) -> float:
    """Share of equal parts of the chain that have an anchor.

    >>> anchor_spread("x" * 90, [0, 5, 89], parts=3)
    0.6666666666666666
    """
    return len({min(position * parts // max(len(chain), 1), parts - 1) for position in positions}) / parts


def word_list(text: str) -> list[str]:
    """Words and numbers of a text, without case.

    >>> word_list("It's 3.5 cm, so 3.5.")
    ["it's", '3.5', 'cm', 'so', '3.5']
    """
    return _WORD.findall(text.casefold())


def repetition(text: str, n: int = 8) -> float:
    """Share of rows of n words that came before in the text.

    >>> repetition("a b a b a b", n=2)
    0.6
    >>> repetition("all of these words differ", n=2)
    0.0
    """
    words = word_list(text)
    rows = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(rows)) / len(rows) if rows else 0.0


def forbidden_phrase(chain: str, patterns: Sequence[str] = FORBIDDEN) -> str | None:
    """What a chain says that it must not; None where it says nothing of the kind.

    >>> forbidden_phrase("According to the description, it is red.")
    'the description'
    >>> forbidden_phrase("The sign reads STOP.") is None
    True
    """
    found = (re.search(pattern, chain, re.IGNORECASE) for pattern in patterns)
    return next((match[0] for match in found if match), None)


def normalised(response: str) -> str:
    """A response without case, marks and runs of white space, to find it again.

    >>> normalised("<think>It is  Red.</think>") == normalised("<think>it is red</think>")
    True
    """
    return " ".join(word_list(response))


def score(chain: str, config: FilterConfig) -> Scores:
    """Measure a chain."""
    positions = anchor_positions(chain, config.anchors)
    return Scores(
        anchors=len(positions),
        spread=round(anchor_spread(chain, positions, config.anchor_parts), 4),
        words=len(word_list(chain)),
        repetition=round(repetition(chain, config.ngram), 4),
    )


def first_objection(chain: str, scores: Scores, config: FilterConfig) -> tuple[str, str] | None:
    """The first filter that a chain does not pass, by name, and what is wrong; None where it passes all.

    >>> chain = "I see a cube. " + "One side is three long. " * 9
    >>> config = FilterConfig(min_anchors=1, min_parts=1)
    >>> first_objection(chain, score(chain, config), config)
    ('repetition', 'share 0.7857 of rows of 8 words came before, at most 0.2 may')
    """
    parts = round(scores.spread * config.anchor_parts)
    if scores.words < config.min_words:
        return "length", f"{scores.words} words, fewer than {config.min_words}"
    if scores.words > config.max_words:
        return "length", f"{scores.words} words, more than {config.max_words}"
    if scores.repetition > config.max_repetition:
        rows = f"share {scores.repetition:g} of rows of {config.ngram} words came before"
        return "repetition", f"{rows}, at most {config.max_repetition:g} may"
    if phrase := forbidden_phrase(chain, config.forbidden):
        return "mention", f"says {phrase!r}, which gives away that it was written from a text"
    if scores.anchors < config.min_anchors:
        return "anchors", f"{scores.anchors} return(s) to the image, fewer than {config.min_anchors}"
    if parts < config.min_parts:
        return (
            "spread",
            f"returns to the image in {parts} of {config.anchor_parts} parts, fewer than {config.min_parts}",
        )
    return None


def _compile_checked(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"filters.{name} has {pattern!r}, expected a regular expression ({error}).") from error
