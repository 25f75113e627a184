"""liger-kernel's fused cross-entropy, for CUDA; the only file that imports it."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor, nn


def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None


def liger_lm_loss(head: nn.Module, hidden: Tensor, token_ids: Tensor) -> Tensor:
    """Sum of the cross-entropies of given tokens, in nats, without the whole logits; gradients come with the forward.

    Args:
        head: A linear layer without adapters, whose weights are there in full.
        hidden: (N, D), on a CUDA device.
        token_ids: One a position, int64 (N,).

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: The head is no plain linear layer.
    """
    if not has_liger():
        raise ImportError(
            "scoring.kernel is liger, and liger-kernel is not installed; pip install 'avar-lightning[liger]', or set "
            "it to chunked."
        )
    if type(head) is not nn.Linear:
        raise ValueError(
            f"scoring.kernel is liger and the head is {type(head).__name__}, expected a plain nn.Linear; set it to "
            "chunked, or leave the head without adapters and in full precision."
        )
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, hidden, token_ids, head.bias)
