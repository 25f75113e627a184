"""A judge behind an OpenAI-compatible server: asked for what rules cannot read, each question once.

Its replies are kept in `judge.jsonl` by everything that was asked of whom, so that a later run asks for nothing again.
The key is read from the environment for each run, and is in no file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx2
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
)
from tenacity.wait import wait_random_exponential
from tqdm import tqdm

from avar_lightning.evaluation.judge_config import JudgeConfig
from avar_lightning.files import drop_half_line, json_line, whole_lines
from avar_lightning.synthesis.client import retry_after
from avar_lightning.synthesis.secret import Secret

CACHE = "judge.jsonl"
MAX_WAIT = 30.0
"""Longest wait between two tries that no server asked for, in seconds."""
OF_ONE_QUESTION = (400, 413, 422)
"""Statuses that may be the fault of a single question, as one that is too long."""
UNFINISHED = ("length", "content_filter")
"""Why a server ended a reply that the judge had not."""
MAX_REFUSED = 3
"""Questions that may be refused before any is answered; then it is the settings, and not the questions."""


class _Trouble(Exception):
    """No reply, worth another try."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _Refused(Exception):
    """The server will not reply; `alone` where that may hold for one question only."""

    def __init__(self, why: str, *, alone: bool) -> None:
        super().__init__(why)
        self.alone = alone


class _Ended(Exception):
    """Nothing more is asked."""


