"""Hold the Visual Attention Score of a training at a target by moving the weights of guidance."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from avar_lightning.guidance import GuidanceConfig

VAS = "train/vas_ratio_of_means"
LEAST = 1e-3
"""Smallest factor: with none at all nothing would be observed, and nothing known of VAS."""


class GuidanceController(Callback):
    """Multiply the weights of guidance (α and β of `published`, else `weight`) by a factor that holds VAS at a target.

    The factor is gain · log(target / VAS), between 0 and 1: the configured weights far below the target, nothing at it.
    VAS is the ratio of mean masses of the guided queries and layers, smoothed over batches. Guidance makes VAS climb,
    and without it VAS stays: a weight is a speed. So a proportional law settles at the target, where an integral one
    overshoots and cannot come back. Logs `train/guidance_factor`.

    Args:
        target: VAS to hold, a positive ratio.
        gain: How late to slow down: from target · exp(-1 / gain) on.
        smoothing: Share of the old value in the running mean of log VAS, in [0, 1).

    Raises:
        ValueError: An argument has no meaning, or the module has no active `guidance`.
    """

    def __init__(self, target: float, *, gain: float = 2.0, smoothing: float = 0.5) -> None:
        for name, value in (("target", target), ("gain", gain)):
            if not value > 0:
                raise ValueError(f"{name}={value}, expected more than 0.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}, expected a share in [0, 1).")
        self.target, self.gain, self.smoothing = target, gain, smoothing
        self.factor = 1.0
        """Of the configured weights, in use now."""
        self.log_vas: float | None = None
        """Running mean; None before the first batch."""
        self._configured: GuidanceConfig | None = None

    def state_dict(self) -> dict[str, Any]:
        """Keep what was reached."""
        return {"factor": self.factor, "log_vas": self.log_vas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.factor, self.log_vas = state_dict["factor"], state_dict["log_vas"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the configured weights."""
        guidance = getattr(pl_module, "guidance", None)
        if not isinstance(guidance, GuidanceConfig) or not guidance.active:
            raise ValueError(
                f"GuidanceController found no active guidance in {type(pl_module).__name__}, expected an SFTModule "
                "with guidance.form published, share or hinge and a weight above 0."
            )
        self._configured = guidance
        self._apply(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the factor by what the batch showed; a batch with nothing to guide says nothing."""
        vas = float(trainer.callback_metrics.get(VAS, math.nan))
        if math.isfinite(vas) and vas > 0:
            now = math.log(vas)
            old = now if self.log_vas is None else self.log_vas
            self.log_vas = self.smoothing * old + (1 - self.smoothing) * now
            self.factor = min(1.0, max(LEAST, self.gain * (math.log(self.target) - self.log_vas)))
            self._apply(pl_module)
        pl_module.log("train/guidance_factor", self.factor)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module with the weights that it was configured with."""
        if self._configured is not None:
            pl_module.guidance, self._configured = self._configured, None  # type: ignore[assignment]

    def _apply(self, pl_module: LightningModule) -> None:
        configured = self._configured
        assert configured is not None  # set when training started
        weights = {name: self.factor * getattr(configured, name) for name in ("alpha", "beta", "weight")}
        pl_module.guidance = replace(configured, **weights)  # type: ignore[assignment]
