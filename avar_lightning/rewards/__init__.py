"""Rewards: how good a completion is, as callables with TRL's signature `(completions, **columns) -> list[float]`."""

from avar_lightning.rewards.answers import accuracy_reward, extract_answer, format_reward, judge
from avar_lightning.rewards.mixing import RewardConfig, RewardFunction, call_rewards, load_function, total_reward
from avar_lightning.rewards.visual import TRANSFORMS, VisualAttentionReward, visual_attention

__all__ = [
    "TRANSFORMS",
    "RewardConfig",
    "RewardFunction",
    "VisualAttentionReward",
    "accuracy_reward",
    "call_rewards",
    "extract_answer",
    "format_reward",
    "judge",
    "load_function",
    "total_reward",
    "visual_attention",
]
