"""One batch of completions on its way through a step: sampled, rewarded, scored, learned from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avar_lightning.rollout import Completions, Prompts


@dataclass
class Rollouts:
    """Completions of a batch of prompts; lists have an item a completion, those of a prompt one after the other.

    Attributes:
        prompts: What was asked.
        columns: Of the prompts, one mapping each.
        num_generations: Completions of each prompt.
        token_ids: Tokens of each completion, its end included.
        finished: Whether it ended by itself.
        texts: Decoded, without special tokens.
        sampling_logps: Log-probabilities from the sampler, where it is not the policy itself.
        rewards: Each part by name, NaN where it does not apply.
        total: Weighted sums of the parts.
        advantages: (B,), on the CPU.
        differ: Whether the rewards of each group differ, bool (B / G,).
        old_logps: Under the policy before the update; None where there is one update, which starts there.
        ref_logps: Under the reference.
        attention: What the visual reward measured, NaN where undefined or not measured.
        vas: Visual Attention Score of each completion (ratio of means), NaN likewise.
        observed: Whether attention was measured.
    """

    prompts: Prompts
    columns: Sequence[Mapping[str, Any]]
    num_generations: int
    token_ids: list[Tensor]
    finished: list[bool]
    texts: list[str]
    sampling_logps: list[Tensor] | None = None
    rewards: dict[str, list[float]] = field(default_factory=dict)
    total: list[float] = field(default_factory=list)
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    differ: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    old_logps: list[Tensor] | None = None
    ref_logps: list[Tensor] | None = None
    attention: list[float] = field(default_factory=list)
    vas: list[float] = field(default_factory=list)
    observed: bool = False

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        columns: Sequence[Mapping[str, Any]],
        num_generations: int,
        completions: Completions,
        texts: list[str],
    ) -> Rollouts:
        """What an engine gave.

        Raises:
            RuntimeError: The engine gave another number of completions.
        """
        expected = len(prompts) * num_generations
        if len(completions.token_ids) != expected:
            raise RuntimeError(
                f"the rollout engine gave {len(completions.token_ids)} completions, expected {expected} "
                f"({num_generations} of each of {len(prompts)} prompts)."
            )
        unknown = [math.nan] * expected
        return cls(
            prompts,
            columns,
            num_generations,
            completions.token_ids,
            completions.finished,
            texts,
            completions.logps,
            attention=unknown,
            vas=list(unknown),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def row(self, index: int) -> Mapping[str, Tensor]:
        """The prompt of a completion."""
        return self.prompts.rows[index // self.num_generations]

    def length(self, index: int) -> int:
        """Tokens of prompt and completion."""
        return self.row(index)["input_ids"].shape[1] + len(self.token_ids[index])

    def by_column(self) -> dict[str, list[Any]]:
        """What rewards get beside the completions, one value a completion.

        Every column of the data set, None where a prompt has no such column; `prompts` (chat messages), and
        `completion_ids`.
        """

        def each(values: Iterable[Any]) -> list[Any]:
            return [value for value in values for _ in range(self.num_generations)]

        names = dict.fromkeys(name for column in self.columns for name in column)
        columns = {name: each(column.get(name) for column in self.columns) for name in names}
        completion_ids = [tokens.tolist() for tokens in self.token_ids]
        return columns | {"prompts": each(self.prompts.messages), "completion_ids": completion_ids}

    def values(self) -> dict[str, list[float]]:
        """What is known of each completion, by the name under which its mean is logged."""
        values = {f"reward/{name}": own for name, own in self.rewards.items()}
        values |= {
            "reward/total": self.total,
            "rollout/length": [float(len(tokens)) for tokens in self.token_ids],
            "rollout/truncated": [float(not finished) for finished in self.finished],
            "rollout/empty": [float(not len(tokens)) for tokens in self.token_ids],
            "rollout/groups_without_variance": [float(not differ) for differ in self.differ],
        }
        if self.sampling_logps is not None and self.old_logps is not None:
            pairs = zip(self.old_logps, self.sampling_logps, strict=True)
            gaps = [(ours.cpu() - theirs.cpu()).abs() for ours, theirs in pairs]
            values["rollout/sampler_mismatch"] = torch.cat(gaps).tolist()
        if self.observed:
            values["rollout/vas"] = self.vas
        return values

    def table(self, num_prompts: int) -> list[dict[str, Any]]:
        """Everything about the completions of the first prompts, one mapping each, as plain types."""
        rows = []
        for index in range(min(num_prompts, len(self.prompts)) * self.num_generations):
            prompt = index // self.num_generations
            column = self.columns[prompt]
            rows.append(
                {
                    "prompt": prompt,
                    "id": column.get("id"),
                    "question": question_of(self.prompts.messages[prompt]),
                    "answer": column.get("answer"),
                    "completion": self.texts[index],
                    **{name: values[index] for name, values in self.rewards.items()},
                    "total": self.total[index],
                    "advantage": float(self.advantages[index]),
                    "vas": self.vas[index],
                    "length": len(self.token_ids[index]),
                    "finished": self.finished[index],
                }
            )
        return rows

    def chunks(self, indices: Sequence[int], size: int, num_chunks: int = 0) -> list[list[int]]:
        """Completions of similar length together, `size` at a time; empty chunks at the end make up `num_chunks`."""
        ordered = sorted(indices, key=self.length)
        chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return chunks + [[] for _ in range(num_chunks - len(chunks))]


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user turn."""
    content = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return " ".join(parts)


def padded(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Values of each token of several completions, (B, T) with zeros behind, on the device of `like` (B, T)."""
    rows = pad_sequence([value.to(like.device) for value in values], batch_first=True)
    return torch.nn.functional.pad(rows, (0, like.shape[1] - rows.shape[1]))
