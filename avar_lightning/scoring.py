"""How probable a model finds given tokens: one forward, in which its head never makes all logits at once.

The head is replaced for one forward by something that scores the tokens, so everything around it (adapters, sharded
weights, autocast, what a family does before its head) is as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avar_lightning.attention import find_vlm
from avar_lightning.losses import token_logps
from avar_lightning.losses.liger import has_liger, liger_lm_loss
from avar_lightning.losses.tokens import Head

Kernel = Literal["auto", "liger", "chunked", "whole"]
"""Who computes log-probabilities from hidden states: see `ScoringConfig`."""


@dataclass
class ScoringConfig:
    """How log-probabilities of tokens are computed from the last hidden states."""

    kernel: Kernel = "auto"
    """`chunked` (logits of a few positions at a time, computed again in backward), `liger` (the fused kernel of
    liger-kernel, for the LM loss on CUDA; `chunked` elsewhere in it), `whole` (the model's own logits, all at once);
    `auto` is `liger` on CUDA where it is installed and the head is a plain linear layer, and `chunked` elsewhere."""
    chunk_size: int = 256
    """Positions whose logits exist at the same time, in float32: 256 of 152 K words are 156 MB."""

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        if self.chunk_size < 1:
            raise ValueError(f"scoring.chunk_size={self.chunk_size}, expected 1 or more positions.")


def score_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    token_ids: Tensor,
    mask: Tensor,
    *,
    config: ScoringConfig | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the last T tokens of each sequence, each given all before it.

    Args:
        model: A Hugging Face VLM, perhaps with adapters.
        inputs: Of its forward, without labels; sequences (B, N) with N > T.
        token_ids: The tokens, int64 (B, T); of `inputs`, or others.
        mask: Those that are scored, bool (B, T); the rest costs nothing.
        config: How.
        temperature: Divides the logits.
        with_entropy: Also give the entropy of each position, without a gradient.

    Returns:
        Log-probabilities (B, T), float32, 0 where the mask is false, with a gradient where the forward has one, and
        one of 0 to all parameters where nothing is scored; entropies (B, T) in nats, likewise, or None.

    Raises:
        ValueError: The model does something to its logits behind its head.
    """
    config = config or ScoringConfig()
    rows = _scored_rows(mask)
    count, targets = mask.shape[1], token_ids.flatten()[rows]
    options: dict[str, Any] = {"temperature": temperature, "with_entropy": with_entropy}

    def score(head: Head, states_BKX: Tensor, chunk_size: int) -> Tensor:
        states = states_BKX[:, -count - 1 : -1].flatten(0, 1)[rows]
        logps, entropy = token_logps(head, states, targets, chunk_size=chunk_size, **options)
        return logps[None] if entropy is None else torch.stack([logps, entropy])

    if config.kernel == "whole":
        forward: Any = model
        logits_BKV = forward(**inputs, use_cache=False, logits_to_keep=count + 1).logits
        found = score(_as_it_is, logits_BKV, len(rows))
    else:
        found = _with_head(model, inputs, lambda head, hidden: score(head, hidden, config.chunk_size), count + 1)
    scores = found.new_zeros(len(found), mask.numel()).index_copy(1, rows, found).view(len(found), *mask.shape)
    return scores[0] * mask, scores[1] * mask if with_entropy else None


def lm_loss(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, config: ScoringConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next tokens, summed over those that carry a label.

    Args:
        model: A Hugging Face VLM, perhaps with adapters.
        inputs: Of its forward, without labels; sequences (B, N).
        labels: Tokens, -100 where none is to be learned, int64 (B, N).
        config: How.

    Returns:
        The sum, in nats, float32, and the number of its tokens, int64; both scalars.

    Raises:
        ValueError: The model does something to its logits behind its head.
        ImportError: `kernel` is liger, which is not installed.
    """
    config = config or ScoringConfig()
    tokens, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    is_plain = type(find_vlm(model).get_output_embeddings()) is nn.Linear  # and has no adapter
    if config.kernel == "liger" or (config.kernel == "auto" and labels.is_cuda and is_plain and has_liger()):
        rows = _scored_rows(mask)

        def loss(_: Head, hidden_BND: Tensor) -> Tensor:
            head = find_vlm(model).get_output_embeddings()
            total = liger_lm_loss(head, hidden_BND[:, :-1].flatten(0, 1)[rows], tokens.flatten()[rows])
            return total.reshape(1, 1)

        total = _with_head(model, inputs, loss, labels.shape[1])
        return (total * mask.any()).sum(), mask.sum()
    logps, _ = score_tokens(model, inputs, tokens, mask, config=config)
    return -logps.sum(), mask.sum()


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


def _scored_rows(mask: Tensor) -> Tensor:
    """Flat positions under a mask; the first one where there is none, so that the head takes part all the same."""
    rows = mask.flatten().nonzero()[:, 0]
    return rows if len(rows) else rows.new_zeros(1)


def _with_head(
    model: nn.Module, inputs: Mapping[str, Any], score: Callable[[Head, Tensor], Tensor], num_kept: int
) -> Tensor:
    """One forward in which `score(head, hidden states)` takes the place of the head; gives its result."""
    results: list[Tensor] = []
    head = find_vlm(model).get_output_embeddings()
    with _replaced_forward(head, score, results):
        forward: Any = model
        output = forward(**inputs, use_cache=False, logits_to_keep=num_kept)
    if len(results) != 1 or output.logits is not results[0]:
        raise ValueError(
            f"{type(find_vlm(model)).__name__} does something to its logits behind its head, expected those that the "
            "head gives; set scoring.kernel to whole, which takes them as they come."
        )
    return results[0][0]


@contextmanager
def _replaced_forward(head: Any, score: Callable[[Head, Tensor], Tensor], results: list[Tensor]) -> Iterator[None]:
    own, patch = head.forward, vars(head).get("forward")

    def forward(hidden_BKD: Tensor) -> Tensor:
        # With a dimension of one in front, where those who pass it on expect the batch.
        results.append(score(own, hidden_BKD)[None].clone())  # FSDP2 warns of views
        return results[-1]

    head.forward = forward
    try:
        yield
    finally:
        if patch is None:
            del head.forward
        else:
            head.forward = patch
