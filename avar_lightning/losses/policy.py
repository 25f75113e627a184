"""Group-relative policy optimisation: advantages, clipped objectives, KL and importance correction.

Shape letters: B completions, G completions of one prompt, T tokens of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "gspo"]
ImportanceLevel = Literal["none", "token", "sequence"]
POLICY_LOSSES: tuple[LossType, ...] = ("grpo", "dr_grpo", "dapo", "gspo")
IMPORTANCE_LEVELS: tuple[ImportanceLevel, ...] = ("none", "token", "sequence")
# exp of more than this is not used: a token that the sampler found impossible must not make the loss infinite.
_MAX_LOG_RATIO = 20.0


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale: bool = True, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """How much better each completion is than the others of its prompt: A = (r − mean) / (std + eps).

    Source: GRPO (Shao et al. 2024, arXiv 2402.03300, §4.1); without `scale`, Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783), which does not divide.

    Args:
        rewards: Total rewards (B,), the G completions of a prompt one after the other.
        num_generations: G.
        scale: Divide by the group's standard deviation (with G − 1 in its denominator).
        eps: Added to the standard deviation.

    Returns:
        Advantages (B,), exactly 0 in a group whose rewards are equal, and whether each group's rewards differ, bool
        (B / G,).

    Raises:
        ValueError: B is no multiple of G, or G is 1, where no completion has others to be compared with.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), 2, scale=False)
    (tensor([ 0.5000, -0.5000,  0.0000,  0.0000]), tensor([ True, False]))
    """
    if num_generations < 2 or len(rewards) % num_generations:
        raise ValueError(
            f"{len(rewards)} rewards came with num_generations={num_generations}, expected 2 or more generations and a "
            "multiple of them."
        )
    groups = rewards.view(-1, num_generations)
    differ = groups.max(1).values > groups.min(1).values
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    # Equal rewards have a mean that rounding may put beside them.
    return advantages.where(differ[:, None], 0.0).flatten(), differ


def kl_divergence(per_token_logps: Tensor, ref_per_token_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy ‖ reference) of each token: exp(d) − d − 1 with d = ref − policy, never negative.

    Source: Schulman, "Approximating KL divergence" (2020); GRPO, eq. 4.

    >>> kl_divergence(torch.tensor([-1.0]), torch.tensor([-2.0]))  # e^-1 + 1 - 1
    tensor([0.3679])
    """
    difference = (ref_per_token_logps - per_token_logps).clamp(max=_MAX_LOG_RATIO)
    return difference.exp() - difference - 1


def importance_weights(
    old_per_token_logps: Tensor,
    sampling_logps: Tensor,
    completion_mask: Tensor,
    *,
    level: ImportanceLevel = "token",
    cap: float = 2.0,
) -> Tensor:
    """Truncated importance weights of completions that another engine sampled: min(π_trainer / π_sampler, cap).

    An inference server computes slightly other probabilities than the trainer for the same weights, which makes the
    gradient one of another policy. Source: Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training".

    Args:
        old_per_token_logps: The trainer's log-probabilities with the weights that sampled (B, T).
        sampling_logps: The sampler's own (B, T).
        completion_mask: Tokens that count, bool (B, T).
        level: A weight for each `token`, or for each `sequence` (product over its tokens), or `none`.
        cap: Upper bound.

    Returns:
        (B, T), 1 where the mask is false; without a gradient.

    >>> import math
    >>> ours, theirs = torch.tensor([[math.log(0.5), 0.0]]), torch.tensor([[math.log(0.4), -3.0]])
    >>> importance_weights(ours, theirs, torch.tensor([[True, True]]))
    tensor([[1.2500, 2.0000]])
    """
    if level not in IMPORTANCE_LEVELS:
        raise ValueError(f"importance level is {level!r}, expected one of {', '.join(IMPORTANCE_LEVELS)}.")
    difference = (old_per_token_logps - sampling_logps).detach().where(completion_mask, 0.0)
    if level == "none":
        return torch.ones_like(difference)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    return difference.clamp(max=_MAX_LOG_RATIO).exp().clamp(max=cap).where(completion_mask, 1.0)


