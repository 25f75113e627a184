"""The fused kernels that tell the log-sum-exp of each row: how they are called, and how its gradient rides on theirs.

A flash backward reads the output O in one place only: δ = Σ_d dO ∘ O, one number a row, in dS = P ∘ (dP − δ). A
gradient dlse of the log-sum-exp adds P ∘ dlse. So the same kernel, unchanged, returns both when it is handed, in place
of O, anything whose δ is smaller by dlse. Nobody promises this of a kernel, so it is tried once where it is first used.

Shape letters: B batch, H query heads, M key heads (H = M·R), N rows, K keys, D head dimension.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import pad

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Where numbers as small as `TINY` and as large as its inverse exist, which float16 has not."""
TINY = 2.0**-40
NORMS = 1e-15, 1e15
"""Of a row's gradient, from smallest to largest, whose square is a number in float32."""

aten = torch.ops.aten


class Kernel(ABC):
    """A fused attention, whose calls PyTorch itself makes in the same way."""

    hidden = -math.inf
    """What PyTorch adds to the logits of keys that a bool mask hides."""

    def additive(self, mask_BHNK: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask as the kernel takes it: of the queries' dtype, to be added to the logits."""
        if mask_BHNK.dtype != torch.bool:
            return mask_BHNK
        return torch.zeros_like(mask_BHNK, dtype=dtype).masked_fill_(~mask_BHNK, self.hidden)

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """Output (B, H, N, D), log-sum-exp (B, H, N), and what else its backward wants."""

    @abstractmethod
    def backward(
        self, grad_out: Tensor, inputs: tuple[Any, ...], out: Tensor, lse: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values; `inputs` are those of `forward`."""


class CPUFlash(Kernel):
    """`scaled_dot_product_attention` on a CPU, with any mask, and with fewer key heads than query heads."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out, lse, ()

    def backward(
        self, grad_out: Tensor, inputs: tuple[Any, ...], out: Tensor, lse: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        q, k, v, mask, is_causal, scale = inputs
        grads: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return grads


class CUDAFlash(Kernel):
    """`scaled_dot_product_attention` on CUDA where it takes FlashAttention-2: bfloat16, no mask but the causal one."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        out, lse, *others, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return out, lse, tuple(others)

    def backward(
        self, grad_out: Tensor, inputs: tuple[Any, ...], out: Tensor, lse: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        q, k, v, _, is_causal, scale = inputs
        *lengths, seed, offset = others
        grads: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, *lengths, 0.0, is_causal, seed, offset, scale=scale
        )
        return grads


class CUDAEfficient(Kernel):
    """`scaled_dot_product_attention` on CUDA where it takes the memory-efficient kernel: masks, and float32."""

    ALIGNMENT = 8
    """Numbers that rows of a mask must start at whole multiples of."""

    def additive(self, mask_BHNK: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Kernel`; the first columns of a wider tensor where rows would not be aligned."""
        mask_BHNK = super().additive(mask_BHNK, dtype)
        *strides, last = mask_BHNK.stride()
        if last == 1 and not any(stride % self.ALIGNMENT for stride in strides):
            return mask_BHNK
        num_keys = mask_BHNK.shape[-1]
        return pad(mask_BHNK, (0, self.ALIGNMENT - num_keys % self.ALIGNMENT))[..., :num_keys]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        out, padded_lse, *random = aten._scaled_dot_product_efficient_attention(
            q, k, v, self._for_each_head(mask, q, k), True, 0.0, is_causal, scale=scale
        )
        return out, padded_lse[:, :, : q.shape[2]].clone(), (padded_lse, *random)

    def backward(
        self, grad_out: Tensor, inputs: tuple[Any, ...], out: Tensor, lse: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        q, k, v, mask, is_causal, scale = inputs
        padded_lse, *random = others
        wanted = [True, True, True, False]
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            *(grad_out, q, k, v, self._for_each_head(mask, q, k), out, padded_lse, *random, 0.0, wanted, is_causal),
            scale=scale,
        )
        return dq, dk, dv

    @staticmethod
    def _for_each_head(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        return mask if mask is None else mask.expand(*q.shape[:3], k.shape[2])


class CuDNN(Kernel):
    """`scaled_dot_product_attention` on CUDA where it takes cuDNN's: 16 bits on Hopper and Blackwell, with any mask."""

    hidden = -65504.0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        out, lse, *others, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, mask, True, 0.0, is_causal, False, scale=scale
        )
        return out, lse.squeeze(-1), tuple(others)

    def backward(
        self, grad_out: Tensor, inputs: tuple[Any, ...], out: Tensor, lse: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        q, k, v, mask, is_causal, scale = inputs
        *lengths, seed, offset = others
        grads: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_cudnn_attention_backward(
            *(grad_out, q, k, v, out, lse.unsqueeze(-1), seed, offset, mask, *lengths, 0.0, is_causal), scale=scale
        )
        return grads


KERNELS: dict[tuple[str, int], Kernel] = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): CPUFlash(),
    ("cuda", SDPBackend.FLASH_ATTENTION.value): CUDAFlash(),
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): CUDAEfficient(),
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): CuDNN(),
}
"""By device and PyTorch's number of the backend."""


