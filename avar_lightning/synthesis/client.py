"""Calls to OpenAI-compatible servers: sent with the `openai` client, and tried again until they are answered whole.

The key is read from the environment and handed to the client. Errors of a server are freed of it before they are shown
or written; answers are taken as they are or, where one repeats the key, not at all.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type
from tenacity.wait import wait_random_exponential
from tqdm import tqdm

from avar_lightning.synthesis.budget import Budget
from avar_lightning.synthesis.config import DEMO
from avar_lightning.synthesis.journal import settings_of
from avar_lightning.synthesis.secret import Secret
from avar_lightning.synthesis.stages import Answer, Call, Stage
from avar_lightning.synthesis.wire import Trouble, prompt_estimate, read_answer

FIRST_WAIT = 1.0
"""Longest wait before the second try, in seconds; it doubles with each that follows."""
SILENCE, REMINDER = 15.0, 60.0
"""Seconds for which a server may answer nothing before it is said, and before it is said again."""
MAX_UNUSABLE = 6
"""Answers to one call that may come whole and hold nothing, before its sample is given up: each of them is paid."""
_UNANSWERABLE = re.compile(
    r"context[ _]?length|context window|maximum (?:context|model|sequence|prompt|input)|too (?:long|large|many tokens)"
    r"|content[ _]?(?:policy|filter|management)|safety|decode (?:the )?image|invalid image",
    re.IGNORECASE,
)
"""What a server says of a request that only this sample has wrong."""
Answering = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class Unanswerable(Exception):
    """The server will not answer this sample; others may be answered.

    Attributes:
        tokens: That the last try cost.
    """

    def __init__(self, why: str, tokens: int | None = 0) -> None:
        super().__init__(why)
        self.tokens = tokens


class EndpointError(RuntimeError):
    """The server will not answer anything that is asked this way; the run ends."""


class _Patience:
    """Ends tries when the next one would begin too long after the first failure, however long that took to come."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.first_failure = seconds, 0.0

    def __call__(self, state: RetryCallState) -> bool:
        now = time.monotonic()
        self.first_failure = self.first_failure or now
        return now + state.upcoming_sleep - self.first_failure > self.seconds


