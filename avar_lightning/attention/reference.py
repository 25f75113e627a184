"""The eager N×N definition of attention masses, in the inputs' own precision: the oracle of the tests.

Shape letters as in `mass`: B batch, H query heads, M key heads, Q rows, K keys, D head dimension, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eager_probabilities(
    q_BHQD: Tensor,
    k_BMKD: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention probabilities (B, H, Q, K); a row whose keys are all hidden is zero.

    Args:
        q_BHQD: Queries.
        k_BMKD: Keys; M divides H.
        mask: Broadcasts to (B, H, Q, K); bool, True for visible, or a bias on the logits, -inf for hidden.
        scale: Factor of the logits, D^-0.5 by default.
        softcap: Logits become softcap · tanh(logits / softcap).
    """
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    logits = q_BHQD @ k_BMKD.repeat_interleave(q_BHQD.shape[1] // k_BMKD.shape[1], dim=1).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        return logits.softmax(-1)
    hidden = ~mask if mask.dtype == torch.bool else mask.isneginf()
    logits = logits if mask.dtype == torch.bool else logits + mask.masked_fill(hidden, 0.0)
    # The lowest number and not -inf, so that a row without keys has a gradient, of zero.
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(hidden, 0.0)


def eager_mass(
    q_BHQD: Tensor,
    k_BMKD: Tensor,
    groups_BKG: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Masses (B, H, Q, G) of key groups (B, K, G); other arguments as for `eager_probabilities`."""
    probabilities = eager_probabilities(q_BHQD, k_BMKD, mask, scale=scale, softcap=softcap)
    return probabilities @ groups_BKG[:, None].to(q_BHQD.dtype)


def mass_of_probabilities(probs_BHNK: Tensor, role_ids_BK: Tensor, keys: tuple[int, ...]) -> Tensor:
    """Masses (B, H, N, G) of the keys' roles, from the probabilities that a model returned."""
    groups = torch.stack([role_ids_BK == key for key in keys], dim=-1)
    return probs_BHNK @ groups[:, None].to(probs_BHNK.dtype)
