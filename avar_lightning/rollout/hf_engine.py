"""Rollouts from the policy in this very process: transformers' `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from avar_lightning.data.collate import Collator
from avar_lightning.families import placeholder_ids
from avar_lightning.model import up_to_end
from avar_lightning.processing import padding_id
from avar_lightning.rollout.engine import Completions, Prompts, SamplingConfig
from avar_lightning.sharding import gathered


class HFRolloutEngine:
    """Sample in batches with left padding and a KV cache, in the precision of the training step.

    It needs no other program. Where FSDP2 shares the weights, each process holds them whole while it samples.

    Args:
        batch_size: Completions that are sampled together; all of a step when unset.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"rollout.batch_size={batch_size}, expected 1 or more, or null for all at once.")
        self.batch_size = batch_size

    def setup(self, model: nn.Module, processor: Any, sampling: SamplingConfig) -> None:
        """Take the policy."""
        self.model: Any = model
        self.sampling, self.ends = sampling, sampling.end_ids(model, processor)
        self.padding = padding_id(processor)

    def sync(self, step: int) -> None:
        """Nothing to do: it samples from the policy itself."""

    def teardown(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def generate(self, prompts: Prompts, num_generations: int, *, seed: int) -> Completions:
        """Sample completions of each prompt; the same for the same weights, prompts and seed."""
        rows = [row for row in prompts.rows for _ in range(num_generations)]
        step = self.batch_size or len(rows)
        device = next(self.model.parameters()).device
        with (
            gathered(self.model),
            evaluating(self.model),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            parts = [self._sample(rows[start : start + step], device) for start in range(0, len(rows), step)]
        token_ids = [ids for part in parts for ids in part]
        finished = [bool(len(ids)) and int(ids[-1]) in self.ends for ids in token_ids]
        return Completions(token_ids, finished)

    def _sample(self, rows: list[Any], device: torch.device) -> list[Tensor]:
        batch = {name: value.to(device) for name, value in Collator(self.padding).merge(rows, "left").items()}
        batch.pop("role_ids", None)
        tokens = self.model.generate(
            **batch,
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=True,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            # What a checkpoint's own generation settings may ask for would be another policy than the one that learns.
            top_k=0,
            min_p=None,
            repetition_penalty=1.0,
            suppress_tokens=placeholder_ids(self.model.config),
            pad_token_id=self.padding,
            eos_token_id=self.ends,
            # Weights are whole, so processes need not wait for each other's longest completion.
            synced_gpus=False,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        lengths = up_to_end(new, self.ends).sum(1)
        return [row[:length] for row, length in zip(new, lengths.tolist(), strict=True)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards every part of it in the mode that it had.

    Casts of weights that autocast kept are forgotten: made without a gradient, they would cut it in the next forward.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        torch.clear_autocast_cache()
