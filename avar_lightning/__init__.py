"""Measure, raise and steer the visual attention of vision-language models, as PyTorch Lightning modules."""

from avar_lightning.attention import observe_attention, steer_attention
from avar_lightning.data import ShardDataModule
from avar_lightning.grpo import GRPOModule
from avar_lightning.losses import attention_guidance_loss, attention_share_loss
from avar_lightning.model import load_model
from avar_lightning.roles import Role, tag_roles
from avar_lightning.sft import SFTModule
from avar_lightning.vas import VisualAttentionScore, visual_attention_score

__all__ = [
    "GRPOModule",
    "Role",
    "SFTModule",
    "ShardDataModule",
    "VisualAttentionScore",
    "attention_guidance_loss",
    "attention_share_loss",
    "load_model",
    "observe_attention",
    "steer_attention",
    "tag_roles",
    "visual_attention_score",
]
