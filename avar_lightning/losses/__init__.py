"""Training objectives. Pure functions, tensors in and tensors out."""

from avar_lightning.losses.attention import attention_guidance_loss, attention_share_loss, query_mean
from avar_lightning.losses.policy import (
    IMPORTANCE_LEVELS,
    POLICY_LOSSES,
    PolicyLoss,
    group_advantages,
    grpo_loss,
    importance_weights,
    kl_divergence,
)
from avar_lightning.losses.tokens import token_logps

__all__ = [
    "IMPORTANCE_LEVELS",
    "POLICY_LOSSES",
    "PolicyLoss",
    "attention_guidance_loss",
    "attention_share_loss",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "kl_divergence",
    "query_mean",
    "token_logps",
]
