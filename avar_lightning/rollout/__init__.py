"""Completions to learn from: engines that sample them from the policy."""

from avar_lightning.rollout.engine import Completions, Prompts, RolloutEngine, SamplingConfig
from avar_lightning.rollout.hf_engine import HFRolloutEngine

__all__ = ["Completions", "HFRolloutEngine", "Prompts", "RolloutEngine", "SamplingConfig"]
