"""What a judge is asked where rules find no answer in a response, and what its reply says."""

from __future__ import annotations

import re

from avar_lightning.benchmarks.answers import conclusion, unmarked
from avar_lightning.benchmarks.benchmark import Columns
from avar_lightning.benchmarks.letters import choose

NONE = "NONE"
MAX_RESPONSE = 6000  # characters; the answer stands at the end
_PREFIX = re.compile(
    r"(?i)^(?:the\s+)?(?:(?:extracted|final)\s+)?answer\b(?:\s+(?:of|in) the response)?\s*(?:\bis\b\s*:?|:)\s*"
)
_NOTHING = re.compile(
    r"(?i)(?:none|null|n/a)?(?:\s*(?:is\s+)?(?:given|stated|provided|found|available))?"
    r"|no (?:(?:final|clear|explicit) )?answer\b.*"
    r"|not (?:\w+ )?(?:given|stated|provided|specified|found|available|clear)\b.*"
)


def ask(response: str, columns: Columns, wanted: str) -> str | None:
    """The question to a judge: what was asked, what was answered, and the form of the reply.

    None for a response that was cut while it thought: what it thought is no answer, and nobody is to be asked.
    """
    text = conclusion(response)[-MAX_RESPONSE:]
    if not text:
        return None
    options = "".join(f"\n({letter}) {option}" for letter, option in (columns.get("options") or {}).items())
    return (
        "Below are a question and a response to it. Do not solve the question. Find the final answer that the "
        f"response itself gives, and reply with {wanted} alone; reply with {NONE} if it gives no final answer.\n\n"
        f"Question:\n{columns['question']}{options}\n\nResponse:\n{text}\n\nFinal answer of the response:"
    )


def ask_letter(response: str, columns: Columns) -> str | None:
    """Ask which option a response chooses."""
    return ask(response, columns, "the letter of the option")


def ask_value(response: str, columns: Columns) -> str | None:
    """Ask for the value in a response."""
    return ask(response, columns, "the answer, as short as it can be, without words around it")


def read_letter(reply: str, columns: Columns) -> str | None:
    """The letter in a judge's reply."""
    return choose(reply, columns.get("options") or {}) if read_value(reply, columns) else None


def read_value(reply: str, columns: Columns) -> str | None:
    """The value in a judge's reply, without the judge's own thinking; None where it found none."""
    text = _PREFIX.sub("", conclusion(reply).strip("*`_ ")).strip("*`_ ")
    return None if _NOTHING.fullmatch(unmarked(text).rstrip(".").strip()) else text.removesuffix(".").strip()
