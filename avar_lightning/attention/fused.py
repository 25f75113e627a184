"""Fused attention that also gives the log-sum-exp of each row, differentiably.

A fused kernel computes the log-sum-exp of every row's logits on its way, and its backward needs it, but PyTorch lets no
gradient through it. A flash backward reads the output O in one place only: δ = Σ_d dO ∘ O, one number a row, in
dS = P ∘ (dP − δ). A gradient dlse of the log-sum-exp adds P ∘ dlse. So the same kernel, unchanged, returns both when it
is handed, in place of O, anything whose δ is smaller by dlse.

With the log-sum-exp known, the mass of a group of keys needs the group's columns alone (`mass.attention_mass`).

Shape letters: B batch, H query heads, M key heads (H = M·R), N rows, K keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Where numbers as small as `TINY` and as large as its inverse exist, which float16 has not."""
TINY = 2.0**-40


class LogSumExps(TorchFunctionMode):
    """While active, scaled dot product attention runs as always, and the log-sum-exps of its fused calls are kept.

    Outputs and their gradients are those of `scaled_dot_product_attention`, bit for bit, as long as nobody
    differentiates a log-sum-exp. Calls that PyTorch would not give to a fused kernel that can do it (with dropout, on
    other devices, …) run as always and give None.

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
        if not _is_fused(*cast, **options):
            self._calls.append((None, query.shape, key.shape, scale))
            return scaled_dot_product_attention(query, key, value, attn_mask, **options)
        query, key, value, attn_mask = cast
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        out, lse = _FusedAttention.apply(query, key, value, attn_mask, is_causal, scale)
        # Where only values train, masses have no gradient.
        lse = lse if query.requires_grad or key.requires_grad else lse.detach()
        self._calls.append((lse, query.shape, key.shape, scale))
        return out


def _is_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> bool:
    if query.device.type != "cpu" or query.dtype not in DTYPES or options["dropout_p"]:
        return False
    if mask is not None and (
        mask.requires_grad or mask.dim() not in (2, 4) or mask.dtype not in (torch.bool, query.dtype)
    ):
        return False
    dropout, is_causal = options.pop("dropout_p"), options.pop("is_causal")
    choice = torch._fused_sdp_choice(query, key, value, mask, dropout, is_causal, **options)
    return choice == SDPBackend.FLASH_ATTENTION.value


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The arguments of attention on a CPU as autocast makes them, where it is on."""
    if any(tensor.device.type != "cpu" for tensor in tensors if tensor is not None) or not torch.is_autocast_enabled(
        "cpu"
    ):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    casts = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(tensor.to(dtype) if tensor is not None and tensor.dtype in casts else tensor for tensor in tensors)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is not None:
            grad, out = carry_gradient(grad, out, grad_lse)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale
        )
        return dq, dk, None if grad_out is None else dv, None, None, None


def carry_gradient(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What a flash backward is called with so that it also returns the gradient of the log-sum-exp.

    Args:
        grad_out: Gradient of the output, (…, N, D).
        out: The output, (…, N, D).
        grad_lse: Gradient of the log-sum-exp, (…, N).

    Returns:
        Gradient and output to call it with: Σ_d of their product is smaller by `grad_lse`. Rows without gradient of the
        log-sum-exp stay as they are, bit for bit. In the others the output is 0 but where the gradient is largest: one
        component carries the number in float32, three carry it whole in bfloat16. Where the gradient has none that is
        large enough, it gets one of `TINY` times the number.
    """
    dtype = grad_lse.dtype
    wanted = grad_lse.unsqueeze(-1) != 0
    rest = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True).sub_(grad_lse.unsqueeze(-1))
    size, carrier = grad_out.abs(), out.masked_fill(wanted, 0.0)
    for _ in range(1 if out.element_size() >= 4 else 3):
        largest, index = size.max(-1, keepdim=True)
        least = (rest.abs() * TINY).clamp_(min=torch.finfo(dtype).tiny).to(out.dtype)
        too_small = wanted & (largest < least)
        component = torch.where(too_small, least, grad_out.gather(-1, index))
        if too_small.any():
            grad_out = grad_out.scatter(-1, index, component)
        value = (rest / component.to(dtype)).to(out.dtype)
        carrier.scatter_(-1, index, torch.where(wanted, value, carrier.gather(-1, index)))
        rest -= value.to(dtype) * component.to(dtype)
        size.scatter_(-1, index, -1.0)  # the next one is another
    return grad_out, carrier
