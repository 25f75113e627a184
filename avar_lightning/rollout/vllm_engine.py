"""Rollouts from a vLLM server that is already running, over its HTTP interface.

Two interfaces of vLLM (0.33) are used: the OpenAI-compatible one to sample (`/v1/chat/completions` with token ids and
log-probabilities), and its own to bring new weights (`/v1/load_lora_adapter` for adapters; `/collective_rpc` with
`reload_weights` for the whole model, read from a folder that both machines see). docs/grpo.md has the commands.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import torch
import torch.distributed as dist
from peft import PeftModel
from PIL import Image
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_delay, wait_random_exponential
from torch import nn

from avar_lightning.background import wait_for
from avar_lightning.families import placeholder_ids
from avar_lightning.rollout.engine import Completions, Prompts, SamplingConfig
from avar_lightning.sharding import save_weights

ROUNDS = 5
"""Times that weights are brought to a server that keeps losing them."""
ADAPTER = "policy"
"""Name under which the server knows the policy's adapters."""


class ServerTrouble(Exception):
    """The server did not answer, or not whole: worth another try."""


class ServerRefusal(RuntimeError):
    """The server understood and will not; trying again would not help."""


class VLLMRolloutEngine:
    """Sample from a vLLM server, and bring it the weights after each update.

    Whatever may pass is tried again with growing waits: refused and broken connections, time-outs, busy (429) and
    failing (5xx) servers, answers that are cut off or make no sense. A server that was started again meanwhile, and so
    has lost the weights, is noticed and given them before anything is sampled from it.

    Args:
        url: Of the server, e.g. "http://localhost:8000".
        sync_folder: Where weights are written for the server to read: a folder that both see under this name.
        model: Name of the model on the server; the only one that it serves when unset.
        concurrency: Prompts that are in flight together, of this process.
        timeout: Seconds for one answer.
        patience: Seconds for which a request is tried again before the run ends with an error; a server takes minutes
            to start.
        max_wait: Longest wait between tries, in seconds.
        api_key_variable: Environment variable that holds the server's key, if it wants one.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        sync_folder: str = "runs/vllm_sync",
        model: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: float = 1200.0,
        max_wait: float = 30.0,
        api_key_variable: str = "VLLM_API_KEY",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"rollout.url={url!r}, expected http://HOST:PORT of a running `vllm serve`.")
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("patience", patience)):
            if value <= 0:
                raise ValueError(f"rollout.{name}={value}, expected more than 0.")
        self.url, self.sync_folder, self.served = url.rstrip("/"), Path(sync_folder), model
        self.concurrency, self.timeout, self.patience, self.max_wait = concurrency, timeout, patience, max_wait
        key = os.environ.get(api_key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._version, self._folder = "", self.sync_folder

    def setup(self, model: nn.Module, processor: Any, sampling: SamplingConfig) -> None:
        """Find out what the server serves.

        Raises:
            RuntimeError: It cannot be reached, or does not serve the model that was named.
        """
        run = [uuid.uuid4().hex[:8]]  # tells these weights from those of another run on the same server
        if dist.is_initialized():
            dist.broadcast_object_list(run)
        self._run = run[0]
        self.policy: Any = model
        self.sampling = sampling
        self.stops = sampling.end_ids(model, processor)
        self.forbidden = placeholder_ids(self.policy.config) or []
        names = [item["id"] for item in self._ask(lambda client: self._get(client, "/v1/models"))["data"]]
        base = [name for name in names if name != ADAPTER]
        if self.served is None and len(base) != 1:
            raise ServerRefusal(f"{self.url} serves {base}, expected one model; name it with rollout.model.")
        if self.served is not None and self.served not in base:
            raise ServerRefusal(f"{self.url} serves {base}, and not rollout.model={self.served!r}; correct the name.")
        self.served = self.served or base[0]

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are brought to the server, and not the whole model."""
        return isinstance(self.policy, PeftModel)

    def sync(self, step: int) -> None:
        """Write the weights where the server reads them, and have it load them; a collective call."""
        before, self._folder = self._folder, self.sync_folder / f"{self._run}-{step:08d}"
        self._version = self._folder.name
        save_weights(self.policy, self._folder)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._ask(self._bring)
            if before != self.sync_folder and before != self._folder:
                shutil.rmtree(before, ignore_errors=True)
        if dist.is_initialized():
            dist.barrier()

    def teardown(self) -> None:
        """Remove the weights that were written last."""
        if self._folder != self.sync_folder and (not dist.is_initialized() or dist.get_rank() == 0):
            shutil.rmtree(self._folder, ignore_errors=True)

    def generate(self, prompts: Prompts, num_generations: int, *, seed: int) -> Completions:
        """Sample completions of each prompt.

        Raises:
            RuntimeError: The server did not answer in all tries, refused, or reads prompts otherwise than the trainer.
        """
        answers = self._ask(lambda client: self._answer_all(client, prompts, num_generations, seed))
        flat = [choice for answer in answers for choice in answer]
        return Completions(
            [torch.tensor(ids, dtype=torch.long) for ids, _, _ in flat],
            [reason != "length" for _, _, reason in flat],
            [torch.tensor(logps, dtype=torch.float32) for _, logps, _ in flat],
        )

    # Requests

    def _ask(self, work: Callable[[httpx2.AsyncClient], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            limits = httpx2.Limits(max_connections=self.concurrency)
            async with httpx2.AsyncClient(
                base_url=self.url, headers=self._headers, timeout=self.timeout, limits=limits
            ) as client:
                return await work(client)

        return wait_for(run())

    async def _bring(self, client: httpx2.AsyncClient) -> None:
        """Have the server load the weights of the current version.

        All over again where one step fails: a server that was started again in between would bear a version that it
        does not have.
        """
        path = str(self._folder.resolve())
        if self.has_adapters:
            load = "/v1/load_lora_adapter"
            body: dict[str, Any] = {"lora_name": ADAPTER, "lora_path": path, "load_inplace": True}
        else:
            load, body = "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}

        async def once() -> None:
            await self._once(load, lambda: client.post(load, json=body))
            # Pictures that were encoded with the old weights must not serve the new ones; cached keys and values are
            # told apart by `cache_salt`.
            for path, asked in (
                ("/reset_encoder_cache", {}),
                ("/update_weight_version", {"new_version": self._version}),
            ):
                await self._once(path, partial(client.post, path, json=asked))

        await self._patiently(load, once)

    async def _bring_back(self, client: httpx2.AsyncClient, lock: asyncio.Lock) -> None:
        """The same where the server has lost them, once for all requests that notice."""
        async with lock:
            if not await self._has_weights(client):
                await self._bring(client)

    async def _has_weights(self, client: httpx2.AsyncClient) -> bool:
        return bool((await self._get(client, "/weight_info")).get("weight_version") == self._version)

    async def _answer_all(
        self, client: httpx2.AsyncClient, prompts: Prompts, num_generations: int, seed: int
    ) -> list[list[tuple[list[int], list[float], str]]]:
        gate, lock = asyncio.Semaphore(self.concurrency), asyncio.Lock()

        async def one(index: int) -> list[tuple[list[int], list[float], str]]:
            async with gate:
                for _ in range(ROUNDS):
                    answer = await self._answer(client, prompts, index, num_generations, seed)
                    if answer is not None:
                        return answer
                    # The server died and was started again, with the weights that it is started with.
                    await self._bring_back(client, lock)
            raise ServerRefusal(
                f"{self.url} lost the weights {ROUNDS} times while it answered; look into why it starts again."
            )

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(len(prompts))]
        except BaseExceptionGroup as failures:  # the first failure ended the others
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(
        self, client: httpx2.AsyncClient, prompts: Prompts, index: int, num_generations: int, seed: int
    ) -> list[tuple[list[int], list[float], str]] | None:
        """Token ids, log-probabilities and finish reason of each completion; None where other weights gave them."""
        body = {
            "model": ADAPTER if self.has_adapters else self.served,
            "messages": with_images(prompts.messages[index], prompts.images[index]),
            "n": num_generations,
            "max_completion_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            # vLLM draws the completions of a request with this seed and those that follow.
            "seed": (seed + index * num_generations) % 2**31,
            "stop_token_ids": self.stops,
            "logit_bias": {str(token): -100 for token in self.forbidden},
            "logprobs": True,
            "return_token_ids": True,
            "return_weight_versions": True,
            "cache_salt": self._version,
        }
        asked: list[int] = prompts.rows[index]["input_ids"][0].tolist()

        def read(answer: Any) -> list[tuple[list[int], list[float], str]]:
            return read_choices(answer, num_generations)

        try:
            answer = await self._post(client, "/v1/chat/completions", body, check=read)
        except ServerRefusal as refusal:
            if self.has_adapters and "does not exist" in str(refusal):
                return None
            raise
        if any(version != self._version for version in versions_of(answer)):
            return None
        theirs = answer.get("prompt_token_ids")
        if theirs is not None and theirs != asked:
            raise ServerRefusal(
                f"{self.url} read a prompt as {len(theirs)} tokens where the trainer has {len(asked)}, differing from "
                f"number {_first_difference(theirs, asked)} on, expected the same; serve the very folder that is "
                "trained, with the data's limits on pixels: --mm-processor-kwargs '{\"max_pixels\": …}'."
            )
        return read(answer)

    async def _get(self, client: httpx2.AsyncClient, path: str) -> Any:
        return await self._patiently(path, lambda: self._once(path, lambda: client.get(path)))

    async def _post(
        self, client: httpx2.AsyncClient, path: str, body: Any, *, check: Callable[[Any], Any] | None = None
    ) -> Any:
        return await self._patiently(path, lambda: self._once(path, lambda: client.post(path, json=body), check))

    async def _patiently(self, path: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do what asks the server until it answers whole, with growing waits."""
        tries = AsyncRetrying(
            retry=retry_if_exception_type(ServerTrouble),
            stop=stop_after_delay(self.patience),
            wait=wait_random_exponential(multiplier=min(1.0, self.max_wait), max=self.max_wait),
        )
        try:
            async for attempt in tries:
                with attempt:
                    return await work()
        except RetryError as error:
            last, count = error.last_attempt.exception(), error.last_attempt.attempt_number
            raise RuntimeError(
                f"the vLLM server at {self.url} did not answer {path} in {count} tries over {self.patience:g} s (last: "
                f"{last}); start it again (docs/grpo.md), and resume from the last checkpoint with --ckpt_path."
            ) from last

    async def _once(
        self, path: str, send: Callable[[], Awaitable[httpx2.Response]], check: Callable[[Any], Any] | None = None
    ) -> Any:
        try:
            response = await send()
        except httpx2.TransportError as error:
            raise ServerTrouble(f"{type(error).__name__}: {error}") from error
        except httpx2.DecodingError as error:
            raise ServerTrouble(f"undecodable answer: {error}") from error
        if response.status_code == 429 or response.status_code >= 500:
            raise ServerTrouble(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code >= 400:
            raise ServerRefusal(_refusal(self.url, path, response))
        if not response.content or "json" not in response.headers.get("content-type", "json"):
            return {}  # endpoints that only say that they are done
        try:
            value = response.json()
            if check is not None:
                check(value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ServerTrouble(f"an answer that makes no sense ({type(error).__name__}: {error})") from error
        return value


def with_images(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    """Chat messages in OpenAI's form: each image part carries its picture, without loss.

    >>> with_images([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    left = iter(images)

    def part(item: Mapping[str, Any]) -> dict[str, Any]:
        if item["type"] != "image":
            return {"type": "text", "text": item["text"]}
        buffer = io.BytesIO()
        next(left).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    def content(value: Any) -> Any:
        return value if isinstance(value, str) else [part(item) for item in value]

    return [{**message, "content": content(message["content"])} for message in messages]


def read_choices(answer: Any, num_generations: int) -> list[tuple[list[int], list[float], str]]:
    """Token ids, log-probabilities and finish reason of each choice of a chat completion.

    Raises:
        ValueError: The answer is not whole.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != num_generations:
        found = len(choices) if isinstance(choices, list) else choices
        raise ValueError(f"{found} choices, expected {num_generations}")
    found_all = []
    for choice in sorted(choices, key=lambda choice: choice.get("index", 0)):
        ids = choice.get("token_ids")
        if ids is None:
            raise ValueError("a choice without token_ids")
        logps = [float(token["logprob"]) for token in ((choice.get("logprobs") or {}).get("content") or [])]
        if len(logps) != len(ids) or any(map(math.isnan, logps)):
            raise ValueError(f"{len(logps)} log-probabilities of {len(ids)} tokens")
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ValueError(f"finish_reason {choice.get('finish_reason')!r}")
        found_all.append(([int(token) for token in ids], logps, str(choice["finish_reason"])))
    return found_all


def versions_of(answer: Mapping[str, Any]) -> list[Any]:
    """Versions of the weights that gave each part of each choice; None for a choice that does not say."""
    spans = [choice.get("weight_versions") or [{"version": None}] for choice in answer["choices"]]
    return [span.get("version") for own in spans for span in own]


def _refusal(url: str, path: str, response: httpx2.Response) -> str:
    hints = {
        "/v1/load_lora_adapter": "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
        "/collective_rpc": "start it with VLLM_SERVER_DEV_MODE=1",
        "/reset_encoder_cache": "start it with VLLM_SERVER_DEV_MODE=1",
        "/update_weight_version": "start vLLM 0.33 or newer with VLLM_SERVER_DEV_MODE=1",
        "/weight_info": "start vLLM 0.33 or newer with VLLM_SERVER_DEV_MODE=1",
    }
    hint = hints.get(path, "correct the request's settings or the server's")
    if response.status_code == 401:
        hint = "put the server's key into the environment variable VLLM_API_KEY"
    return f"{url}{path} answered {response.status_code} ({response.text[:300].strip()}); {hint}."


def _first_difference(one: list[int], two: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
