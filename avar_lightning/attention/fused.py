"""Fused attention that also gives the log-sum-exp of each row, differentiably.

A fused kernel computes the log-sum-exp of every row's logits on its way, and its backward needs it, but PyTorch hides
it and lets no gradient through it. Here PyTorch's call is overheard, and the same kernel called in its place
(`kernels`). With the log-sum-exp known, a group's mass needs the group's columns alone (`mass.attention_mass`).

Shape letters: B batch, H query heads, M key heads (H = M·R), N rows, K keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from avar_lightning.attention.kernels import Kernel, carry_gradient, kernel_of


class LogSumExps(TorchFunctionMode):
    """While active, scaled dot product attention runs as always, and the log-sum-exps of its fused calls are kept.

    Outputs and their gradients are those of `scaled_dot_product_attention`, bit for bit, as long as nobody
    differentiates a log-sum-exp. Calls that PyTorch does not give to one of the kernels run as always and tell nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Tensor | None, torch.Size, torch.Size, float | None]] = []

    def of(self, query: Tensor, key: Tensor, scale: float | None) -> Tensor | None:
        """Log-sum-exp of the only call, natural, of the scaled and masked logits.

        Args:
            query: The queries that it is expected to have had, (B, H, N, D).
            key: Its keys, perhaps with a head of their own for each query head there, (B, M, K, D).
            scale: Its scale.

        Returns:
            (B, H, N), float32 (float64 for float64 inputs); None when there was another call, several or none, or when
            it was not fused.
        """
        if len(self._calls) != 1:
            return None
        lse, queries, keys, its_scale = self._calls[0]
        if lse is None or keys[2:] != key.shape[2:] or its_scale != scale:
            return None
        batch, heads, rows, width = query.shape
        # transformers hands the query heads of one row over as rows of their key head.
        if rows == 1 and queries == (batch, key.shape[1], heads // key.shape[1], width):
            return lse.reshape(batch, heads, 1)
        return lse if queries == query.shape else None

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
            self._calls.append((None, query.shape, key.shape, scale))
            return scaled_dot_product_attention(query, key, value, attn_mask, **options)
        query, key, value, attn_mask = cast
        if attn_mask is not None:
            attn_mask = kernel.additive(attn_mask, query.dtype)
        out, lse = _FusedAttention.apply(query, key, value, attn_mask, is_causal, scale, kernel)
        # Where only values train, masses have no gradient.
        lse = lse if query.requires_grad or key.requires_grad else lse.detach()
        self._calls.append((lse, query.shape, key.shape, scale))
        return out


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments of attention as autocast makes them, where it is on."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(tensor.to(dtype) if tensor is not None and tensor.dtype in casts else tensor for tensor in tensors)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        kernel: Kernel,
    ) -> tuple[Tensor, Tensor]:
        out, lse, ctx.others = kernel.forward(q, k, v, mask, is_causal, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.is_causal, ctx.scale, ctx.kernel = is_causal, scale, kernel
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            grad, out = carry_gradient(grad, out, grad_lse)
        dq, dk, dv = ctx.kernel.backward(grad, (*inputs, ctx.is_causal, ctx.scale), out, lse, ctx.others)
        return dq, dk, None if grad_out is None else dv, None, None, None, None
