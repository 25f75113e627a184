"""What differs between families of vision-language models, in one table; no other file asks for a model type.

A family that is not in the table gets what transformers itself says about the model, and an error where that is not
enough. Which families were tried with what is in docs/families.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Part = Literal["vision", "projector"]
"""Parts of a model beside its language model: what encodes pictures, and what brings that to the size of tokens."""
PARTS: tuple[Part, ...] = ("vision", "projector")


@dataclass(frozen=True)
class Family:
    """How a family's modules are called.

    Attributes:
        vision: Modules that encode pictures, relative to the base model.
        projector: Modules and parameters that bring it to the size of tokens; those inside `vision` are no part of it.
        units: Classes of whole layers, by the class inside them that transformers names as the one not to be split.
        square: Whether an image's tokens are one square in reading order, so that attention can be laid on the image.
        adapt: Changes a model that was just built, so that it computes the same for a sample alone and in a batch.
    """

    vision: tuple[str, ...]
    projector: tuple[str, ...]
    units: Mapping[str, str] = field(default_factory=dict)
    square: bool = False
    adapt: Callable[[PreTrainedModel], None] | None = None


def _keep_pictures_apart(model: PreTrainedModel) -> None:
    """Let Llama-3.2-Vision give a sample the same output in a batch as alone.

    In its cross-attention, tokens in front of a sample's first picture attend to all places of pictures in the batch,
    also to the empty ones that fill up samples with fewer; and so do all tokens of a sample without any.
    """
    config: Any = model.config
    hook = partial(_own_pictures, num_tiles=config.vision_config.max_num_tiles)
    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def _own_pictures(
    decoder: nn.Module, args: Any, kwargs: dict[str, Any], *, num_tiles: int
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: hide pictures that a sample has not, and make them zeros for one that has none at all.

    Zeros add nothing, as no layer of that attention has a bias, which is what the model does without pictures.
    """
    names = ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask")
    states, mask, sees = (kwargs.get(name) for name in names)
    if states is None or mask is None or sees is None:
        return None
    visible = ((mask == 0) & (sees != 0)).any(2, keepdim=True)  # (B, 1, 1, keys), by any token
    own = visible.unflatten(3, (-1, num_tiles * states.shape[1])).any(4, keepdim=True)
    own = own.expand(*own.shape[:4], num_tiles * states.shape[1]).flatten(3)
    has_picture = own.any(3, keepdim=True)
    mask = mask.masked_fill((sees == 0) & ~own & has_picture, torch.finfo(mask.dtype).min)
    states = states * has_picture.flatten().repeat_interleave(len(states) // len(mask))[:, None, None]
    return args, kwargs | {"cross_attention_states": states, "cross_attention_mask": mask}


_QWEN = Family(("visual",), ("visual.merger", "visual.deepstack_merger_list"))
_LLAVA = Family(("vision_tower",), ("multi_modal_projector", "image_newline"))

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llava": replace(_LLAVA, square=True),
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "internvl": _LLAVA,
    "gemma3": replace(_LLAVA, square=True),
    "smolvlm": Family(("vision_model",), ("connector",), {"SmolVLMVisionAttention": "SmolVLMEncoderLayer"}),
    "mistral3": _LLAVA,
    "mllama": Family(("vision_model",), ("multi_modal_projector",), adapt=_keep_pictures_apart),
}
"""By `config.model_type`."""

PROCESSORS_BEHIND_TORCHVISION = {"PixtralProcessor": "transformers.models.pixtral"}
"""Processors whose file imports torchvision without needing it for images, and their package."""

PLACEHOLDERS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
"""Attributes of a config that name tokens which stand for pictures."""

ROW_A_SAMPLE = {"pixel_attention_mask", "aspect_ratio_ids"}
"""Tensors that only those processors make whose pictures have a row a sample, and not a row a picture (Idefics,
SmolVLM, Llama-3.2-Vision)."""


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model; one that is not in the table is read off the model.

    Raises:
        ValueError: It is not in the table, and has no module that encodes pictures under a name of transformers.
    """
    known = FAMILIES.get(model.config.model_type)
    if known is not None:
        return known
    base, decoder = model.base_model, model.get_decoder()
    encoder = model.get_encoder("image")
    if encoder is model or encoder is base or encoder is decoder:
        raise ValueError(
            f"model type {model.config.model_type!r} has no module with a known name that encodes pictures, expected "
            f"one of {sorted(FAMILIES)} or a model whose get_encoder('image') finds it; add it to FAMILIES in "
            "avar_lightning/families.py."
        )
    children = {name: child for name, child in base.named_children() if not any(m is decoder for m in child.modules())}
    vision = tuple(name for name, child in children.items() if any(m is encoder for m in child.modules()))
    return Family(vision, tuple(name for name in children if name not in vision))


def adapt(model: PreTrainedModel) -> None:
    """Do to a model that was just built what its family needs; a saved model carries no trace of it."""
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.adapt is not None:
        family.adapt(model)


def part_pattern(family: Family, *parts: Part) -> str:
    """A regular expression that is found in the dotted names of modules and parameters of the parts.

    >>> bool(re.search(part_pattern(FAMILIES["qwen2_5_vl"], "vision"), "model.visual.blocks.0.attn.qkv"))
    True
    >>> bool(re.search(part_pattern(FAMILIES["qwen2_5_vl"], "vision"), "model.visual.merger.mlp.0"))
    False
    """
    projector = _names(family.projector)
    found = {"vision": rf"(?!{projector}){_names(family.vision)}", "projector": projector}
    return rf"(^|\.)({'|'.join(found[part] for part in parts)})"


def _names(modules: tuple[str, ...]) -> str:
    return rf"({'|'.join(map(re.escape, modules))})(\.|$)" if modules else r"(?!)"


def placeholder_ids(config: Any) -> list[int] | None:
    """Tokens that stand for pictures: sampled without one behind them, they break the next forward."""
    found = {getattr(config, name, None) for name in PLACEHOLDERS}
    return sorted(token for token in found if isinstance(token, int)) or None


def placeholder_texts(processor: Any) -> set[str]:
    """What stands for a picture in rendered text and in tokens: typed by a user, it would be taken for one."""
    owners = (processor, getattr(processor, "tokenizer", None))
    found = {getattr(owner, name, None) for owner in owners for name in ("image_token", "video_token")}
    return {text for text in found if isinstance(text, str) and text}


def has_row_a_sample(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the pictures of a processor's output have a row for each sample, also for one without a picture.

    Elsewhere the (picture, patch, …) layout of the LLaVA families is told apart by its image sizes.
    """
    pixels = tensors.get("pixel_values")
    if pixels is None or "image_sizes" in tensors:
        return False
    return bool(ROW_A_SAMPLE & tensors.keys()) or pixels.ndim >= 5


def sharding_units(model: PreTrainedModel) -> set[str]:
    """Classes of the layers whose weights are shared among processes as one.

    Raises:
        ValueError: The model has none, and every step would gather it whole.
    """
    family = FAMILIES.get(model.config.model_type)
    whole = family.units if family else {}
    named = {whole.get(name, name) for name in model._no_split_modules or ()}
    if not named & {type(module).__name__ for module in model.modules()}:
        raise ValueError(
            f"{type(model).__name__} names no layers that belong together (_no_split_modules is "
            f"{model._no_split_modules}), expected those to be shared among processes one by one; use ddp."
        )
    return named


def has_square_images(model_type: str) -> bool:
    """Whether an image's tokens are one square in reading order; false of families that are not in the table."""
    family = FAMILIES.get(model_type)
    return family is not None and family.square