class Judge:
    """Asks, and keeps what was replied.

    Attributes:
        trouble: Why questions stayed without a reply, in one sentence; empty where none did.
        num_asked: Replies of the server.
        num_cached: Replies of earlier runs.
        num_open: Questions without a reply.
    """

    def __init__(self, config: JudgeConfig, folder: Path, *, progress: bool = False) -> None:
        self.config, self.path, self.progress = config, folder / CACHE, progress
        key = config.api_key
        self._secret = Secret(key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.trouble, self.num_asked, self.num_cached, self.num_open = "", 0, 0, 0

    @property
    def report(self) -> dict[str, Any]:
        """What became of the questions."""
        counts = {"asked": self.num_asked, "from_cache": self.num_cached, "without_reply": self.num_open}
        return {"model": self.config.model, "base_url": self.config.base_url, **counts, "trouble": self.trouble}

    def ask(self, prompts: Sequence[str]) -> dict[str, str]:
        """Reply by prompt, from the cache or from the server; without those that got none."""
        known = self._cached()
        wanted = dict.fromkeys(prompts)
        replies = {prompt: known[key] for prompt in wanted if (key := self._key(prompt)) in known}
        missing = [prompt for prompt in wanted if prompt not in replies]
        self.num_cached = len(replies)
        if missing:
            replies |= self._ask_server(missing)
        self.num_asked = len(replies) - self.num_cached
        self.num_open = len(wanted) - len(replies)
        return replies

    def _ask_server(self, prompts: Sequence[str]) -> dict[str, str]:
        replies: dict[str, str] = {}
        refused, ended = 0, threading.Event()
        with (
            httpx2.Client(headers=self._headers, timeout=self.config.timeout) as client,
            ThreadPoolExecutor(self.config.concurrency) as pool,
            self.path.open("a") as cache,
            tqdm(total=len(prompts), desc="judge", unit="answer", disable=not self.progress) as bar,
        ):
            try:
                asked = {pool.submit(self._reply, client, prompt, ended): prompt for prompt in prompts}
                for future in as_completed(asked):
                    try:
                        reply = future.result()
                    except _Refused as error:
                        refused += 1
                        self.trouble = self.trouble or str(error)
                        if not replies and refused >= MAX_REFUSED:
                            ended.set()
                    except _Ended:
                        continue
                    else:
                        prompt = asked[future]
                        replies[prompt] = reply
                        cache.write(json_line({"key": self._key(prompt), "model": self.config.model, "reply": reply}))
                        cache.flush()
                        bar.update()
            finally:
                ended.set()
        return replies

    def _reply(self, client: httpx2.Client, prompt: str, ended: threading.Event) -> str:
        """One question, tried until it is answered whole."""
        if ended.is_set():
            raise _Ended
        tries = Retrying(
            retry=retry_if_exception_type(_Trouble),
            stop=stop_after_delay(self.config.patience) | stop_when_event_set(ended),
            wait=_wait,
            sleep=sleep_using_event(ended),
        )
        try:
            return tries(self._once, client, prompt)
        except _Refused as refusal:
            if not refusal.alone:
                ended.set()
            raise
        except RetryError as error:
            if ended.is_set():
                raise _Ended from None
            ended.set()
            last = error.last_attempt.exception()
            raise _Refused(
                f"the judge {self._name} gave no reply in {self.config.patience:g} s (last: {last}); see that it runs "
                "and can be reached, and run the same command again: nothing is answered or judged twice.",
                alone=False,
            ) from last

    def _once(self, client: httpx2.Client, prompt: str) -> str:
        try:
            response = client.post(f"{self.config.base_url}/chat/completions", json=self._body(prompt))
        except httpx2.HTTPError as error:
            raise _Trouble(self._secret.clean(f"{type(error).__name__}: {error}")) from None
        if response.status_code != 200:
            raise self._refusal(response)
        choice = _choice_of(response)
        if (reason := choice.get("finish_reason")) in UNFINISHED:
            raise _Refused(
                f"the judge {self._name} did not end a reply ({reason}), which is not kept; raise judge.max_tokens "
                f"({self.config.max_tokens}), or let it think less (judge.extra), and run the same command again.",
                alone=True,
            )
        reply = _text_of(choice)
        if self._secret.is_in(reply):
            raise _Refused(f"the judge {self._name} repeated its key in a reply, which is not kept.", alone=True)
        return reply

    def _refusal(self, response: httpx2.Response) -> Exception:
        status, said = response.status_code, self._secret.clean(" ".join(response.text.split()))[:300]
        if status in (408, 409, 425, 429) or status >= 500:
            return _Trouble(f"status {status}: {said}", retry_after(response.headers.get("retry-after")))
        variable = self.config.api_key_variable
        hint = {
            401: f"put its key into the environment variable {variable}"
            if variable
            else "name the environment variable that holds its key in judge.api_key_variable",
            403: "the key may not use this model; give another",
            404: "correct judge.base_url (it ends with /v1 on most servers) or judge.model",
        }.get(status, "correct the settings of judge")
        sentence = f"the judge {self._name} answered {status} ({said}); {hint}, and run the same command again."
        return _Refused(sentence, alone=status in OF_ONE_QUESTION)

    @property
    def _name(self) -> str:
        return f"{self.config.model} at {self.config.base_url}"

    def _body(self, prompt: str) -> dict[str, Any]:
        """A request: everything that decides a reply, but for the server."""
        config = self.config
        own = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        body = {"model": config.model, "messages": [{"role": "user", "content": prompt}]}
        return body | config.extra | {name: value for name, value in own.items() if value is not None}

    def _key(self, prompt: str) -> str:
        asked = json.dumps([self.config.base_url, self._body(prompt)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _cached(self) -> dict[str, str]:
        """Replies of earlier runs."""
        if not self.path.is_file():
            return {}
        drop_half_line(self.path)
        lines: list[Mapping[str, Any]] = [json.loads(line) for line in whole_lines(self.path)]
        return {line["key"]: line["reply"] for line in lines}


def _choice_of(response: httpx2.Response) -> dict[str, Any]:
    """What an answer's body holds beside its counts.

    Raises:
        _Trouble: It is no answer.
    """
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Trouble(f"an answer without a reply ({type(error).__name__})") from error
    if not isinstance(message, dict):
        raise _Trouble("an answer without a reply")
    return dict(choice)


def _text_of(choice: Mapping[str, Any]) -> str:
    text = choice["message"].get("content")
    if not isinstance(text, str) or not text.strip():
        raise _Trouble("an empty reply")
    return text.encode("utf-8", "replace").decode()


def _wait(state: RetryCallState) -> float:
    asked = getattr(state.outcome.exception() if state.outcome else None, "wait", 0.0)
    return max(asked, wait_random_exponential(multiplier=min(1.0, MAX_WAIT), max=MAX_WAIT)(state))