class Endpoint:
    """The server of one stage.

    Args:
        stage: Whose server it is.
        budget: Lets requests through and keeps their answers.
        patience: Seconds for which a call is tried again after it first failed.
        max_wait: Longest wait between tries that the server did not ask for.
        connections: To all servers.
    """

    def __init__(
        self, stage: Stage, budget: Budget, *, patience: float, max_wait: float, connections: httpx2.AsyncClient
    ) -> None:
        self.stage, self.budget, self.patience, self.max_wait = stage, budget, patience, max_wait
        config = stage.config
        self._secret, self._settings = Secret(config.api_key), settings_of(stage)
        self._last_answer = 0.0
        self._silent_since: float | None = None
        self._told = -math.inf
        self._openai = _openai()
        self._client = self._openai.AsyncOpenAI(
            base_url="http://demo.invalid/v1" if config.base_url == DEMO else config.base_url,
            api_key=config.api_key or "none",  # servers without keys ignore it; unset, the client would look for one
            organization="",
            project="",
            timeout=config.timeout,
            max_retries=0,
            http_client=connections,
        )

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.close()

    async def ask(self, call: Call, key: str, body: Mapping[str, Any]) -> Answer:
        """Send a request until it is answered whole, with growing waits; the answer is in the journal on return.

        Raises:
            BudgetSpent: Before a try that does not fit the budget.
            Unanswerable: The server will not or cannot answer this sample.
            EndpointError: The server refuses in a way that holds for every sample, or is away.
        """
        self._refuse_empty(key)
        begun = time.monotonic()
        tries = AsyncRetrying(
            retry=retry_if_exception_type(Trouble),
            stop=_Patience(self.patience),
            wait=self._wait,
            before_sleep=self._tell_of_silence,
        )
        try:
            async for attempt in tries:
                with attempt:
                    try:
                        return await self._once(call, key, body)
                    except Trouble:
                        self._refuse_empty(key)
                        raise
        except RetryError as error:
            last, count = error.last_attempt.exception(), error.last_attempt.attempt_number
            said = f"no answer in {count} tries over {self.patience:g} s (last: {last})"
            if self._last_answer > begun:  # the server is well; something about this one brings it down
                raise Unanswerable(said) from last
            raise EndpointError(
                f"{self._name} gave {said}; see that it runs and can be reached, and run the same command again: "
                "nothing that was answered is asked again."
            ) from last
        raise AssertionError("tenacity ends with an answer or an error")

    async def _once(self, call: Call, key: str, body: Mapping[str, Any]) -> Answer:
        """One try, with its place in the book."""
        most = prompt_estimate(call) + self.stage.config.max_tokens
        number = await self.budget.reserve(self.stage.name, most)
        try:
            answer = read_answer(await self._send(body), call)
            if self._secret.is_in(f"{answer.content}\n{answer.reasoning}\n{answer.finish_reason}"):
                raise Unanswerable("the answer repeats the key", answer.prompt_tokens + answer.completion_tokens)
        except Trouble as trouble:
            self.budget.failed(number, str(trouble), trouble.tokens, empty=key if trouble.unusable else "")
            raise
        except Unanswerable as refusal:
            self.budget.failed(number, str(refusal), refusal.tokens)
            raise
        except EndpointError as refusal:
            self.budget.failed(number, str(refusal), 0)
            raise
        except BaseException as ended:  # cancelled: nobody will hear the answer
            self.budget.failed(number, type(ended).__name__)
            raise
        self.budget.answered(number, key, answer, self._settings)
        self._last_answer, self._silent_since = time.monotonic(), None
        return answer

    async def _send(self, body: Mapping[str, Any]) -> str:
        """The body of the server's answer, as it is."""
        openai = self._openai
        try:
            # Raw: how an answer is incomplete is for us to see, not for the client's models to fill in.
            response = await self._client.chat.completions.with_raw_response.create(**body)
            return str(response.text)
        except openai.APITimeoutError as error:
            raise Trouble(f"no answer within {self.stage.config.timeout:g} s", None) from error
        except openai.APIConnectionError as error:
            never_sent = isinstance(error.__cause__, httpx2.ConnectError)
            raise Trouble(self._said_by(error.__cause__ or error), 0 if never_sent else None) from error
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.response) from None
        except (httpx2.HTTPError, ValueError) as error:  # an answer that broke off, or is no text
            raise Trouble(self._said_by(error), None) from error

    def _refuse_empty(self, key: str) -> None:
        """Give a call up whose answers held nothing so often, in this run and those before."""
        count, last = self.budget.journal.empty(key)
        if count >= MAX_UNUSABLE:
            raise Unanswerable(f"{count} answers held nothing (last: {last})")

    def _refusal(self, status: int, response: httpx2.Response) -> Exception:
        whole = " ".join(response.text.split())
        said = self._secret.clean(whole)[:300]
        if status in (408, 409, 425, 429) or status >= 500:
            return Trouble(f"status {status}: {said}", 0, wait=retry_after(response.headers.get("retry-after")))
        # Where others were answered, in this run or before, the settings are understood.
        answered = self.budget.journal.has_answered(self._settings)
        if status in (400, 413, 422) and (answered or _UNANSWERABLE.search(whole)):
            return Unanswerable(f"status {status}: {said}")
        where, variable = f"stages.{self.stage.name}", self.stage.config.api_key_variable
        unnamed = f"name the environment variable that holds the server's key in {where}.api_key_variable"
        hint = {
            401: f"put the server's key into the environment variable {variable}" if variable else unnamed,
            403: "the key may not use this model; give another",
            404: f"correct {where}.base_url (it ends with /v1 on most servers) or {where}.model",
        }.get(status, f"correct the settings of {where}")
        return EndpointError(f"{self._name} answered {status} ({said}); {hint}.")

    def _wait(self, state: RetryCallState) -> float:
        asked = getattr(state.outcome.exception() if state.outcome else None, "wait", 0.0)
        growing = wait_random_exponential(multiplier=min(FIRST_WAIT, self.max_wait), max=self.max_wait)
        return max(asked, growing(state))

    def _tell_of_silence(self, state: RetryCallState) -> None:
        """Say on standard error that the server has answered nothing for a while, whichever call that hits."""
        now = time.monotonic()
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since >= SILENCE and now - self._told >= REMINDER:
            self._told = now
            last, seconds = state.outcome.exception() if state.outcome else None, now - self._silent_since
            tqdm.write(
                f"{self._name} has answered nothing for {seconds:.0f} s (last: {last}); a call is tried for "
                f"{self.patience:g} s, then the run ends and can be taken up again.",
                file=sys.stderr,
            )

    @property
    def _name(self) -> str:
        return f"{self.stage.config.base_url} (stage {self.stage.name}, model {self.stage.config.model})"

    def _said_by(self, error: BaseException) -> str:
        # What cannot be sent is quoted with its headers, and so with the key, in whatever form.
        said = "" if isinstance(error, httpx2.LocalProtocolError) else self._secret.clean(str(error))
        return f"{type(error).__name__}: {said}" if said else type(error).__name__


def retry_after(header: str | None) -> float:
    """Seconds that a server asks to wait, given as seconds or as a date.

    >>> retry_after("1.5"), retry_after(None), retry_after("soon")
    (1.5, 0.0, 0.0)
    """
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
        except ValueError:
            return 0.0


def connect(concurrency: int) -> httpx2.AsyncClient:
    """Connections to servers, shared by all stages: making them reads the machine's certificates."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
    connections: httpx2.AsyncClient = _openai().DefaultAsyncHttpxClient(limits=limits)
    return connections


def connect_inside(answering: Answering) -> httpx2.AsyncClient:
    """The same to somebody in this process, who answers in the form of a server."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        status, value = answering(json.loads(request.content))
        return httpx2.Response(status, json=value)

    return httpx2.AsyncClient(transport=httpx2.MockTransport(answer))


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise RuntimeError(
            "avar synthesize needs the openai client; install it with: pip install 'avar-lightning[synthesis]'"
        ) from error
    return openai
