"""Fused attention that also gives the log-sum-exp of each row, or the masses themselves, differentiably.

A fused kernel computes the log-sum-exp of every row's logits on its way, and its backward needs it, but PyTorch hides
it and lets no gradient through it. Here PyTorch's call is overheard, and the same kernel called in its place
(`kernels`). With the log-sum-exp known, a group's mass needs the group's columns alone (`mass.attention_mass`).

Where those are many, a wider head is cheaper: masses are what comes out when a value says which groups its key is in.
Only float32 on a CPU has it, since elsewhere kernels round probabilities to 16 bits, or take certain widths alone.

Shape letters: B batch, H query heads, M key heads (H = M·R), N rows, K keys, D head dimension, G key groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from avar_lightning.attention.kernels import CPUFlash, Kernel, carry_gradient, kernel_of
from avar_lightning.attention.visibility import is_hidden

WIDER_BY = 8
"""Whole multiples that heads grow by: as quick as the least, and aligned."""


class Told(NamedTuple):
    """What a kernel told of the rows of its call.

    Attributes:
        lse_BHN: Log-sum-exps, natural, of the scaled and masked logits, float32 (float64 for float64 inputs).
        mass_BHNG: Masses of the groups that were asked for, the same; None where they are not known.
    """

    lse_BHN: Tensor
    mass_BHNG: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Told:
        """The same with every tensor changed."""
        return Told(change(self.lse_BHN), None if self.mass_BHNG is None else change(self.mass_BHNG))

    def split(self, sizes: Sequence[int]) -> list[Told]:
        """What concerns each of several who asked together, some for no groups."""
        if self.mass_BHNG is None:
            return [self] * len(sizes)
        masses = self.mass_BHNG.split(list(sizes), dim=-1)
        return [Told(self.lse_BHN, mass if mass.shape[-1] else None) for mass in masses]


class Overheard:
    """Calls of attention, and what their kernels told."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Told | None, torch.Size, torch.Size, float | None]] = []

    def keep(self, told: Told | None, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Keep what a call told; where queries and keys do not train, neither has it a gradient."""
        if told is not None and not (query.requires_grad or key.requires_grad):
            told = told.map(Tensor.detach)
        self._calls.append((told, query.shape, key.shape, scale))

    def of(self, query: Tensor, key: Tensor, scale: float | None) -> Told | None:
        """What the only call told.

        Args:
            query: The queries that it is expected to have had, (B, H, N, D).
            key: Its keys, perhaps with a head of their own for each query head there, (B, M, K, D).
            scale: Its scale.

        Returns:
            None when there was another call, several or none, or when it was not fused.
        """
        if len(self._calls) != 1:
            return None
        told, queries, keys, its_scale = self._calls[0]
        if told is None or keys[2:] != key.shape[2:] or its_scale != scale:
            return None
        batch, heads, rows, width = query.shape
        # transformers hands the query heads of one row over as rows of their key head.
        if rows == 1 and queries == (batch, key.shape[1], heads // key.shape[1], width):
            return told.map(lambda each: each.reshape(batch, heads, 1, *each.shape[3:]))
        return told if queries == query.shape else None


class FusedCalls(Overheard, TorchFunctionMode):
    """While active, scaled dot product attention runs as always, and what its fused calls tell is kept.

    Without groups outputs and their gradients are those of `scaled_dot_product_attention`, bit for bit, as long as
    nobody differentiates a log-sum-exp. Calls that PyTorch does not give to one of the kernels run as always and tell
    nothing.

    Args:
        groups_BKG: Groups whose masses are wanted from a wider head, where that is possible; outputs are then equal up
            to rounding.
    """

    def __init__(self, groups_BKG: Tensor | None = None) -> None:
        super().__init__()
        self._groups_BKG = groups_BKG

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Of everything that is called, attention alone is looked at."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        cast = as_autocast(query, key, value, attn_mask)
        kernel = kernel_of(*cast, **options)
        if kernel is None:
            self.keep(None, query, key, scale)
            return scaled_dot_product_attention(query, key, value, attn_mask, **options)
        query, key, value, attn_mask = cast
        mask = None if attn_mask is None else kernel.additive(attn_mask, query.dtype)
        groups = self._groups_BKG
        if groups is not None and not _can_be_wider(kernel, query, key, value, groups):
            groups = None
        out, lse, mass = _FusedAttention.apply(query, key, value, mask, groups, is_causal, scale, kernel)
        if mass is not None and attn_mask is not None and attn_mask.dtype != torch.bool:
            # A kernel lets a row that sees nothing look everywhere, where its mask has other numbers than -inf.
            mass = mass.masked_fill(is_hidden(attn_mask).all(-1, keepdim=True), 0.0)
        self.keep(Told(lse, mass), query, key, scale)
        return out


def _can_be_wider(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, groups_BKG: Tensor) -> bool:
    is_exact = isinstance(kernel, CPUFlash) and query.dtype in (torch.float32, torch.float64)
    is_their_call = groups_BKG.shape[:2] == (key.shape[0], key.shape[2]) and groups_BKG.device == key.device
    return is_exact and is_their_call and value.shape[-1] == query.shape[-1]


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments of attention as autocast makes them, where it is on."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(tensor.to(dtype) if tensor is not None and tensor.dtype in casts else tensor for tensor in tensors)


class _FusedAttention(torch.autograd.Function):
    """Output, log-sum-exp (B, H, N), and masses (B, H, N, G) of the groups, if there are any.

    Masses are what is attended to of further values, which say in which groups their keys are. What is kept for the
    backward is as wide as the heads were, and the output lies in memory as SDPA's does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        groups_BKG: Tensor | None,
        is_causal: bool,
        scale: float | None,
        kernel: Kernel,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        width = q.shape[-1]
        if groups_BKG is not None and scale is None:
            scale = width**-0.5
        out, lse, others = kernel.forward(*_widened(q, k, v, groups_BKG), mask, is_causal, scale)
        mass = None
        if groups_BKG is not None:
            mass = out[..., width : width + groups_BKG.shape[-1]].contiguous()
            out = out[..., :width].transpose(1, 2).contiguous().transpose(1, 2)
        tensors = (x if isinstance(x, Tensor) else None for x in others)
        ctx.save_for_backward(q, k, v, mask, groups_BKG, out, lse, mass, *tensors)
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in others]
        ctx.is_causal, ctx.scale, ctx.kernel = is_causal, scale, kernel
        ctx.set_materialize_grads(False)
        return out, lse, mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Once: checkpointing gives them no second time.
        q, k, v, mask, groups_BKG, out, lse, mass, *tensors = ctx.saved_tensors
        others = tuple(y if x is None else x for x, y in zip(tensors, ctx.numbers, strict=True))
        width = q.shape[-1]
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        if groups_BKG is not None:
            grad = _beside(grad, torch.zeros_like(mass) if grad_mass is None else grad_mass)
            out = _beside(out, mass)
        if grad_lse is not None:
            grad, out = carry_gradient(grad, out, grad_lse)
        inputs = (*_widened(q, k, v, groups_BKG), mask, ctx.is_causal, ctx.scale)
        dq, dk, dv = ctx.kernel.backward(grad, inputs, out, lse, others)
        if groups_BKG is not None:
            dq, dk, dv = (each[..., :width] for each in (dq, dk, dv))
        return dq, dk, None if grad_out is None else dv, None, None, None, None, None


def _widened(q: Tensor, k: Tensor, v: Tensor, groups_BKG: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """With groups queries and keys with zeros, values with which groups their keys are in; else as they are."""
    if groups_BKG is None:
        return q, k, v
    more = _more(groups_BKG.shape[-1])
    indicator_BMKG = groups_BKG[:, None].to(v.dtype).expand(-1, v.shape[1], -1, -1)
    return pad(q, (0, more)), pad(k, (0, more)), _beside(v, indicator_BMKG)


def _beside(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, pad(right, (0, _more(right.shape[-1]) - right.shape[-1]))], dim=-1)


def _more(num_groups: int) -> int:
    return -(-num_groups // WIDER_BY) * WIDER_BY
