"""Records that cannot become samples: why, where, and how many of each kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class BadRecord(ValueError):
    """A record that cannot become a sample.

    Args:
        kind: A few words under which such records are counted.
        reason: One sentence that names the value, what was expected, and where it helps, the fix.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Rejection:
    """One line of ``rejected.jsonl``.

    Attributes:
        index: Number of the record in the input, from 0.
        where: ``FILE:LINE``, or ``FILE:row N`` in a table, counted from 0.
        kind: A few words under which it is counted.
        reason: What is wrong with it.
        id: The record's own name, where it has one.
    """

    index: int
    where: str
    kind: str
    reason: str
    id: Any = None

    def row(self) -> dict[str, Any]:
        """What ``rejected.jsonl`` says of it."""
        return {name: value for name, value in asdict(self).items() if name != "index"}


@dataclass
class Tally:
    """Counts over any number of records.

    Attributes:
        records: Records that were read.
        left_out: Good records that were not asked for, as another version of the same questions.
        rejected: How many of them were rejected, by kind.
        examples: The first rejection of every kind.
    """

    records: int = 0
    left_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Rejection] = field(default_factory=dict)

    @property
    def num_rejected(self) -> int:
        """All that were rejected."""
        return sum(self.rejected.values())

    @property
    def num_samples(self) -> int:
        """All that became samples."""
        return self.records - self.left_out - self.num_rejected

    def reject(self, rejection: Rejection) -> None:
        """Count one more."""
        self._count(rejection.kind, 1, rejection)

    def add(self, other: Tally) -> None:
        """Count another part of the records, in any order."""
        self.records += other.records
        self.left_out += other.left_out
        for kind, count in other.rejected.items():
            self._count(kind, count, other.examples[kind])

    def _count(self, kind: str, count: int, example: Rejection) -> None:
        self.rejected[kind] = self.rejected.get(kind, 0) + count
        first = self.examples.get(kind)
        self.examples[kind] = example if first is None or example.index < first.index else first

    def lines(self) -> list[str]:
        """A line for every kind, the most frequent first, with an example.

        >>> tally = Tally(records=2)
        >>> tally.reject(Rejection(1, "a.json:2", "not JSON", "the line is not JSON"))
        >>> tally.lines()
        ['1 × not JSON, first at a.json:2: the line is not JSON']
        """
        kinds = sorted(self.rejected, key=lambda kind: (-self.rejected[kind], self.examples[kind].index))
        shown = [(self.rejected[kind], kind, self.examples[kind]) for kind in kinds]
        return [f"{count} × {kind}, first at {first.where}: {first.reason}" for count, kind, first in shown]


def short(value: Any) -> str:
    """The value as a message shows it."""
    try:
        text = repr(value[:80] if isinstance(value, str | bytes) else value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"
