"""VARS: reward for right answers that were given while looking at the image (AVAR, arXiv 2603.03825)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from avar_lightning.attention import LayerSpec
from avar_lightning.vas import check_masses

Transform = Literal["ratio", "log", "share", "tanh"]
TRANSFORMS: tuple[Transform, ...] = ("ratio", "log", "share", "tanh")
RIGHT = 0.5
"""An answer whose accuracy reward is above this counts as right."""


def visual_attention(
    mass_image: Tensor, mass_system: Tensor, query_mask: Tensor, *, transform: Transform = "ratio", eps: float = 1e-6
) -> Tensor:
    """How much a completion looked at the image: a mean over its tokens and layers, heads averaged within.

    With v and s the masses of a token on image and system, averaged over heads: `ratio` and `tanh` are v / (s + eps),
    `log` is log(1 + v / (s + eps)), `share` is v / (v + s + eps).

    Args:
        mass_image: Masses on the image tokens (L, B, H, N).
        mass_system: Masses on the system tokens (L, B, H, N).
        query_mask: The completion's tokens, bool (B, N).
        transform: One of `TRANSFORMS`.
        eps: Keeps the ratio of a token that ignores the system prompt finite.

    Returns:
        (B,), float32; NaN for a sample without completion, image or system tokens.

    >>> image, system = torch.full((1, 1, 2, 1), 0.6), torch.full((1, 1, 2, 1), 0.2)
    >>> visual_attention(image, system, torch.tensor([[True]]), transform="share")
    tensor([0.7500])
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform is {transform!r}, expected one of {', '.join(TRANSFORMS)}.")
    check_masses(mass_image, mass_system, query_mask)
    image, system = mass_image.mean(2), mass_system.mean(2)  # (L, B, N)
    if transform == "share":
        value = image / (image + system + eps)
    else:
        value = image / (system + eps)
        value = value.log1p() if transform == "log" else value
    rows = query_mask[None].expand_as(value)
    total, count = value.where(rows, 0.0).sum((0, 2)), rows.sum((0, 2))
    defined = (image * rows).sum((0, 2)).gt(0) & (system * rows).sum((0, 2)).gt(0)
    return (total / count.clamp(min=1)).where(defined, math.nan)


@dataclass
class VisualAttentionReward:
    """The visual part of the reward: 0 for a wrong answer, and for a right one how much it looked at the image.

    `ratio` is the published form. It is unbounded, and in the order of the Visual Attention Score itself, so it can
    outweigh the answer; the others are bounded or grow slowly.
    """

    transform: Transform = "share"
    """`ratio` of image to system attention (published), `log` of 1 + it, `share` of image in both, or `tanh` of its
    z-score within the group."""
    weight: float = 0.3
    """λ_v, of the part in the total reward."""
    layers: LayerSpec | None = None
    """Decoder layers that count: numbers, "9-14" or a part of the depth like "0.3-0.5"; all when unset."""
    eps: float = 1e-6
    """Added to the system attention."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.transform not in TRANSFORMS:
            raise ValueError(f"visual.transform is {self.transform!r}, expected one of {', '.join(TRANSFORMS)}.")
        if self.weight < 0:
            raise ValueError(f"visual.weight={self.weight} is negative, expected 0 or more.")

    def measure(self, mass_image: Tensor, mass_system: Tensor, query_mask: Tensor) -> Tensor:
        """What `visual_attention` gives for this transform, (B,)."""
        return visual_attention(mass_image, mass_system, query_mask, transform=self.transform, eps=self.eps)

    def __call__(
        self,
        completions: Sequence[Any],
        *,
        accuracy: Sequence[float | None],
        visual_attention: Sequence[float],
        num_generations: int,
        **_: Any,
    ) -> list[float]:
        """The reward of each completion.

        Args:
            completions: One item a completion, those of a prompt one after the other.
            accuracy: The accuracy reward of each.
            visual_attention: What `measure` gave for each; NaN counts as not looking.
            num_generations: Completions of a prompt.

        Returns:
            One value a completion; of a right answer under `tanh` in (-1, 1), otherwise 0 or more.

        >>> reward = VisualAttentionReward("ratio")
        >>> reward(["a", "b"], accuracy=[1.0, 0.0], visual_attention=[7.5, 18.9], num_generations=2)
        [7.5, 0.0]
        """
        values = torch.tensor(list(visual_attention), dtype=torch.float64)
        if self.transform == "tanh":
            groups = values.view(-1, num_generations)
            centred = groups - groups.nanmean(1, keepdim=True)
            spread = (centred**2).nanmean(1, keepdim=True).sqrt()
            values = torch.where(spread > 0, centred / spread.clamp(min=1e-12), 0.0).tanh().flatten()
        right = [value is not None and value > RIGHT for value in accuracy]
        values = values.nan_to_num(0.0)
        return [float(value) if yes else 0.0 for value, yes in zip(values.tolist(), right, strict=True)]
