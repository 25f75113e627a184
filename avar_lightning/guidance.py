"""Attention guidance (AGTO): which loss pulls attention to the image, and a watch on whether it is being gamed.

Three forms of the same idea. `published` is the paper's: reward log image attention, punish log system attention, each
without a floor. `share` bounds it: the image's share of what image and system get together. `hinge` asks for the share
only up to a target. The mathematics is in `losses.py`; here it meets a recorded forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from avar_lightning.attention import AttentionRecord
from avar_lightning.losses import attention_guidance_loss, attention_share_loss
from avar_lightning.roles import Role
from avar_lightning.vas import visual_attention_score

GuidanceForm = Literal["none", "published", "share", "hinge"]


@dataclass
class GuidanceConfig:
    """The attention-guided auxiliary loss of supervised fine-tuning."""

    form: GuidanceForm = "hinge"
    """`hinge` (image share up to `target`), `share` (bounded), `published` (the paper's), `none` (plain SFT)."""
    alpha: float = 0.15
    """`published`: weight of the term that raises attention to the image."""
    beta: float = 0.15
    """`published`: weight of the term that lowers attention to the system prompt."""
    weight: float = 0.15
    """`share` and `hinge`: weight of the loss."""
    target: float = 0.8
    """`hinge`: the share of image in image + system, in (0, 1), from which nothing is asked any more."""
    queries: list[Literal["user", "response"]] = field(default_factory=lambda: ["response"])
    """Whose attention is guided: `response` tokens, `user` tokens (the published code's choice), or both."""
    layers: list[int] | None = None
    """Decoder layers that are guided; every layer when unset."""
    eps: float = 1e-6
    """`published`: added inside the logarithms."""

    def __post_init__(self) -> None:
        """Reject weights and targets that have no meaning."""
        for name in ("alpha", "beta", "weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"guidance.{name}={getattr(self, name)} is negative, expected 0 (off) or more.")
        if not 0 < self.target < 1:
            raise ValueError(f"guidance.target={self.target} is no share, expected a value between 0 and 1.")
        if not self.queries:
            raise ValueError("guidance.queries is empty, expected response, user or both; or set form to none.")

    @property
    def query_roles(self) -> tuple[Role, ...]:
        """`queries` as roles."""
        return tuple(Role[name.upper()] for name in self.queries)

    @property
    def active(self) -> bool:
        """Whether the loss has any weight; if not, training is plain SFT bit for bit."""
        if self.form == "none":
            return False
        return self.alpha > 0 or self.beta > 0 if self.form == "published" else self.weight > 0


@dataclass
class GuidanceOutput:
    """What guidance adds to one training step; all scalars, only `loss` with a gradient."""

    loss: Tensor
    logs: dict[str, Tensor]
    num_guided: Tensor
    """Samples of the batch (of several processes: their mean) that have query, image and system tokens, or for
    `published` what one of its terms needs."""


def guide(
    record: AttentionRecord, config: GuidanceConfig, *, over_processes: Callable[[Tensor], Tensor] | None = None
) -> GuidanceOutput:
    """The weighted auxiliary loss of a recorded forward, and what to log of it.

    Args:
        record: Of `observe_attention` with the queries and layers of `config`, after the forward.
        config: Form and weights.
        over_processes: Gives the mean of a tensor over the processes that average their gradients, a collective call.
            The loss, averaged over them, and what is logged are then those of all their samples.

    Returns:
        The loss, and by metric name (under `train/`) its parts, mean attention mass on image and system, the image's
        share and VAS over the guided queries; means are over the samples that have what they need.
    """
    image, system = record.mass_of(Role.IMAGE), record.mass_of(Role.SYSTEM)
    query_mask = record.query_mask(*config.query_roles)
    num_image, num_system = ((record.role_ids == role).sum(dim=1) for role in (Role.IMAGE, Role.SYSTEM))
    over_processes = over_processes or _alone
    if config.form == "published":
        enhance, suppress = attention_guidance_loss(
            image, system, query_mask, num_image, num_system, eps=config.eps, over_processes=over_processes
        )
        parts = {"loss_enhance_img": enhance, "loss_suppress_sys": suppress}
        loss = config.alpha * enhance + config.beta * suppress
    else:
        target = config.target if config.form == "hinge" else None
        share_loss = attention_share_loss(image, system, query_mask, target=target, over_processes=over_processes)
        parts = {"loss_share": share_loss}
        loss = config.weight * share_loss
    with torch.no_grad():
        has_image, has_system = num_image > 0, num_system > 0
        has_keys = has_image | has_system if config.form == "published" else has_image & has_system
        rows = (query_mask & has_image[:, None])[None, :, None, :].expand_as(image)
        scores = {
            "image_share": visual_attention_score(image, system, query_mask, reduction="share"),
            "vas_ratio_of_means": visual_attention_score(image, system, query_mask, reduction="ratio_of_means"),
        }
        # Sums and what they are sums over, so that processes can be added up.
        sums = {name: (value.detach(), torch.ones_like(value)) for name, value in parts.items()}
        for name, mass in (("mass_image", image), ("mass_system", system)):
            sums[name] = mass.where(rows, 0.0).sum(), rows.sum()
        sums |= {name: (value.nansum(), value.isfinite().sum()) for name, value in scores.items()}
        sums["guided"] = ((query_mask.any(dim=1) & has_keys).sum(), torch.ones_like(loss))
        pairs = over_processes(
            torch.stack([torch.stack([top.to(loss.dtype), n.to(loss.dtype)]) for top, n in sums.values()])
        )
        means = dict(zip(sums, (pairs[:, 0] / pairs[:, 1]).unbind()))
    num_guided = means.pop("guided")
    return GuidanceOutput(loss, means, num_guided)


def _alone(values: Tensor) -> Tensor:
    return values


class GamingMonitor:
    """Notices when the model satisfies guidance instead of the task: system mass collapses while the LM loss rises.

    Both signals are smoothed over about `window` updates, the mass by its logarithm, so that a fall by orders of
    magnitude shows within a few. System mass has collapsed below `collapse` of its highest value; the LM loss has risen
    when it is more than `rise` above its lowest.
    """

    def __init__(self, *, window: int = 20, collapse: float = 0.01, rise: float = 0.1) -> None:
        self.window, self.collapse, self.rise = window, collapse, rise
        self.steps = 0
        self.loss = self.log_mass = self.highest_mass = 0.0
        self.lowest_loss = math.inf
        self.warned = False

    def update(self, lm_loss: float, system_mass: float) -> str | None:
        """Take one step's values; returns the warning the first time that both signals hold, else `None`.

        A mass of 0 or NaN means a batch without system tokens or queries, and is passed over.
        """
        if not system_mass > 0:
            return None
        self.steps += 1
        mix = 1 / min(self.steps, self.window)
        self.loss += mix * (lm_loss - self.loss)
        self.log_mass += mix * (math.log(system_mass) - self.log_mass)
        mass = math.exp(self.log_mass)
        self.highest_mass = max(self.highest_mass, mass)
        if self.steps < self.window:
            return None
        self.lowest_loss = min(self.lowest_loss, self.loss)
        collapsed = mass < self.collapse * self.highest_mass
        risen = self.loss > (1 + self.rise) * self.lowest_loss
        if self.warned or not (collapsed and risen):
            return None
        self.warned = True
        return (
            f"Guidance is being gamed: attention to the system prompt fell from {self.highest_mass:.2g} to {mass:.2g} "
            f"while the LM loss rose from {self.lowest_loss:.3g} to {self.loss:.3g}; lower the guidance weights or use "
            "the bounded form (guidance.form: share or hinge)."
        )