def kernel_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Kernel | None:
    """The kernel that PyTorch takes for a call of `scaled_dot_product_attention`, where it is one of these."""
    device = query.device.type
    if device not in ("cpu", "cuda") or query.dtype not in DTYPES or dropout_p:
        return None
    if mask is not None and (
        mask.requires_grad or mask.dim() not in (2, 4) or mask.dtype not in (torch.bool, query.dtype)
    ):
        return None
    choice = torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if device == "cuda" and query.shape[-1] % 8:  # PyTorch pads such heads before it calls a kernel
        return None
    kernel = KERNELS.get((device, choice))
    if kernel is None or not carries(kernel, query.device, query.dtype, query.shape[-1]):
        return None
    return kernel


@cache
def carries(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel of this installation returns the gradient of the log-sum-exp too; warns if not."""
    try:
        errors = _errors_of(kernel, device, dtype, width)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        found = f"it says: {error}"
    else:
        if max(errors) < (1e-4 if device.type == "cpu" and dtype != torch.bfloat16 else 2e-2):
            return True
        found = f"errors {', '.join(f'{error:.1e}' for error in errors)}"
    warnings.warn(
        f"The fused attention of torch {torch.__version__} on {device} in {dtype} does not carry the gradient of its "
        f"log-sum-exp ({found}), so attention is measured beside it in the slower way, which is as exact; "
        "please report this.",
        stacklevel=2,
    )
    return False


@torch.no_grad()
def _errors_of(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> list[float]:
    """Relative errors of a small case's log-sum-exp, and of the gradients that it and the output have together."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.autocast(device.type, enabled=False):
        q, k, v, grad = (torch.randn(1, 2, 48, width, device=device, generator=generator).to(dtype) for _ in range(4))
        grad_lse = torch.randn(1, 2, 48, device=device, generator=generator)
        inputs = (q, k, v, None, True, None)
        out, lse, others = kernel.forward(*inputs)
        grad_out, carrier = carry_gradient(grad, out, grad_lse.to(lse.dtype))
        ours = kernel.backward(grad_out, inputs, carrier, lse, others)
        q, k, v, grad, grad_lse = (each.double() for each in (q, k, v, grad, grad_lse))
        hidden = torch.ones(48, 48, dtype=torch.bool, device=device).triu(1)
        logits = (q @ k.mT * width**-0.5).masked_fill(hidden, -torch.inf)
        probs = logits.softmax(-1)
        delta = (grad * (probs @ v)).sum(-1, keepdim=True)
        grad_logits = probs * (grad @ v.mT - delta + grad_lse[..., None]) * width**-0.5
        exact = grad_logits @ k, grad_logits.mT @ q, probs.mT @ grad
        pairs = zip((lse, *ours), (logits.logsumexp(-1), *exact), strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def carry_gradient(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What a flash backward is called with so that it also returns the gradient of the log-sum-exp.

    Args:
        grad_out: Gradient of the output, (…, N, D).
        out: The output, (…, N, D).
        grad_lse: Gradient of the log-sum-exp, (…, N).

    Returns:
        Gradient and output to call it with: Σ_d of their product is smaller by `grad_lse`. Rows without gradient of the
        log-sum-exp stay as they are, bit for bit. In float32 on a CPU the output gives way along the gradient, if every
        row has one whose square is a number. Otherwise it is 0 but where the gradient is largest: one component carries
        the number in float32, three carry it whole in bfloat16. Where the gradient has none that is large enough, it
        gets one of `TINY` times the number.
    """
    dtype = grad_lse.dtype
    if out.element_size() >= 4 and not out.is_cuda:  # asking a GPU would wait for it
        shift, norm = grad_lse.unsqueeze(-1), torch.linalg.vector_norm(grad_out, dim=-1, keepdim=True)
        inside = norm.clamp(*NORMS)
        along = shift / inside.square()
        if (((norm == inside) | (shift == 0)) & along.isfinite()).all():
            return grad_out, torch.addcmul(out, grad_out, along, value=-1)
    wanted = grad_lse.unsqueeze(-1) != 0
    rest = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True).sub_(grad_lse.unsqueeze(-1))
    size, carrier = grad_out.abs(), out.masked_fill(wanted, 0.0)
    for _ in range(1 if out.element_size() >= 4 else 3):
        largest, index = size.max(-1, keepdim=True)
        least = (rest.abs() * TINY).clamp_(min=torch.finfo(dtype).tiny).to(out.dtype)
        too_small = wanted & (largest < least)
        component = torch.where(too_small, least, grad_out.gather(-1, index))
        if grad_out.is_cuda or too_small.any():
            grad_out = grad_out.scatter(-1, index, component)
        value = (rest / component.to(dtype)).to(out.dtype)
        carrier.scatter_(-1, index, torch.where(wanted, value, carrier.gather(-1, index)))
        rest -= value.to(dtype) * component.to(dtype)
        size.scatter_(-1, index, -1.0)  # the next one is another
    return grad_out, carrier
