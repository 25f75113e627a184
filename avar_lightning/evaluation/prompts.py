"""What a batch asks: its samples, and prompts as text for readers and as fingerprints that tell other prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from avar_lightning.families import placeholder_ids
from avar_lightning.processing import tokenizer_of


def samples_of(batch: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """Columns of the samples of a batch.

    Raises:
        ValueError: There are none, or a sample has no id.
    """
    columns = batch.get("columns")
    if not isinstance(columns, list) or len(columns) != size or any(column.get("id") is None for column in columns):
        raise ValueError(
            "a batch has no 'columns' with the id of each sample, expected those of avar convert --benchmark; read its "
            "shards with ShardDataModule, or carry a list of mappings in batch['columns']."
        )
    return [dict(column) for column in columns]


def pictures_of(batch: Mapping[str, Any], size: int) -> list[list[Image.Image]]:
    """Pictures of each sample, where the batch carries them (`keep_images` of `ShardDataModule`)."""
    images = batch.get("images")
    if not isinstance(images, list) or len(images) != size or not all(isinstance(each, list) for each in images):
        return [[] for _ in range(size)]
    return [[image for image in each if isinstance(image, Image.Image)] for each in images]


def fingerprint(input_ids: Tensor, images: Sequence[Image.Image] = ()) -> str:
    """Sixteen hexadecimal digits of a prompt's tokens (N,), those of images included, and of the images' pixels.

    >>> fingerprint(torch.tensor([1, 2])) == fingerprint(torch.tensor([1, 2, 2]))
    False
    """
    digest = hashlib.sha256(str(input_ids.tolist()).encode())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16]


def opens_thinking(input_ids: Tensor, processor: Any) -> bool:
    """Whether a prompt (N,) ends with `<think>`, as some chat templates make it, so that a response begins within."""
    return str(tokenizer_of(processor).decode(input_ids[-16:])).rstrip().endswith("<think>")


def text_of(input_ids: Tensor, processor: Any, config: PretrainedConfig) -> str:
    """A prompt (N,) as text, without what stands for an image's pixels."""
    placeholders = input_ids.new_tensor(placeholder_ids(config) or [])
    words = input_ids[~torch.isin(input_ids, placeholders)]
    return str(tokenizer_of(processor).decode(words, skip_special_tokens=True)).strip()