@dataclass
class PolicyLoss:
    """A policy objective and what to watch of it; all scalars, only `loss` with a gradient.

    Attributes:
        loss: To be minimised.
        clip_fraction_low: Share of tokens (of completions under `gspo`) whose ratio was clipped from below.
        clip_fraction_high: The same from above.
        kl: Mean k3 KL to the reference over tokens; 0 without a reference.
        num_tokens: Tokens that count.
    """

    loss: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    kl: Tensor
    num_tokens: Tensor


def grpo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    loss_type: LossType = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    ref_per_token_logps: Tensor | None = None,
    weights: Tensor | None = None,
    num_completions: Tensor | float | None = None,
    num_tokens: Tensor | float | None = None,
    max_length: int | None = None,
) -> PolicyLoss:
    """The clipped policy objective of a batch of completions, or of a part of one.

    With the ratio ρ = π / π_old, the loss of a token is −min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A) + beta · KL.
    Its mean is taken

    - `grpo`: over the tokens of a completion, then over completions (arXiv 2402.03300);
    - `dapo`: over all tokens (arXiv 2503.14476), so that long completions count for what they are;
    - `dr_grpo`: over completions of a sum that is divided by `max_length` (arXiv 2503.20783), without a bias to length;
    - `gspo`: as `grpo`, with one ratio a completion, the geometric mean of its tokens' (arXiv 2507.18071).

    A `clip_high` above `clip_low` is DAPO's clip-higher. A batch in parts sums to the whole when each part is given the
    whole's `num_completions` and `num_tokens`.

    Args:
        per_token_logps: Log-probabilities of the tokens under the policy, with the gradient (B, T).
        old_per_token_logps: The same under the policy that sampled them, (B, T).
        advantages: (B,).
        completion_mask: Tokens that count, bool (B, T); false behind the end of a completion.
        loss_type: One of `POLICY_LOSSES`.
        clip_low: How far below 1 the ratio is followed, 0 or more.
        clip_high: How far above 1.
        beta: Weight of the KL to the reference.
        ref_per_token_logps: Under the reference (B, T); needed where `beta` is not 0.
        weights: Importance weights of `importance_weights` (B, T).
        num_completions: Completions of the whole batch; B when unset.
        num_tokens: Counting tokens of the whole batch, for `dapo`; this part's when unset.
        max_length: Longest completion that sampling allows, for `dr_grpo`; T when unset.

    Raises:
        ValueError: `loss_type` is unknown, or `beta` came without a reference.

    >>> logps, old = torch.tensor([[0.5, 0.0]]).log_softmax(1), torch.tensor([[0.0, 0.0]]).log_softmax(1)
    >>> grpo_loss(logps, old, torch.tensor([1.0]), torch.tensor([[True, True]])).loss  # -(1.2 + 0.755) / 2
    tensor(-0.9775)
    """
    if loss_type not in POLICY_LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}.")
    if beta and ref_per_token_logps is None:
        raise ValueError(f"beta is {beta}, which needs ref_per_token_logps; give them, or set beta to 0.")
    mask = completion_mask.to(per_token_logps.dtype)
    lengths = mask.sum(1).clamp(min=1)
    log_ratio = (per_token_logps - old_per_token_logps) * mask
    if loss_type == "gspo":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(log_ratio)
    ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    advantage = advantages[:, None]
    unclipped, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = -torch.min(unclipped, clipped)
    if weights is not None:
        loss = loss * weights
    kl = torch.zeros_like(loss)
    if ref_per_token_logps is not None:
        kl = kl_divergence(per_token_logps, ref_per_token_logps) * mask
        loss = loss + beta * kl
    count = len(loss) if num_completions is None else num_completions
    tokens = mask.sum()
    if loss_type == "dapo":
        total = (loss * mask).sum() / torch.as_tensor(tokens if num_tokens is None else num_tokens).clamp(min=1)
    elif loss_type == "dr_grpo":
        total = (loss * mask).sum() / (count * (max_length or loss.shape[1]))
    else:
        total = ((loss * mask).sum(1) / lengths).sum() / count
    with torch.no_grad():
        low, high = (ratio < 1 - clip_low) & (advantage < 0), (ratio > 1 + clip_high) & (advantage > 0)
        share = (mask / lengths[:, None] / len(mask)) if loss_type == "gspo" else mask / tokens.clamp(min=1)
        return PolicyLoss(total, (low * share).sum(), (high * share).sum(), kl.sum() / tokens.clamp(min=1), tokens)
