"""What can be chosen about the policy's updates."""

from __future__ import annotations

from dataclasses import dataclass

from avar_lightning.losses import IMPORTANCE_LEVELS, POLICY_LOSSES
from avar_lightning.losses.policy import ImportanceLevel, LossType


@dataclass
class GRPOConfig:
    """Groups, updates and the policy loss."""

    loss_type: LossType = "grpo"
    """`grpo` (mean over a completion's tokens, then over completions), `dapo` (over all tokens), `dr_grpo` (divided by
    the longest length), `gspo` (one ratio a completion)."""
    num_generations: int = 8
    """Completions of each prompt, G; the group in which rewards are compared."""
    num_epochs: int = 1
    """Times that a batch of completions is learned from before the next is sampled."""
    num_minibatches: int = 1
    """Updates in each of these epochs; the completions are shared among them at random."""
    micro_batch_size: int = 8
    """Completions in one forward; bounds memory and changes nothing else."""
    clip_low: float = 0.2
    """How far the ratio is followed below 1, in [0, 1)."""
    clip_high: float = 0.2
    """How far the ratio is followed above 1; more than `clip_low` is DAPO's clip-higher (0.28)."""
    beta: float = 0.0
    """Weight of the KL (k3) to the starting model: with LoRA the base without adapters, otherwise a frozen copy."""
    scale_advantages: bool = True
    """Divide by the group's standard deviation; Dr. GRPO does not."""
    mask_truncated: bool = False
    """Learn nothing from completions that were cut at the longest length (DAPO)."""
    importance: ImportanceLevel = "token"
    """Correction of the sampler's own probabilities by weights a `token` or a `sequence`, or `none`; an engine that
    samples from the policy itself needs none."""
    importance_cap: float = 2.0
    """Upper bound of these weights."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 clips nothing."""
    max_reward: float = 1e4
    """A total reward beyond this, either way, stops the run."""
    vas_every: int = 10
    """Measure the attention of completions every so many batches where no visual reward measures it in each; 0: not."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        if self.loss_type not in POLICY_LOSSES:
            raise ValueError(f"grpo.loss_type={self.loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}.")
        if self.importance not in IMPORTANCE_LEVELS:
            raise ValueError(f"grpo.importance={self.importance!r}, expected one of {', '.join(IMPORTANCE_LEVELS)}.")
        least = {"num_generations": 2, "num_epochs": 1, "num_minibatches": 1, "micro_batch_size": 1}
        least |= dict.fromkeys(("clip_low", "clip_high", "beta", "max_grad_norm", "vas_every"), 0)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"grpo.{name}={getattr(self, name)}, expected {bound} or more.")
        for name in ("importance_cap", "max_reward"):
            if getattr(self, name) <= 0:
                raise ValueError(f"grpo.{name}={getattr(self, name)}, expected more than 0.")
        if self.clip_low >= 1:
            raise ValueError(f"grpo.clip_low={self.clip_low}, expected less than 1: a ratio is never negative.")

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps for each batch of prompts."""
        return self.num_epochs * self.num_minibatches
