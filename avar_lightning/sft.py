"""Supervised fine-tuning of a vision-language model with attention guidance, as a LightningModule."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from avar_lightning.attention import observe_attention
from avar_lightning.guidance import GamingMonitor, GuidanceConfig, GuidanceOutput, guide
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig, VLMModule, as_config
from avar_lightning.scoring import ScoringConfig

# Logged batches in a row without a sample to guide after which the run stops.
PATIENCE = 10


class SFTModule(VLMModule):
    """Fine-tune a Hugging Face vision-language model on chat samples, with the attention-guided auxiliary loss.

    Logs `train/loss`, `train/loss_lm`, the parts of guidance and what attention did; in validation `val/loss` and, when
    answers are generated, `val/accuracy`; the same under `test/` in a test.

    Args:
        vlm: Which model, and how to load it.
        guidance: The auxiliary loss; `form: none` (or weight 0) is plain SFT bit for bit.
        optimizer: AdamW and its schedule.
        max_new_tokens: Longest answer generated in validation to measure `val/accuracy`; 0 generates nothing.
        scoring: How the LM loss is computed without holding all logits.
    """

    stage = "sft"

    def __init__(
        self,
        vlm: VLMConfig | None = None,
        guidance: GuidanceConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        max_new_tokens: int = 0,
        scoring: ScoringConfig | None = None,
    ) -> None:
        super().__init__(vlm, optimizer, max_new_tokens, scoring)
        self.guidance = as_config(GuidanceConfig, guidance)
        self.save_configuration(guidance=asdict(self.guidance))
        self.gaming = GamingMonitor()
        self.unguided = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """LM loss plus guidance of one batch."""
        guidance = self.guidance
        observing = (
            observe_attention(self.model, batch["role_ids"], queries=guidance.query_roles, layers=guidance.layers)
            if guidance.active
            else nullcontext()
        )
        with observing as record:
            total, count = self.lm_loss(batch)
        # Gradients are averaged over processes, so that a sum is divided by the mean number of tokens.
        loss = loss_lm = total / self.mean_over_processes(count.to(total.dtype)).clamp(min=1)
        guided = None
        if record is not None:
            guided = guide(record, guidance, over_processes=self.mean_over_processes)
            loss = loss_lm + guided.loss
        means = self.mean_over_processes(torch.stack([loss, loss_lm]).detach())
        logs = {"loss_lm": means[1]}
        if guided is not None:
            logs |= guided.logs
            self._watch(means[1], guided)
        size = len(batch["input_ids"])
        self.log("train/loss", means[0], prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=size)
        return loss

    def _watch(self, loss_lm: Tensor, guided: GuidanceOutput) -> None:
        """Stop when guidance guides nothing, warn when it is gamed."""
        # Reading a value waits for the device, so only where values are logged anyway.
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.unguided = 0 if guided.num_guided.item() else self.unguided + 1
            if self.unguided == PATIENCE:
                raise ValueError(
                    f"guidance.form={self.guidance.form} found no sample to guide in {PATIENCE} logged batches, "
                    "expected samples with image, system and query tokens; add a system message to the samples, or set "
                    "guidance.form to none."
                )
            warning = self.gaming.update(loss_lm.item(), guided.logs["mass_system"].item())
            if warning:
                rank_zero_warn(warning)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is watched over many batches."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["watched"] = {"unguided": self.unguided, "gaming": vars(self.gaming).copy()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up."""
        super().on_load_checkpoint(checkpoint)
        watched = checkpoint.get("watched", {})
        self.unguided = watched.get("unguided", 0)
        vars(self.gaming).update(watched.get("gaming", {}))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm under FSDP too, where only the sharded model itself knows it."""
        sharded = getattr(self.trainer.strategy, "model", None)
        if isinstance(sharded, FullyShardedDataParallel) and gradient_clip_algorithm in (None, "norm"):
            if gradient_clip_val:
                sharded.clip_grad_norm_(gradient_clip_val)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
