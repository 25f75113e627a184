"""Reinforcement learning with group-relative advantages (GRPO), and rewards for looking at the image (VARS)."""

from avar_lightning.grpo.config import GRPOConfig
from avar_lightning.grpo.module import GRPOModule
from avar_lightning.grpo.rollouts import Rollouts

__all__ = ["GRPOConfig", "GRPOModule", "Rollouts"]
