"""Have every sample answered: so many at a time, each stage by its server, the journal before any server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator, Mapping

from avar_lightning.synthesis.budget import Budget, BudgetSpent
from avar_lightning.synthesis.client import Endpoint, Unanswerable
from avar_lightning.synthesis.config import SynthesisConfig
from avar_lightning.synthesis.inputs import Item
from avar_lightning.synthesis.journal import Journal, key_of
from avar_lightning.synthesis.stages import Answer, Call, Outcome, Stage, walk
from avar_lightning.synthesis.wire import body_of

GRACE = 30.0
"""Seconds for which answers on their way are waited for when the run is ended: they are paid."""


class Asker:
    """Walks samples through their stages.

    Args:
        config: The synthesis.
        stages: With their prompts.
        journal: Where answers are looked for first, and kept.
        make_endpoints: Makes the servers' clients, inside the event loop.
        told: Called with each sample's outcome, in the order in which they end.
    """

    def __init__(
        self,
        config: SynthesisConfig,
        stages: Mapping[str, Stage],
        journal: Journal,
        make_endpoints: Callable[[Budget], Mapping[str, Endpoint]],
        told: Callable[[Outcome], None],
    ) -> None:
        self.config, self.stages, self.journal = config, stages, journal
        self.make_endpoints, self.told = make_endpoints, told
        self.spent = ""
        self._failure: BaseException | None = None
        self._asked: dict[str, asyncio.Task[Answer]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._ended = threading.Event()

    async def run(self, items: Iterator[Item]) -> None:
        """Ask until all is answered, the budget is spent, or a server refuses.

        Raises:
            EndpointError: A server refuses, or is away.
        """
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        self.budget = Budget(self.journal, self.config.max_requests, self.config.max_tokens)
        self.endpoints = self.make_endpoints(self.budget)
        running: set[asyncio.Task[None]] = set()
        try:
            # The next sample is read when there is room for it: the input may be larger than memory.
            while not self._ending and (item := await asyncio.to_thread(next, items, None)) is not None:
                running.add(asyncio.create_task(self._finish(item)))
                if len(running) >= self.config.concurrency:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            while running and not self._failure:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            if running:
                _, running = await asyncio.wait(running, timeout=GRACE)
        finally:
            for task in (*running, *self._asked.values()):
                task.cancel()
            await asyncio.gather(*running, *self._asked.values(), return_exceptions=True)
            for endpoint in self.endpoints.values():
                await endpoint.close()
            self._ended.set()
        if self._failure is not None:
            raise self._failure
        self.spent = self.budget.spent

    def interrupt(self) -> None:
        """End from another thread, and wait for the end: what is on its way is dropped, and noted as lost."""
        if self._loop is not None and self._main is not None:
            self._loop.call_soon_threadsafe(self._main.cancel)
            self._ended.wait(GRACE)

    @property
    def _ending(self) -> bool:
        return bool(self._failure or self.budget.spent)

    async def _finish(self, item: Item) -> None:
        try:
            self.told(await self._walk(item))
        except BudgetSpent:
            return  # a later run asks for it
        except Exception as error:
            self._failure = self._failure or error
            self.budget.stop()

    async def _walk(self, item: Item) -> Outcome:
        steps = walk(item, self.stages, self.config.filters)
        answer: Answer | None = None
        while True:
            # In a thread: comparing answers may take seconds.
            step = await asyncio.to_thread(_advance, steps, answer)
            if isinstance(step, Outcome):
                return step
            answer = await self._answer(step)

    async def _answer(self, call: Call) -> Answer:
        key = key_of(call, self.config.seed)
        found = self.journal.find(key)
        if found is not None:
            return found
        if key not in self._asked:  # several samples may want the same: one image, many questions
            task = self._asked[key] = asyncio.create_task(self._ask(call, key))
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        return await asyncio.shield(self._asked[key])

    async def _ask(self, call: Call, key: str) -> Answer:
        seed, image_format = self.config.seed, self.config.image_format
        body = await asyncio.to_thread(body_of, call, key, seed=seed, image_format=image_format)
        try:
            return await self.endpoints[call.stage.name].ask(call, key, body)
        except Unanswerable as error:
            self.journal.refused(call.stage.name, key, str(error))
            return Answer(refused=str(error))


def replay(item: Item, stages: Mapping[str, Stage], config: SynthesisConfig, journal: Journal) -> Outcome | None:
    """What became of a sample, from the journal alone; None where an answer is missing."""
    steps = walk(item, stages, config.filters)
    step = _advance(steps, None)
    while isinstance(step, Call):
        answer = journal.find(key_of(step, config.seed))
        if answer is None:
            return None
        step = _advance(steps, answer)
    return step


def _advance(steps: Generator[Call, Answer, Outcome], answer: Answer | None) -> Call | Outcome:
    try:
        return next(steps) if answer is None else steps.send(answer)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
