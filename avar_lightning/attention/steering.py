"""Steering: more or less attention to groups of keys, exact beside any kernel, without the N×N matrix.

With Z the scaled logits before the mask, a_j the strength of key j (α for an image token, −α for a system token, 0 for
others) and rows that are steered:

- `logit`: Z (1 + a), AVAR's form. Scaling a column of Z is scaling that key, so the kernel gets scaled keys.
- `mass`: Z + log(1 + a), which multiplies probabilities by 1 + a and renormalises. Queries and keys get further
  columns whose product is the bias.
- `abs`: Z + a |Z|, PAI's form (Liu et al., 2024), which raises attention wherever a > 0. No kernel does it, so the
  steered rows are computed here, a block at a time.

The strength of a row or head that is not steered is 0. What masses are measured with is `LogitChange`, the definition
itself, so that steered masses are a check on how the kernel was led to compute the same.

Shape letters: B batch, H query heads, M key heads, N rows of the forward, Q selected rows, K keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from avar_lightning.attention.decoder import LayerSpec, is_cross_attention
from avar_lightning.attention.mass import attention_of_rows
from avar_lightning.attention.registry import AttentionCall, AttentionFunction
from avar_lightning.attention.tracking import mask_of, roles_of_keys
from avar_lightning.attention.visibility import Selection, visibility_of
from avar_lightning.roles import Role

Mode = Literal["logit", "mass", "abs"]
MODES: tuple[Mode, ...] = ("logit", "mass", "abs")

NOTHING = -1000.0
"""log of a weight of 0: a probability of 0 in every precision."""

COLUMNS = 8
"""Columns that a bias adds to queries and keys: three are used, kernels like multiples of eight."""

LARGEST = 6e4
"""What float16 still holds; a bias is divided by the scale of the logits before it becomes columns."""

FLASH_HEAD_DIM = 256
"""The widest heads that FlashAttention takes."""


@dataclass(frozen=True)
class Intervention:
    """What to steer, how strongly and where; the arguments of `steer_attention`."""

    image: float = 0.15
    """Strength on image tokens, -1 or more; positive raises their attention."""
    system: float = 0.4
    """Strength on system tokens, 1 or less; positive lowers their attention."""
    mode: Mode = "logit"
    """`logit` scales logits (the paper's), `mass` scales probabilities, `abs` adds to logits by their size (PAI's)."""
    queries: tuple[int, ...] | Literal["last"] | None = None
    """Roles of the rows that are steered, `"last"` for the last token of every forward alone; every row when unset."""
    layers: LayerSpec | None = None
    """Decoder layers: numbers, `"9-14"` or a part of the depth like `"0.3-0.5"`; every layer when unset."""
    heads: Mapping[int, Sequence[int]] | None = field(default=None, hash=False)
    """Query heads by layer, instead of `layers`; every head when unset."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        for name, weight in (("image", 1 + self.image), ("system", 1 - self.system)):
            if not 0 <= weight < float("inf"):
                bound = "-1 or more" if name == "image" else "1 or less"
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which makes its weight {weight:g}; expected {bound}, so that no "
                    "weight is negative."
                )
        if isinstance(self.queries, str):
            if self.queries != "last":
                raise ValueError(f'queries is {self.queries!r}, expected roles, "last", or None for every row.')
        elif self.queries is not None and (not self.queries or not set(self.queries) <= set(Role)):
            known = ", ".join(f"Role.{role.name}" for role in Role)
            raise ValueError(f'queries is {list(self.queries)}, expected roles among {known}, "last", or None.')
        if self.heads is not None and (self.layers is not None or not self.heads):
            raise ValueError("heads names its own layers, at least one; leave layers unset beside it.")

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.image != 0 or self.system != 0


class LogitChange:
    """The definition of steering, on a block of logits.

    Args:
        mode: One of `MODES`.
        strength_BK: a_j, float32.
        selected_BHQ: Which rows and heads are steered, (B, H or 1, Q), or None for all.
    """

    def __init__(self, mode: Mode, strength_BK: Tensor, selected_BHQ: Tensor | None) -> None:
        self.mode, self.strength_BK, self.selected_BHQ = mode, strength_BK, selected_BHQ

    def __call__(self, logits_BHQK: Tensor, start: int, stop: int) -> Tensor | None:
        """Change the scaled logits of rows `start:stop` in place; return d new / d old, None for 1."""
        strength = self.strength_BK[:, None, None, : logits_BHQK.shape[-1]].to(logits_BHQK.dtype)
        if self.selected_BHQ is not None:
            strength = strength * self.selected_BHQ[:, :, start:stop, None]
        if self.mode == "mass":
            logits_BHQK.add_(_log_weight(strength))
            return None
        slope = 1 + (strength * logits_BHQK.detach().sign() if self.mode == "abs" else strength)
        logits_BHQK.mul_(slope)
        return slope


