"""Log-probabilities of given tokens from hidden states, with the logits of a few positions at a time.

Shape letters: N positions, D hidden size, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def token_logps(
    head: Head,
    hidden: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature) at given tokens, without the whole logits.

    Logits exist for `chunk_size` positions at a time and are computed again in the backward pass, so memory is
    chunk_size × V floats instead of N × V, for one more product with the head's weights.

    Args:
        head: Makes logits (n, V) of hidden states (n, D), perhaps in low precision; may have parameters.
        hidden: (N, D).
        token_ids: One a position, int64 (N,).
        temperature: Divides the logits.
        with_entropy: Also give the entropy of each position, without a gradient.
        chunk_size: Positions whose logits exist at the same time.

    Returns:
        Log-probabilities (N,), float32, and entropies in nats (N,), float32, or None.

    Raises:
        ValueError: `chunk_size` is less than 1.

    >>> head = torch.nn.Linear(2, 4, bias=False)
    >>> hidden, tokens = torch.randn(3, 2), torch.tensor([0, 3, 1])
    >>> logps, entropy = token_logps(head, hidden, tokens, with_entropy=True, chunk_size=2)
    >>> torch.allclose(logps, head(hidden).log_softmax(1)[[0, 1, 2], tokens])
    True
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected 1 or more positions.")
    recomputing = torch.is_grad_enabled()
    parts = []
    for hidden_nD, tokens_n in zip(hidden.split(chunk_size), token_ids.split(chunk_size), strict=True):
        arguments = (head, hidden_nD, tokens_n, temperature, with_entropy)
        parts.append(checkpoint(_chunk, *arguments, use_reentrant=False) if recomputing else _chunk(*arguments))
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk(
    head: Head, hidden: Tensor, token_ids: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits_nV = head(hidden).float()
    if temperature != 1.0:
        logits_nV = logits_nV / temperature
    logps: Tensor = _ChosenLogps.apply(logits_nV, token_ids)
    if not with_entropy:
        return logps, None
    with torch.no_grad():
        probabilities = logits_nV.softmax(1)
        mean = torch.einsum("nv,nv->n", probabilities, logits_nV)
        return logps, logits_nV.logsumexp(1) - mean


class _ChosenLogps(torch.autograd.Function):
    """log softmax at given tokens; its backward makes one tensor of the logits' size, and autograd's own makes four."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, token_ids: Tensor) -> Tensor:
        normaliser = logits_nV.logsumexp(1)
        ctx.save_for_backward(logits_nV, normaliser, token_ids)
        return logits_nV.gather(1, token_ids[:, None]).squeeze(1) - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_n: Tensor) -> tuple[Tensor, None]:
        logits_nV, normaliser, token_ids = ctx.saved_tensors
        # d logp / d logit = [chosen] - p
        result = (logits_nV - normaliser[:, None]).exp_().mul_(-gradient_n[:, None])
        return result.scatter_add_(1, token_ids[:, None], gradient_n[:, None]), None
