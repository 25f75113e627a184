"""What may be spent: requests and tokens of the whole journal, with those on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from avar_lightning.synthesis.journal import Journal
from avar_lightning.synthesis.stages import Answer, Stage


class BudgetSpent(Exception):
    """Nothing more may be asked."""


class Budget:
    """Lets requests through while all that they may take still fits, and keeps the journal's book.

    A request reserves the most tokens that it is thought to take, `max_tokens` and an estimate of its prompt; one that
    does not fit waits until others are answered and have taken less. Servers may count a prompt's tokens, those of
    images above all, as more than was reserved, and what was on its way then goes over the limit by so much: nothing
    more is sent from there on. Retries are requests too. A request whose answer
    was lost on the way (time-out, broken connection) counts all tokens that it may have taken, since the server may
    charge them; one that was turned away (429, 5xx) counts none.
    """

    def __init__(self, journal: Journal, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.journal, self.max_requests, self.max_tokens = journal, max_requests, max_tokens
        self.spent = ""
        self.stopped = False
        self._settled = asyncio.Event()

    async def reserve(self, stage: str, tokens: int) -> int:
        """Wait until a request of at most so many tokens fits, and note it; returns its number.

        Raises:
            BudgetSpent: It will not fit, or the run is being stopped.
        """
        while not self.stopped:
            total = self.journal.total
            if self.max_requests is not None and total.requests >= self.max_requests:
                self.spent = f"max_requests={self.max_requests}"
                break
            if self.max_tokens is None or total.tokens + self.journal.reserved + tokens <= self.max_tokens:
                return self.journal.sent(stage, tokens)
            if not self.journal.in_flight:
                self.spent = f"max_tokens={self.max_tokens}"
                break
            await self._settled.wait()
        raise BudgetSpent

    def stop(self) -> None:
        """Let nothing more through."""
        self.stopped = True
        self._settle()

    def failed(self, number: int, why: str, tokens: int | None = None, *, empty: str = "") -> None:
        """A request came to nothing."""
        self.journal.failed(number, why, tokens, empty=empty)
        self._settle()

    def answered(self, number: int, key: str, answer: Answer, settings: str) -> None:
        """A request was answered."""
        self.journal.answered(number, key, answer, settings)
        self._settle()

    def _settle(self) -> None:
        self._settled.set()
        self._settled = asyncio.Event()


def cost(journal: Journal, stages: Mapping[str, Stage]) -> float | None:
    """What the answers cost by the prices of the configuration; None where it gives none."""
    total, priced = 0.0, False
    for name, stage in stages.items():
        spent = journal.spent.get(name)
        for price, tokens in (
            (stage.config.price_input, spent.prompt_tokens if spent else 0),
            (stage.config.price_output, spent.completion_tokens if spent else 0),
        ):
            priced |= price is not None
            total += (price or 0.0) * tokens / 1e6
    return total if priced else None