class ForwardSteering:
    """One steered forward, as its attention layers see it.

    Args:
        intervention: What to do.
        role_ids: Roles of all keys (B, num_past + N).
        num_past: Keys that were there before row 0.
        layers: The layers, or None for all.
        last_BN: The last row of each sample, for `queries="last"`.
    """

    def __init__(
        self,
        intervention: Intervention,
        role_ids: Tensor,
        num_past: int,
        layers: tuple[int, ...] | None,
        last_BN: Tensor | None,
    ) -> None:
        self.intervention, self.role_ids, self.layers = intervention, role_ids, layers
        queries = intervention.queries
        self.rows_BN: Tensor | None = None
        if queries is not None:
            self.rows_BN = last_BN if isinstance(queries, str) else mask_of(role_ids[:, num_past:], queries)
        # Read once: a layer that asked would make the device wait.
        self.any_row = self.rows_BN is None or bool(self.rows_BN.any())
        self.every_row = self.rows_BN is None or bool(self.rows_BN.all())
        self.done: set[int] = set()
        # What depends on the device and the keys' number, dtype and scale alone is the same for all layers.
        self._strengths: dict[tuple[torch.device, int], Tensor] = {}
        self._biases: dict[tuple[torch.device, int, torch.dtype, float], Tensor] = {}
        self._rows: dict[torch.device, Selection] = {}

    def wants(self, module: nn.Module) -> bool:
        """Whether to steer this layer. The keys of cross-attention are no tokens with roles, so it is left alone."""
        if is_cross_attention(module):
            return False
        return self.layers is None or module.layer_idx in self.layers

    def change_of(self, call: AttentionCall, rows: Selection | None = None) -> LogitChange | None:
        """What is done to the logits of all rows, or of selected ones; None for nothing."""
        if not self.any_row:
            return None
        selected_BHN = self._selected(call)
        if selected_BHN is not None and rows is not None:
            index = rows.index_BS[:, None].expand(-1, selected_BHN.shape[1], -1)
            selected_BHN = selected_BHN.expand(len(index), -1, -1).gather(2, index)
        return LogitChange(self.intervention.mode, self._strength(call), selected_BHN)

    def attend(
        self, call: AttentionCall, value: Tensor, base: AttentionFunction, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The steered output of the attention function `base(query, key, value, **kwargs)`."""
        self.done.add(call.module.layer_idx)  # type: ignore[arg-type]
        q_BHND, k_BMKD = call.q_BHND, call.k_BMKD
        if not self.any_row:
            return base(q_BHND, k_BMKD, value, **kwargs)
        if call.softcap is not None:
            raise ValueError(
                f"attention with softcap ({call.softcap}) cannot be steered: the kernel caps logits after they were "
                "steered; choose other layers or models."
            )
        if self.intervention.mode == "mass":
            return self._with_bias(call, value, base, kwargs)
        selected_BHN = self._selected(call)
        if self.intervention.mode == "logit":
            factor_BK = 1 + self._strength(call)
            scaled = (k_BMKD * factor_BK[:, None, :, None]).to(k_BMKD.dtype)
            steered = base(q_BHND, scaled, value, **kwargs)
        else:
            if kwargs.get("dropout"):
                raise ValueError(
                    f'mode "abs" has no attention dropout, and the model wants {kwargs["dropout"]}; '
                    "call model.eval(), or choose another mode."
                )
            steered = self._block_by_block(call, value, with_weights=call.is_eager)
        if selected_BHN is None:
            return steered
        plain = base(q_BHND, k_BMKD, value, **kwargs)
        output = torch.where(selected_BHN.transpose(1, 2)[..., None], steered[0], plain[0])
        # Only probabilities (B, H, N, K) are put together; Flex returns its log-sum-exp in their place.
        if steered[1] is None or plain[1] is None or plain[1].dim() != 4:
            return output, None
        return output, torch.where(selected_BHN[..., None], steered[1], plain[1])

    def _with_bias(
        self, call: AttentionCall, value: Tensor, base: AttentionFunction, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with log(1 + a) on the logits: selected · log(1 + a) as a product of further columns."""
        q_BHND, k_BMKD = call.q_BHND, call.k_BMKD
        head_dim = q_BHND.shape[-1]
        if call.is_flash and head_dim + COLUMNS > FLASH_HEAD_DIM:
            raise ValueError(
                f'mode "mass" needs {COLUMNS} columns beside heads of {head_dim}, and FlashAttention takes '
                f'{FLASH_HEAD_DIM}; choose mode "logit", or load the model with attn_implementation="sdpa".'
            )
        scale = head_dim**-0.5 if call.scale is None else call.scale
        columns_B1KC = self._columns(call, scale)
        k_extended = torch.cat([k_BMKD, columns_B1KC.expand(-1, k_BMKD.shape[1], -1, -1)], dim=-1)
        selected = self._selected(call)
        ones = q_BHND.new_ones(1, 1, 1) if selected is None else selected.to(q_BHND.dtype)
        ones = ones[..., None].expand(*q_BHND.shape[:3], COLUMNS)
        output, weights = base(
            torch.cat([q_BHND, ones], dim=-1), k_extended, pad(value, (0, COLUMNS)), **kwargs | {"scaling": scale}
        )
        return output[..., : value.shape[-1]], weights

    def _block_by_block(
        self, call: AttentionCall, value: Tensor, *, with_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the steered rows by its definition; zero in other rows."""
        rows = self._rows_on(call)
        output_BHQD, probs_BHQK = attention_of_rows(
            rows.gather(call.q_BHND),
            call.k_BMKD,
            value,
            visible=visibility_of(call, rows),
            change=self.change_of(call, rows),
            scale=call.scale,
            with_probabilities=with_weights,
        )
        weights = None if probs_BHQK is None else rows.scatter(probs_BHQK)
        return rows.scatter(output_BHQD).transpose(1, 2).contiguous(), weights

    def _rows_on(self, call: AttentionCall) -> Selection:
        """The steered rows, on the device of the layer."""
        device = call.q_BHND.device
        if device not in self._rows:
            batch, _, num_rows, _ = call.q_BHND.shape
            rows_BN = torch.ones(batch, num_rows, dtype=torch.bool) if self.rows_BN is None else self.rows_BN
            self._rows[device] = Selection(rows_BN.to(device))
        return self._rows[device]

    def _strength(self, call: AttentionCall) -> Tensor:
        """a_j of every key (B, K), float32."""
        key = (call.k_BMKD.device, call.k_BMKD.shape[2])
        if key not in self._strengths:
            roles_BK = roles_of_keys(self.role_ids, key[1]).to(key[0])
            strength_BK = torch.zeros(roles_BK.shape, device=key[0], dtype=torch.float32)
            strength_BK.masked_fill_(roles_BK == Role.IMAGE, self.intervention.image)
            self._strengths[key] = strength_BK.masked_fill_(roles_BK == Role.SYSTEM, -self.intervention.system)
        return self._strengths[key]

    def _columns(self, call: AttentionCall, scale: float) -> Tensor:
        """Further columns of the keys, (B, 1, K, COLUMNS), which add up to log(1 + a_j) over the scale."""
        key = (call.k_BMKD.device, call.k_BMKD.shape[2], call.k_BMKD.dtype, scale)
        if key not in self._biases:
            bias_BK = (_log_weight(self._strength(call)) / scale).clamp(-LARGEST, LARGEST)
            # Of 8 bits each, so that nothing that the softmax would notice is lost in 16 bits, nor under autocast.
            high_BK = bias_BK.bfloat16().float()
            middle_BK = (bias_BK - high_BK).bfloat16().float()
            parts = torch.stack([high_BK, middle_BK, bias_BK - high_BK - middle_BK], dim=-1)
            self._biases[key] = pad(parts.to(call.k_BMKD.dtype)[:, None], (0, COLUMNS - 3))
        return self._biases[key]

    def _selected(self, call: AttentionCall) -> Tensor | None:
        """Which rows and heads are steered (B or 1, H or 1, N), or None for all."""
        num_heads, device = call.q_BHND.shape[1], call.q_BHND.device
        heads = None if self.intervention.heads is None else self.intervention.heads[call.module.layer_idx]  # type: ignore[index]
        if heads is not None and not set(heads) <= set(range(num_heads)):
            raise ValueError(
                f"heads of layer {call.module.layer_idx} are {list(heads)}, expected numbers from 0 to {num_heads - 1}."
            )
        every_head = heads is None or len(set(heads)) == num_heads
        if self.every_row and every_head:
            return None
        selected = torch.ones(1, 1, call.q_BHND.shape[2], dtype=torch.bool, device=device)
        if not self.every_row:
            selected = selected & self.rows_BN.to(device)[:, None]  # type: ignore[union-attr]
        if not every_head:
            of_head = torch.zeros(num_heads, dtype=torch.bool, device=device)
            of_head[list(heads)] = True  # type: ignore[arg-type]
            selected = selected & of_head[None, :, None]
        return selected


def _log_weight(strength: Tensor) -> Tensor:
    return strength.log1p().clamp(min=NOTHING)
