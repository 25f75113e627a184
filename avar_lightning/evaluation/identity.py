"""What makes answers comparable: the weights themselves, and how answers were made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avar_lightning.attention import Intervention
from avar_lightning.data.shards import MANIFEST, expand_urls, is_remote
from avar_lightning.sharding import gathered

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def about_model(
    model: PreTrainedModel,
    *,
    precision: str,
    max_new_tokens: int,
    repetition_penalty: float,
    intervention: Intervention | None,
) -> dict[str, Any]:
    """What answers in one folder have in common. A collective call, where processes share the weights.

    Args:
        model: That answers.
        precision: Of the trainer.
        max_new_tokens: Longest answer.
        repetition_penalty: Of greedy decoding.
        intervention: What is steered; None for nothing.
    """
    text = model.config.get_text_config()
    attention = getattr(text, "_attn_implementation", None) or ""
    return {
        "model": model.config.name_or_path or type(model).__name__,
        "weights": weights_checksum(model),
        "precision": precision,
        "attention": str(attention).removeprefix("avar_"),
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "repetition_penalty": repetition_penalty,
        "steering": None if intervention is None else dataclasses.asdict(intervention),
    }


def about_shards(spec: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """What manifests of local shards say beside samples and shards, as the commit of the Hub, by folder."""
    found = {}
    for folder in sorted({Path(url).parent for url in expand_urls(spec) if not is_remote(url)}):
        if (folder / MANIFEST).is_file():
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            found[str(folder)] = {name: value for name, value in manifest.items() if name not in ("samples", "shards")}
    return {folder: known for folder, known in found.items() if known}


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that differ where any weight does, wherever the weights lie.

    Of each parameter name, shape, dtype, and the sum of its bits read as integers, which is exact in any order. A
    collective call, where processes share the weights.

    >>> weights_checksum(torch.nn.Linear(2, 1)) == weights_checksum(torch.nn.Linear(2, 1))
    False
    """
    digest = hashlib.sha256()
    with gathered(model):
        for name, parameter in sorted(model.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_sum_of_bits(parameter)}\n".encode())
    return digest.hexdigest()[:16]


def _sum_of_bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().view(-1)
    return int(flat.view(_WORDS[flat.element_size()]).sum(dtype=torch.int64)) if flat.numel() else 0
