"""Which model and which of its decoder layers are meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

LayerSpec = Sequence[int] | str
"""Layer numbers, or text: `"9-14,20"` (numbers and inclusive ranges) or `"0.3-0.5"` (fractions of the depth)."""

_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_FRACTIONS = re.compile(r"([01]\.\d*)-([01]\.\d*)")


def find_vlm(module: nn.Module) -> PreTrainedModel:
    """The Hugging Face vision-language model in a module: itself, or the outermost below PEFT or Lightning.

    Args:
        module: Any module.

    Returns:
        The model; its config has a text config beside others.

    Raises:
        ValueError: There is none, or there are several side by side.
    """
    found = list(dict.fromkeys(_outermost(module)))
    if len(found) != 1:
        what = f"{len(found)} vision-language models" if found else "no Hugging Face vision-language model"
        raise ValueError(f"{type(module).__name__} holds {what}; pass the one transformers model that is meant.")
    return found[0]


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Vision-language models that are in no other; perhaps one several times, where it has several names."""
    if isinstance(module, PreTrainedModel) and module.config.get_text_config() is not module.config:
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def attention_layers(decoder: nn.Module) -> tuple[int, ...]:
    """The decoder's layers whose attention is a softmax over its tokens: no cross-attention, no linear attention."""
    modules = [module for module in decoder.modules() if hasattr(module, "layer_idx")]
    named = {int(m.layer_idx) for m in modules if "Attention" in type(m).__name__ and not is_cross_attention(m)}  # type: ignore[arg-type]
    return tuple(sorted(named))


def is_cross_attention(module: nn.Module) -> bool:
    """Whether a layer attends to something other than the forward's tokens, so that its keys have no roles."""
    return "CrossAttention" in type(module).__name__


def select_layers(layers: LayerSpec | None, num_layers: int) -> tuple[int, ...] | None:
    """The layers of a decoder that a specification means.

    Args:
        layers: Numbers; `"9-14"` or `"0,2,9-14"`, ranges inclusive; `"0.3-0.5"`, the layers whose middle lies in this
            part of the depth; `None` for no choice.
        num_layers: Layers of the decoder.

    Returns:
        Ascending layer numbers, or `None` for no choice.

    Raises:
        ValueError: The text cannot be read, or it means no layer or one that the decoder has not.

    >>> select_layers("0,9-11", 28)
    (0, 9, 10, 11)
    >>> select_layers("0.25-0.5", 8)
    (2, 3)
    """
    if layers is None:
        return None
    chosen: Sequence[int]
    if isinstance(layers, str):
        text = layers.replace(" ", "")
        if found := _FRACTIONS.fullmatch(text):
            low, high = map(float, found.groups())
            chosen = [layer for layer in range(num_layers) if low <= (layer + 0.5) / num_layers <= high]
        elif _NUMBERS.fullmatch(text):
            ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
            chosen = [layer for part in ends for layer in range(part[0], part[-1] + 1)]
        else:
            raise ValueError(
                f'layers is {layers!r}, expected numbers and ranges like "0,9-14", '
                'or a part of the depth like "0.3-0.5".'
            )
    else:
        chosen = layers
    if not chosen or not set(chosen) <= set(range(num_layers)):
        given = repr(layers) if isinstance(layers, str) else str(list(layers))
        raise ValueError(f"layers is {given}, expected one or more of the decoder's layers 0 to {num_layers - 1}.")
    return tuple(sorted(set(chosen)))
