"""Steering by its formulas, eager and N×N: an attention function for transformers that tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from avar_lightning.attention.reference import mass_of_probabilities
from avar_lightning.roles import Role


@dataclass
class Steered:
    """What the oracle does: strengths on the roles' columns, in these rows, layers and heads."""

    role_ids: Tensor
    image: float
    system: float
    mode: str
    rows: Tensor | None = None  # (B, N)
    layers: Sequence[int] | None = None
    heads: Mapping[int, Sequence[int]] | None = None


current: list[Steered] = []


def oracle_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """softmax(Z') V with Z' as the formulas say, in the model's own dtype."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).mT * kwargs["scaling"]
    mask = (
        torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril() if attention_mask is None else attention_mask
    )
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    weight = torch.ones_like(logits)
    if current and "CrossAttention" not in type(module).__name__:
        logits, weight = _steer(current[-1], module.layer_idx, logits)
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    plain = logits.softmax(-1)
    total = (plain * weight).sum(-1, keepdim=True)
    # A row that sees nothing but keys of weight 0 has nowhere else to look.
    probs = torch.where(total > 0, plain * weight / total.where(total > 0, 1), plain)
    return (probs @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), probs


def _steer(steered: Steered, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    strength = steered.image * (steered.role_ids == Role.IMAGE) - steered.system * (steered.role_ids == Role.SYSTEM)
    strength = strength.to(logits.dtype)[:, None, None, :].expand_as(logits)
    on = torch.ones_like(logits, dtype=torch.bool)
    if steered.rows is not None:
        on &= steered.rows[:, None, :, None]
    if steered.layers is not None and layer not in steered.layers:
        on &= False
    if steered.heads is not None:
        for head in range(logits.shape[1]):
            on[:, head] &= head in steered.heads.get(layer, ())
    strength = strength * on
    if steered.mode == "logit":
        return logits + strength * logits, torch.ones_like(logits)
    if steered.mode == "abs":
        return logits + strength * logits.abs(), torch.ones_like(logits)
    return logits, 1 + strength  # the probabilities themselves are multiplied, and renormalised


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", lambda **kwargs: sdpa_mask(**kwargs | {"allow_is_causal_skip": False}))


@contextmanager
def oracle(steered: Steered) -> Iterator[None]:
    """Steer every model whose attention is the oracle's."""
    current.append(steered)
    try:
        yield
    finally:
        current.pop()


@torch.no_grad()
def expected(
    build: Callable[[], PreTrainedModel], inputs: dict[str, Tensor], steered: Steered, keys: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Logits, and masses (L, B, H, N, G) of all rows in the self-attention layers, in float64."""
    twin = build().double()
    twin.set_attn_implementation({"text_config": "oracle"})
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with oracle(steered):
        out = twin(**inputs, output_attentions=True)
    kinds = [a for a in out.attentions if a is not None and a.shape[-1] == steered.role_ids.shape[1]]
    return out.logits, torch.stack([mass_of_probabilities(a, steered.role_ids, keys) for a in kinds])


class Growing:
    """Stands for `role_ids` in `Steered` while a twin generates without a cache: every new token is a response."""

    def __init__(self, role_ids: Tensor, twin: PreTrainedModel) -> None:
        self.role_ids, self.extra = role_ids, 0
        twin.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, decoder: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        self.extra = inputs.shape[1] - self.role_ids.shape[1]

    def __eq__(self, role: object) -> Any:
        return torch.nn.functional.pad(self.role_ids, (0, self.extra), value=int(Role.RESPONSE)) == role

    __hash__ = None  # type: ignore[assignment]
