"""Measure, raise and steer the visual attention of vision-language models, as PyTorch Lightning modules.

Names are imported when they are first used, so that a program which needs one part does not wait for all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avar_lightning.attention import observe_attention, steer_attention
    from avar_lightning.data import ShardDataModule
    from avar_lightning.grpo import GRPOModule
    from avar_lightning.losses import attention_guidance_loss, attention_share_loss, group_advantages, grpo_loss
    from avar_lightning.model import load_model
    from avar_lightning.roles import Role, tag_roles
    from avar_lightning.sft import SFTModule
    from avar_lightning.vas import VisualAttentionScore, visual_attention_score

_HOMES = {
    "attention": ("observe_attention", "steer_attention"),
    "data": ("ShardDataModule",),
    "grpo": ("GRPOModule",),
    "losses": ("attention_guidance_loss", "attention_share_loss", "group_advantages", "grpo_loss"),
    "model": ("load_model",),
    "roles": ("Role", "tag_roles"),
    "sft": ("SFTModule",),
    "vas": ("VisualAttentionScore", "visual_attention_score"),
}

__all__ = [
    "GRPOModule",
    "Role",
    "SFTModule",
    "ShardDataModule",
    "VisualAttentionScore",
    "attention_guidance_loss",
    "attention_share_loss",
    "group_advantages",
    "grpo_loss",
    "load_model",
    "observe_attention",
    "steer_attention",
    "tag_roles",
    "visual_attention_score",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
