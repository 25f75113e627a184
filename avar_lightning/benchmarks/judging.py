"""What a judge is asked where rules find no answer in a response, and what its reply says."""

from __future__ import annotations

import re

from avar_lightning.benchmarks.answers import conclusion, letter_of
from avar_lightning.benchmarks.benchmark import Columns

NONE = "NONE"
MAX_RESPONSE = 6000  # characters; the answer stands at the end


def ask(response: str, columns: Columns, wanted: str) -> str:
    """The question to a judge: what was asked, what was answered, and the form of the reply."""
    text = (conclusion(response) or response)[-MAX_RESPONSE:]
    options = "".join(f"\n({letter}) {option}" for letter, option in (columns.get("options") or {}).items())
    return (
        "Below are a question and a response to it. Do not solve the question. Find the final answer that the "
        f"response itself gives, and reply with {wanted} alone; reply with {NONE} if it gives no final answer.\n\n"
        f"Question:\n{columns['question']}{options}\n\nResponse:\n{text}\n\nFinal answer of the response:"
    )


def ask_letter(response: str, columns: Columns) -> str:
    """Ask which option a response chooses."""
    return ask(response, columns, "the letter of the option")


def ask_value(response: str, columns: Columns) -> str:
    """Ask for the value in a response."""
    return ask(response, columns, "the answer, as short as it can be, without words around it")


def read_letter(reply: str, columns: Columns) -> str | None:
    """The letter in a judge's reply."""
    return letter_of(reply.strip(), columns.get("options") or {})


def read_value(reply: str, columns: Columns) -> str | None:
    """The value in a judge's reply."""
    text = re.sub(r"^(?:extracted|final)?\s*answer\s*(?:of the response)?\s*:\s*", "", reply.strip(), flags=re.I)
    return None if not text or text.strip(" .").upper() in (NONE, "NULL") else text
