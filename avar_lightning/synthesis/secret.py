"""The key of a server, kept out of all that is said and written."""

from __future__ import annotations

import re

MIN_LENGTH = 8
"""Characters from which a key is looked for in answers; shorter ones are dummies, and stand in any text."""


class Secret:
    r"""Finds a key in what others wrote, also with the escapes of JSON.

    Args:
        key: Printable ASCII without blanks; None where no key is sent.

    >>> Secret("sk-01234/56").clean(r'{"error": "no such key: sk-01234\\/56"}')
    '{"error": "no such key: [key]"}'
    >>> Secret("0").clean("port 8000 is busy")
    '[not shown: it holds the key]'
    """

    def __init__(self, key: str | None) -> None:
        self._short = key is not None and len(key) < MIN_LENGTH
        each = (rf"\\*(?:{re.escape(char)}|(?i:u{ord(char):04x}))" for char in key or "")
        self._pattern = re.compile("".join(each)) if key else None

    def clean(self, text: str) -> str:
        """A text without the key; none of it where the key is too short to be told from other words."""
        if self._pattern is None:
            return text
        if self._short:
            return "[not shown: it holds the key]" if self._pattern.search(text) else text
        return self._pattern.sub("[key]", text)

    def is_in(self, text: str) -> bool:
        """Whether a text holds the key; always false for a short one."""
        return self._pattern is not None and not self._short and self._pattern.search(text) is not None
