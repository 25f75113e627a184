"""What a synthesis did, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from avar_lightning.synthesis.stages import Outcome

MEANINGS = {
    "input": "cannot be asked",
    "repeated": "same image and question as before",
    "refused": "a server will not or cannot answer; retry_refused asks again",
    "cut": "an answer reached max_tokens",
    "format": "no final answer, or no <think>…</think><answer>…</answer>",
    "agreement": "the answer is not the gold one",
    "length": "too few or too many words",
    "repetition": "rows of words repeat",
    "mention": "speaks of a description",
    "anchors": "too few returns to the image",
    "spread": "returns are crowded in one place",
    "duplicate": "same response as another sample's",
}
"""Reasons for a rejection, in the order in which they are looked for."""


@dataclass
class SynthesisReport:
    """What became of the samples, and what was spent in the life of the journal.

    Attributes:
        read: Samples of the input.
        kept: Written to the shards.
        rejected: By reason; all of `MEANINGS`.
        left: Not yet answered.
        spent: By stage: requests, answers, tokens of prompts and answers, answers whose tokens were estimated, and
            tokens counted for requests whose answer was lost.
        cost: Of the answers, by the configured prices; None without prices.
        budget: The limit that ended the run; empty where none did.
        shards: That were written.
    """

    read: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEANINGS, 0))
    left: int = 0
    spent: dict[str, dict[str, int]] = field(default_factory=dict)
    cost: float | None = None
    budget: str = ""
    shards: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Of all stages."""
        return sum(stage["requests"] for stage in self.spent.values())

    @property
    def tokens(self) -> int:
        """Of all stages."""
        names = ("prompt_tokens", "completion_tokens", "lost_tokens")
        return sum(stage[name] for stage in self.spent.values() for name in names)

    def __str__(self) -> str:
        rows: list[tuple[str, Any, str]] = [("read", self.read, ""), ("kept", self.kept, _share(self.kept, self.read))]
        rows += [(f"  {name}", count, MEANINGS[name]) for name, count in self.rejected.items() if count]
        rows.insert(2, ("rejected", sum(self.rejected.values()), _share(sum(self.rejected.values()), self.read)))
        if self.left:
            rows.append(("left", self.left, "run the same command again to go on" if not self.budget else
                         f"{self.budget} is spent; raise it and run the same command again"))  # fmt: skip
        for name, stage in self.spent.items():
            rows.append((f"{name} requests", stage["requests"], _tokens_text(stage)))
        lines = [f"{name:<20}{count:>10,}  {note}".rstrip() for name, count, note in rows]
        return "\n".join(lines + ([] if self.cost is None else [f"{'cost':<20}{self.cost:>10,.2f}"]))


class Tally:
    """Counts outcomes for the progress bar."""

    def __init__(self) -> None:
        self.kept, self.rejected = 0, Counter[str]()

    def add(self, outcome: Outcome) -> None:
        """Count one."""
        if outcome.reason:
            self.rejected[outcome.reason] += 1
        else:
            self.kept += 1


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else ""


def _tokens_text(stage: Mapping[str, int]) -> str:
    text = f"{stage['prompt_tokens']:,} tokens read, {stage['completion_tokens']:,} written"
    text += f", {stage['lost_tokens']:,} at most lost on the way" if stage["lost_tokens"] else ""
    return text + (f"; {stage['estimated']:,} answers did not say, and are estimated" if stage["estimated"] else "")
