"""Find what a callback needs inside somebody else's LightningModule and batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from avar_lightning.attention import find_vlm
from avar_lightning.processing import load_processor
from avar_lightning.roles import tag_roles


def locate_vlm(module: LightningModule, path: str | None = None) -> PreTrainedModel:
    """Find the Hugging Face vision-language model of a module, below PEFT, FSDP or torch.compile wrappers.

    Args:
        module: the LightningModule.
        path: attribute path of the model or of its wrapper, for a module that holds several.

    Raises:
        AttributeError: nothing is at `path`.
        ValueError: the module holds no such model, or several and `path` does not choose.
    """
    try:
        return find_vlm(module if path is None else module.get_submodule(path))
    except ValueError as error:
        raise ValueError(
            f"{type(module).__name__} must hold one model to measure: {error} Name its attribute with "
            "the callback's `model`."
        ) from error


def find_processor(module: LightningModule, given: Any = None) -> Any | None:
    """Find a processor or tokenizer with a chat template; None where there is none.

    Args:
        module: attached to a trainer; it and its datamodule are searched for `processor` and `tokenizer`.
        given: what the user gave: an object with `apply_chat_template`, or the name or folder of a model.
    """
    if isinstance(given, str):
        return _load_once(given)
    if given is not None:
        return given
    for owner in (module, getattr(module.trainer, "datamodule", None)):
        for name in ("processor", "tokenizer"):
            candidate = getattr(owner, name, None)
            if hasattr(candidate, "apply_chat_template"):
                return candidate
    return None


@cache
def _load_once(name: str) -> Any:
    return load_processor(name)


def find_input_ids(batch: Any) -> Tensor:
    """Give the token ids (B, N) of a batch.

    Raises:
        ValueError: the batch is no mapping with a two-dimensional tensor `input_ids`.
    """
    input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        what = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"validation batch is {what}, expected a mapping with a tensor 'input_ids' of shape (batch, "
            "tokens); collate batches into such a dict to measure attention."
        )
    return input_ids


def find_role_ids(batch: Mapping[str, Any], module: LightningModule, processor: Any = None) -> Tensor:
    """Give the role of every token, (B, N) int64: the batch's own, else read from the chat template.

    Raises:
        ValueError: roles and tokens differ in shape, or there is nothing to find roles with.
        ChatTemplateError: the chat template cannot be segmented.
    """
    input_ids = find_input_ids(batch)
    role_ids = batch.get("role_ids")
    if role_ids is None:
        owner = find_processor(module, processor)
        if owner is None:
            raise ValueError(
                f"batch has no 'role_ids' and neither {type(module).__name__} nor its datamodule has a "
                "`processor` or `tokenizer` with a chat template; set one, or give the callback a `processor`."
            )
        role_ids = tag_roles(input_ids, owner, attention_mask=batch.get("attention_mask"))
    if role_ids.shape != input_ids.shape:
        raise ValueError(
            f"role_ids has shape {tuple(role_ids.shape)}, expected that of input_ids "
            f"{tuple(input_ids.shape)}; give every token one role."
        )
    return role_ids.to(device=input_ids.device, dtype=torch.long)


def sample_ids(batch: Mapping[str, Any], num_samples: int) -> list[Any]:
    """Give each sample's `id` column, None where the batch has no such columns."""
    columns = batch.get("columns")
    if not isinstance(columns, list) or len(columns) != num_samples:
        return [None] * num_samples
    return [column.get("id") if isinstance(column, Mapping) else None for column in columns]
