"""Completions to learn from: engines that sample them from the policy."""

from typing import Any

from avar_lightning.rollout.engine import Completions, Prompts, RolloutEngine, SamplingConfig
from avar_lightning.rollout.hf_engine import HFRolloutEngine

__all__ = ["Completions", "HFRolloutEngine", "Prompts", "RolloutEngine", "SamplingConfig", "VLLMRolloutEngine"]


def __getattr__(name: str) -> Any:
    # Who samples from the model itself needs no HTTP client.
    if name == "VLLMRolloutEngine":
        from avar_lightning.rollout.vllm_engine import VLLMRolloutEngine

        return VLLMRolloutEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
