"""Who is asked for what rules cannot read, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from avar_lightning.synthesis.config import DEMO, StageConfig

OURS = ("model", "messages", "temperature", "max_tokens", "n", "stream")
"""Fields of a request that are settings of their own, or decide what a reply is."""


@dataclass
class JudgeConfig:
    """Who reads the answers that rules cannot read."""

    model: str
    """Name of the model on its server."""
    base_url: str = "http://localhost:8000/v1"
    """Of an OpenAI-compatible server, e.g. `https://api.openai.com/v1`."""
    api_key_variable: str | None = None
    """Environment variable that holds the server's key; no key is sent when unset."""
    temperature: float | None = 0.0
    """Of sampling; the server's own when null."""
    max_tokens: int | None = 512
    """Longest reply, thinking included; nothing is said of it when null (give `max_completion_tokens` in `extra` to
    servers that know only that)."""
    concurrency: int = 8
    """Questions that are asked together."""
    timeout: float = 120.0
    """Seconds for one reply."""
    patience: float = 120.0
    """Seconds for which one question is tried again."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, e.g. `chat_template_kwargs: {enable_thinking: false}` of Qwen3."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, and keys in places that are written down."""
        for name in ("max_tokens", "concurrency", "timeout", "patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"judge.{name} is {value}, expected more than 0.")
        if reserved := [name for name in self.extra if name in OURS]:
            raise ValueError(
                f"judge.extra holds {reserved[0]!r}, expected none of {', '.join(OURS)} there; judge.model, "
                "judge.temperature and judge.max_tokens are settings of their own."
            )
        if self.base_url == DEMO:
            raise ValueError("judge.base_url is 'demo', expected http(s)://HOST/v1 of a running server.")
        self.base_url = self._stage.base_url

    @property
    def api_key(self) -> str | None:
        """The key, read anew each time so that no configuration holds it."""
        return self._stage.api_key

    @property
    def _stage(self) -> StageConfig:
        """The same as a stage of a synthesis, which knows what a server's address and key may be."""
        return StageConfig(self.model, self.base_url, self.api_key_variable, extra=self.extra)
