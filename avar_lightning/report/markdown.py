"""Tables for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without an end of its last line.

    >>> print(markdown_table(["model", "r"], [["base", "0.5"]]))
    | model | r |
    |---|---|
    | base | 0.5 |
    """
    return "\n".join([_row(headings), "|" + "---|" * len(headings), *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    """One of its lines."""
    return f"| {' | '.join(cells)} |"
