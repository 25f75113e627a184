"""What was asked: a prompt's tokens as text for readers, and as a fingerprint that tells other prompts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from avar_lightning.families import placeholder_ids
from avar_lightning.processing import tokenizer_of


def fingerprint(input_ids: Tensor) -> str:
    """Sixteen hexadecimal digits of a prompt's tokens (N,), those of images included.

    >>> fingerprint(torch.tensor([1, 2])) == fingerprint(torch.tensor([1, 2, 2]))
    False
    """
    return hashlib.sha256(str(input_ids.tolist()).encode()).hexdigest()[:16]


def text_of(input_ids: Tensor, processor: Any, config: PretrainedConfig) -> str:
    """A prompt (N,) as text, without what stands for an image's pixels."""
    placeholders = input_ids.new_tensor(placeholder_ids(config) or [])
    words = input_ids[~torch.isin(input_ids, placeholders)]
    return str(tokenizer_of(processor).decode(words, skip_special_tokens=True)).strip()
