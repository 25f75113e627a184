"""What samples completions: the contract between GRPOModule and an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from avar_lightning.model import end_ids
from avar_lightning.processing import tokenizer_of


@dataclass
class SamplingConfig:
    """How completions are sampled."""

    max_new_tokens: int = 2048
    """Longest completion; a longer one is cut there and counted as truncated."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in the log-probabilities that are learned from; above 0."""
    top_p: float = 1.0
    """Smallest share of probability that is sampled from (nucleus sampling), in (0, 1]. Log-probabilities that are
    learned from are those of the whole distribution, so less than 1 learns from completions of another policy."""
    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a completion, beside those of the model, e.g. "<|endoftext|>"; each must be one token."""
    seed: int = 0
    """Of sampling, together with the step and the process."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens={self.max_new_tokens}, expected 1 or more.")
        if self.temperature <= 0:
            raise ValueError(
                f"sampling.temperature={self.temperature}, expected more than 0: greedy answers are equal."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}, expected a share in (0, 1].")

    def end_ids(self, model: Any, processor: Any) -> list[int]:
        """Tokens that end a completion.

        Raises:
            ValueError: One of `stop_tokens` is no single token.
        """
        tokenizer = tokenizer_of(processor)
        ends = set(end_ids(model, tokenizer))
        for text in self.stop_tokens:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"sampling.stop_tokens has {text!r}, which is {len(ids)} tokens of this tokenizer, expected one; "
                    "leave it out."
                )
            ends.add(ids[0])
        return sorted(ends)


@dataclass(frozen=True)
class Prompts:
    """What is to be answered; one item a prompt in each list.

    Attributes:
        rows: The prompt's tensors with its pictures, as `Encoded.prompt_row` has them, on any device.
        messages: The same as chat messages.
        images: The pictures in the order of the messages.
    """

    rows: Sequence[Mapping[str, Tensor]]
    messages: Sequence[list[dict[str, Any]]]
    images: Sequence[list[Image.Image]]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Completions:
    """What was sampled; one item a completion, those of a prompt one after the other.

    Attributes:
        token_ids: Tokens of each completion, int64 (T,), the token that ended it included; may be empty.
        finished: Whether it ended by itself, and not at the longest length.
        logps: Log-probability of each token where it was sampled, float32 (T,); None where the sampler is the policy
            itself, whose own are computed anyway.
    """

    token_ids: list[Tensor]
    finished: list[bool]
    logps: list[Tensor] | None = None


class RolloutEngine(Protocol):
    """Samples completions from the policy.

    An engine is made from the configuration, set up once the model is there, told after each update, and asked for
    completions in every step. It draws the same completions for the same weights, prompts and seed.
    """

    def setup(self, model: nn.Module, processor: Any, sampling: SamplingConfig) -> None:
        """Take the policy, its processor, and how to sample; called before the first step, in every process."""

    def sync(self, step: int) -> None:
        """Bring the policy's weights to where sampling happens; called before the first step and after each update."""

    def generate(self, prompts: Prompts, num_generations: int, *, seed: int) -> Completions:
        """Sample `num_generations` completions of each prompt."""

    def teardown(self) -> None:
        """Clean up; called once training has ended, well or not."""
