"""What a synthesis reads, asks, keeps and may spend."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from avar_lightning.synthesis.filters import FilterConfig

STAGES = ("describe", "reason", "anchor")
DEMO = "demo"
_SECRET = re.compile(r"api[-_]?key|authorization|secret|password|token$|^key$", re.IGNORECASE)


@dataclass
class StageConfig:
    """One stage: the model that answers it, where it is served, and how it is asked."""

    model: str
    """Name of the model on its server; `describe`, `reason` or `anchor` of the demo teacher."""
    base_url: str
    """Of an OpenAI-compatible server, e.g. `http://localhost:8000/v1`; `demo` is the teacher of the demo world."""
    api_key_variable: str | None = None
    """Environment variable that holds the server's key; no key is sent when unset."""
    prompt: str | None = None
    """Prompt file with $question, $options, $description, $chain; the shipped one when unset."""
    image: bool | None = None
    """Whether the images are sent; only in `describe` when unset."""
    temperature: float | None = 0.6
    """Of sampling; the server's own when null."""
    top_p: float | None = None
    """Nucleus of sampling; the server's own when unset."""
    max_tokens: int = 8192
    """Longest answer, thinking included."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the limit in the request; newer models of OpenAI know the second only."""
    timeout: float = 600.0
    """Seconds for one answer."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, e.g. `chat_template_kwargs`."""
    price_input: float | None = None
    """Of a million prompt tokens, for the cost so far."""
    price_output: float | None = None
    """Of a million tokens that were generated."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, and keys in places that are written down."""
        self.base_url = self.base_url.rstrip("/")
        address = urlsplit(self.base_url)
        if address.username or address.password or any(map(_SECRET.search, re.findall(r"(\w+)=", address.query))):
            raise ValueError("a base_url has a key or password in it; put it into an environment variable, and the "
                             "variable's name into api_key_variable.")  # fmt: skip
        if self.base_url != DEMO and (address.scheme not in ("http", "https") or not address.hostname):
            raise ValueError(f"base_url={self.base_url!r}, expected http(s)://HOST/v1 of a running server, or demo.")
        if secret := [name for name in self.extra if _SECRET.search(name)]:
            raise ValueError(f"extra has {secret[0]!r}, expected no key there; give its variable in api_key_variable.")
        if self.api_key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w{0,63}", self.api_key_variable):
            # Not said: it may be the key itself.
            raise ValueError("api_key_variable is no name of an environment variable; expected e.g. OPENAI_API_KEY.")
        _positive(self, "max_tokens", "timeout")

    @property
    def api_key(self) -> str | None:
        """The key, read anew each time so that no configuration holds it."""
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()  # files end with a line end
        if not key:
            raise ValueError(
                f"the environment variable {self.api_key_variable} is not set, expected the key of {self.base_url}; "
                "export it, or leave api_key_variable out for a server without keys."
            )
        if not re.fullmatch(r"[!-~]+", key):  # not said: most of it is the key
            raise ValueError(
                f"the environment variable {self.api_key_variable} has blanks, line ends, control or non-ASCII "
                "characters inside, expected one key in one line; export the key alone."
            )
        return key


@dataclass
class StagesConfig:
    """The three stages of the paper."""

    describe: StageConfig
    """A vision model writes down all that is in the image."""
    reason: StageConfig
    """A reasoning model solves the question from that, checking itself."""
    anchor: StageConfig
    """A model weaves returns to the image into the chain."""


@dataclass
class DemoConfig:
    """The demo world that is read under `input: demo`, and that the demo teacher knows."""

    num_samples: int = 60
    """Samples; the teacher recognises no others."""
    seed: int = 0
    """Of the world."""
    split: str = "train"
    """Stream of the samples."""
    hint_rate: float = 0.8
    """Probability that the note in a question is right."""


@dataclass
class SynthesisConfig:
    """All of it."""

    input: str
    """Shards as everywhere (tar, folder, glob, {000..009}, URL), a .jsonl with question, image and answer, or demo."""
    output: str
    """Folder of the journal, the shards, `rejected.jsonl` and `report.json`."""
    stages: StagesConfig
    """Who answers what."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What a response must be like to be kept."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """The demo world."""
    concurrency: int = 32
    """Samples, and so requests, that are in flight together."""
    max_requests: int | None = None
    """Most requests in the life of the journal, each try counted."""
    max_tokens: int | None = None
    """Most tokens in the life of the journal, of prompts and answers; prompts on their way are estimated."""
    patience: float = 900.0
    """Seconds for which one call is tried again after it first failed."""
    max_wait: float = 60.0
    """Longest wait between two tries that no server asked for, in seconds."""
    seed: int | None = 0
    """Sent with each request, mixed with what is asked; not sent when null."""
    limit: int | None = None
    """Only so many samples, from the first."""
    system_prompt: str | None = None
    """System turn of samples that have none."""
    image_format: Literal["png", "jpg"] = "png"
    """In which images are sent and written; jpg is smaller for photographs."""
    samples_per_shard: int = 1000
    """Size of every shard but the last."""
    retry_refused: bool = False
    """Ask again for samples that a server refused in an earlier run; on every call for as long as it is set."""
    overwrite: bool = False
    """Replace shards in `output` that another input or another program left there."""
    progress: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Print the first sample's prompts and the number of requests, and ask nobody."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        _positive(self, "concurrency", "max_requests", "max_tokens", "patience", "max_wait", "limit",
                  "samples_per_shard")  # fmt: skip


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, expected more than 0.")
