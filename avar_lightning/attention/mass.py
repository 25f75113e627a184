"""How much attention each query pays to groups of keys, exact and differentiable, without the N×N matrix.

The mass of a key group is the share of a query's softmax that falls on the group's keys. A fused kernel does
not return it, so the probabilities are computed again here, a block of query rows at a time: memory is one
block, the work is proportional to the rows that were asked for, and sums and probabilities are float32 (float64 for
float64 inputs) whatever the model's dtype. On CUDA bfloat16 is multiplied as it is, and gradients of logits are
rounded to it, as attention's own are. Backward builds each block once more from the row's normaliser
instead of keeping it. Where a kernel tells the normaliser (`fused`), only the keys of the groups are computed.

Shape letters: B batch, H query heads, M key heads (H = M·R), Q query rows, K keys, D head dimension, G key
groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from avar_lightning.attention.visibility import Visibility, is_hidden

CPU_BLOCK_BYTES = 4 * 2**20
"""Size of one block of probabilities on a CPU: about what its caches hold. A block needs two or three of these."""

BLOCK_BYTES = 128 * 2**20
"""The same on accelerators, where launching kernels for small blocks would cost more than the work."""


class Change(Protocol):
    """A change of logits, as steering makes it."""

    def __call__(self, logits_BHQK: Tensor, start: int, stop: int) -> Tensor | None:
        """Change the scaled logits of rows `start:stop` in place; return d new / d old, None for 1."""


def attention_mass(
    q_BHQD: Tensor,
    k_BMKD: Tensor,
    groups_BKG: Tensor,
    *,
    visible: Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    change: Change | None = None,
    lse_BHQ: Tensor | None = None,
) -> Tensor:
    """Attention probability that each query row gives to each group of keys.

    mass[b,h,i,g] = Σ_{j∈g} softmax_j(scale · q_i·k_j), over the keys that row i sees. Attention dropout does
    not enter. Differentiable once, in `q_BHQD`, `k_BMKD` and `lse_BHQ`.

    Args:
        q_BHQD: Queries after rotary embedding, any float dtype; only the rows whose masses are wanted.
        k_BMKD: Keys; M divides H (grouped-query attention), keys are not repeated.
        groups_BKG: Bool, True where key j belongs to group g. Groups may overlap.
        visible: Which keys each row sees. A row that sees none has mass 0.
        scale: Factor of the logits, D^-0.5 by default.
        softcap: Logits become softcap · tanh(logits / softcap), as in Gemma 2.
        change: A further change of the logits, before the mask.
        lse_BHQ: Log-sum-exp of each row's logits (capped and changed) over all keys that it sees, if it is known
            already. Then keys, groups and visibility need only be those of the keys that are in a group.

    Returns:
        (B, H, Q, G), float32 (float64 for float64 queries), in [0, 1]; with a given log-sum-exp as exactly as that is,
        which a kernel knows to 1e-6 in float32 and to 1e-4 in bfloat16.

    Raises:
        ValueError: The shapes do not fit together.

    >>> from avar_lightning.attention.visibility import Causal, Selection
    >>> q = k = torch.zeros(1, 1, 4, 8)  # all logits equal: every row looks at its past evenly
    >>> first_key = torch.tensor([[[True], [False], [False], [False]]])
    >>> causal = Causal(Selection(torch.ones(1, 4, dtype=torch.bool)))
    >>> attention_mass(q, k, first_key, visible=causal)[0, 0, :, 0]
    tensor([1.0000, 0.5000, 0.3333, 0.2500])
    """
    batch, num_heads, _, head_dim = q_BHQD.shape
    _, num_key_heads, num_keys, _ = k_BMKD.shape
    if num_heads % num_key_heads or k_BMKD.shape[0] != batch or k_BMKD.shape[3] != head_dim:
        raise ValueError(f"queries {tuple(q_BHQD.shape)} and keys {tuple(k_BMKD.shape)} do not belong together.")
    if groups_BKG.shape[:2] != (batch, num_keys):
        raise ValueError(f"groups_BKG has shape {tuple(groups_BKG.shape)}, expected ({batch}, {num_keys}, groups).")
    scale = head_dim**-0.5 if scale is None else scale
    mass: Tensor = _AttentionMass.apply(q_BHQD, k_BMKD, groups_BKG, lse_BHQ, visible, scale, softcap, change)
    return mass


@torch.no_grad()
def attention_received(
    q_BHQD: Tensor,
    k_BMKD: Tensor,
    weights_BQ: Tensor,
    *,
    visible: Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    change: Change | None = None,
    lse_BHQ: Tensor | None = None,
) -> Tensor:
    """Weighted sum over query rows of the probability that each key receives; no gradient.

    With weights 1/|Q| on the chosen rows it is the mean attention from them.

    Args:
        q_BHQD: Queries, as in `attention_mass`.
        k_BMKD: Keys.
        weights_BQ: Weight of every row, 0 for rows that are padding.
        visible: Which keys each row sees.
        scale: Factor of the logits, D^-0.5 by default.
        softcap: As in `attention_mass`.
        change: As in `attention_mass`.
        lse_BHQ: As in `attention_mass`, for all keys.

    Returns:
        (B, H, K), float32 (float64 for float64 queries).
    """
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    received_BHK = q_BHQD.new_zeros(*q_BHQD.shape[:2], k_BMKD.shape[2], dtype=_compute_dtype(q_BHQD))
    lse_BHQ = None if lse_BHQ is None else _usable(lse_BHQ, received_BHK.dtype)
    with torch.autocast(q_BHQD.device.type, enabled=False):
        for block in _blocks(q_BHQD, k_BMKD, visible, scale, softcap, change):
            logits_BHQK, _ = block.logits()
            if lse_BHQ is None:
                _softmax_(logits_BHQK)
            else:
                logits_BHQK.sub_(lse_BHQ[:, :, block.start : block.stop, None]).exp_()
            weights_B1Q = weights_BQ[:, None, None, block.start : block.stop].to(received_BHK.dtype)
            received_BHK[:, :, : block.num_keys] += (weights_B1Q @ logits_BHQK).squeeze(2)
    return received_BHK


def attention_of_rows(
    q_BHQD: Tensor,
    k_BMKD: Tensor,
    v_BMKD: Tensor,
    *,
    visible: Visibility,
    change: Change | None,
    scale: float | None = None,
    with_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention itself, for changes of the logits that no kernel makes; without gradients memory is one block of rows.

    Args:
        q_BHQD: Queries, as in `attention_mass`.
        k_BMKD: Keys.
        v_BMKD: Values.
        visible: Which keys each row sees. A row that sees none gives 0.
        change: Change of the logits.
        scale: Factor of the logits, D^-0.5 by default.
        with_probabilities: Also return the probabilities, which are N×N.

    Returns:
        Output (B, H, Q, D of the values) and probabilities (B, H, Q, K) or None, in the dtype of the queries.
    """
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    outputs, everything = [], []
    with torch.autocast(q_BHQD.device.type, enabled=False):
        values = v_BMKD.to(_compute_dtype(q_BHQD))
        for block in _blocks(q_BHQD, k_BMKD, visible, scale, None, change):
            logits_BHQK, _ = block.logits()
            hidden = logits_BHQK.isneginf()
            # The lowest number and not -inf, so that a row without keys has a gradient, of zero.
            lowest = torch.finfo(logits_BHQK.dtype).min
            probs_BHQK = logits_BHQK.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)
            outputs.append(block.apply(probs_BHQK, values).to(q_BHQD.dtype))
            if with_probabilities:
                everything.append(pad(probs_BHQK, (0, k_BMKD.shape[2] - block.num_keys)).to(q_BHQD.dtype))
    return torch.cat(outputs, dim=2), torch.cat(everything, dim=2) if with_probabilities else None


class _AttentionMass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHQD: Tensor,
        k_BMKD: Tensor,
        groups_BKG: Tensor,
        lse_BHQ: Tensor | None,
        visible: Visibility,
        scale: float,
        softcap: float | None,
        change: Change | None,
    ) -> Tensor:
        dtype = _compute_dtype(q_BHQD)
        mass_BHQG = q_BHQD.new_empty(*q_BHQD.shape[:3], groups_BKG.shape[2], dtype=dtype)
        ctx.lse_is_given = lse_BHQ is not None
        lse_BHQ = q_BHQD.new_empty(q_BHQD.shape[:3], dtype=dtype) if lse_BHQ is None else _usable(lse_BHQ, dtype)
        indicator_B1KG = groups_BKG[:, None].to(dtype)
        with torch.autocast(q_BHQD.device.type, enabled=False):
            for block in _blocks(q_BHQD, k_BMKD, visible, scale, softcap, change):
                logits_BHQK, _ = block.logits()
                rows = slice(block.start, block.stop)
                if ctx.lse_is_given:
                    logits_BHQK.sub_(lse_BHQ[:, :, rows, None]).exp_()
                else:
                    lse_BHQ[:, :, rows] = _softmax_(logits_BHQK)
                mass_BHQG[:, :, rows] = logits_BHQK @ indicator_B1KG[:, :, : block.num_keys]
        ctx.save_for_backward(q_BHQD, k_BMKD, groups_BKG, lse_BHQ, mass_BHQG)
        ctx.visible, ctx.scale, ctx.softcap, ctx.change = visible, scale, softcap, change
        return mass_BHQG

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQG: Tensor) -> tuple[Tensor | None, ...]:
        q_BHQD, k_BMKD, groups_BKG, lse_BHQ, mass_BHQG = ctx.saved_tensors
        dtype = _compute_dtype(q_BHQD)
        dq_BHQD = torch.empty_like(q_BHQD, dtype=dtype, memory_format=torch.contiguous_format)
        dk_BMKD = torch.zeros_like(k_BMKD, dtype=dtype, memory_format=torch.contiguous_format)
        indicator_B1GK = groups_BKG[:, None].mT.to(dtype)
        # d logits = P ∘ (d mass · indicatorᵀ − Σ_g d mass_g · mass_g), the softmax rule on a sum of columns; the second
        # term is the part of the log-sum-exp.
        shift_BHQ1 = (grad_BHQG * mass_BHQG).sum(-1, keepdim=True)
        with torch.autocast(q_BHQD.device.type, enabled=False):
            for block in _blocks(q_BHQD, k_BMKD, ctx.visible, ctx.scale, ctx.softcap, ctx.change):
                rows = slice(block.start, block.stop)
                probs_BHQK, slope_BHQK = block.logits(with_slope=True)
                probs_BHQK.sub_(lse_BHQ[:, :, rows, None]).exp_()
                dlogits_BHQK = grad_BHQG[:, :, rows] @ indicator_B1GK[..., : block.num_keys]
                if not ctx.lse_is_given:
                    dlogits_BHQK.sub_(shift_BHQ1[:, :, rows])
                dlogits_BHQK.mul_(probs_BHQK)
                if slope_BHQK is not None:
                    dlogits_BHQK.mul_(slope_BHQK)
                dq_BHQD[:, :, rows] = block.grad_queries(dlogits_BHQK)
                dk_BMKD[:, :, : block.num_keys] += block.grad_keys(dlogits_BHQK)
        dlse_BHQ = -shift_BHQ1.squeeze(-1) if ctx.lse_is_given else None
        return dq_BHQD.to(q_BHQD.dtype), dk_BMKD.to(k_BMKD.dtype), None, dlse_BHQ, None, None, None, None


class _Block:
    """Query rows `start:stop` against the keys that they can see at all.

    The heads that share a key head are stacked into rows, (B, M, R·Q, D), so that keys are never repeated.
    """

    def __init__(
        self,
        start: int,
        q_BHQD: Tensor,
        k_BMKD: Tensor,
        visible: Visibility,
        scale: float,
        softcap: float | None,
        change: Change | None,
    ) -> None:
        batch, num_heads, num_rows, head_dim = q_BHQD.shape
        self.start, self.stop = start, start + num_rows
        self.num_keys = min(visible.limit(self.start, self.stop), k_BMKD.shape[2])
        self.shape = (batch, num_heads, num_rows)
        self.visible, self.scale, self.softcap, self.change = visible, scale, softcap, change
        self.k_BMKD = k_BMKD[:, :, : self.num_keys]
        self.stacked = (batch, k_BMKD.shape[1], num_heads // k_BMKD.shape[1] * num_rows)
        # Scaled at once, but in bfloat16, where that would round.
        now, self.scale_of_products = (1.0, scale) if k_BMKD.dtype == torch.bfloat16 else (scale, 1.0)
        self.q_BMQD = (q_BHQD.to(k_BMKD.dtype) * now).reshape(*self.stacked, head_dim)

    def logits(self, *, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """Masked logits (B, H, Q, K) and their derivative by the plain ones, None for 1 or unasked."""
        logits_BHQK = _product(self.q_BMQD, self.k_BMKD.mT, self.scale_of_products).view(*self.shape, self.num_keys)
        slope_BHQK = None
        if self.softcap is not None:
            logits_BHQK.div_(self.softcap).tanh_()
            slope_BHQK = 1 - logits_BHQK.square() if with_slope else None
            logits_BHQK.mul_(self.softcap)
        if self.change is not None:
            changed_BHQK = self.change(logits_BHQK, self.start, self.stop)
            if changed_BHQK is not None:
                slope_BHQK = changed_BHQK if slope_BHQK is None else slope_BHQK.mul_(changed_BHQK)
        mask = self.visible(self.start, self.stop, self.num_keys)
        if mask is None:
            return logits_BHQK, slope_BHQK
        if mask.dtype == torch.bool:
            return logits_BHQK.masked_fill_(~mask, -math.inf), slope_BHQK
        return logits_BHQK.add_(mask).masked_fill_(is_hidden(mask), -math.inf), slope_BHQK

    def apply(self, probs_BHQK: Tensor, v_BMKD: Tensor) -> Tensor:
        """Values weighted by probabilities, (B, H, Q, D of the values)."""
        stacked_BMQK = probs_BHQK.reshape(*self.stacked, self.num_keys)
        return (stacked_BMQK @ v_BMKD[:, :, : self.num_keys]).view(*self.shape, -1)

    def grad_queries(self, dlogits_BHQK: Tensor) -> Tensor:
        """Gradient of the block's queries (B, H, Q, D)."""
        dlogits_BMQK = dlogits_BHQK.view(*self.stacked, self.num_keys)
        return _product(dlogits_BMQK, self.k_BMKD, self.scale).view(*self.shape, -1)

    def grad_keys(self, dlogits_BHQK: Tensor) -> Tensor:
        """The block's part of the gradient of its keys (B, M, num_keys, D)."""
        return _product(dlogits_BHQK.view(*self.stacked, self.num_keys).mT, self.q_BMQD, self.scale_of_products)


def _blocks(
    q_BHQD: Tensor,
    k_BMKD: Tensor,
    visible: Visibility,
    scale: float,
    softcap: float | None,
    change: Change | None,
) -> Iterator[_Block]:
    batch, num_heads, num_rows, _ = q_BHQD.shape
    k_BMKD = k_BMKD.to(_factor_dtype(q_BHQD, k_BMKD))
    row_bytes = batch * num_heads * k_BMKD.shape[2] * _compute_dtype(q_BHQD).itemsize
    block_bytes = CPU_BLOCK_BYTES if q_BHQD.device.type == "cpu" else BLOCK_BYTES
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield _Block(start, q_BHQD[:, :, start : start + step], k_BMKD, visible, scale, softcap, change)


def _usable(lse_BHQ: Tensor, dtype: torch.dtype) -> Tensor:
    """A row that sees nothing has none, and no logit either."""
    return lse_BHQ.to(dtype).masked_fill(~lse_BHQ.isfinite(), 0.0)


def _softmax_(logits_BHQK: Tensor) -> Tensor:
    """Turn logits into probabilities in place; return their log-sum-exp (B, H, Q), 0 where all are hidden."""
    if logits_BHQK.shape[-1] == 0:
        return logits_BHQK.new_zeros(logits_BHQK.shape[:-1])
    top = logits_BHQK.amax(-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)
    total = logits_BHQK.sub_(top).exp_().sum(-1, keepdim=True)
    total.masked_fill_(total == 0.0, 1.0)
    logits_BHQK.div_(total)
    return (top + total.log()).squeeze(-1)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`factor` · `left` @ `right`, summed in float32 (float64)."""
    needs_graph = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if right.dtype == torch.bfloat16 and needs_graph:  # which PyTorch has no derivative for
        product = left.float() @ right.float()
    elif right.dtype == torch.bfloat16:
        flat = left.to(right.dtype).flatten(0, -3), right.flatten(0, -3)
        product = torch.bmm(*flat, out_dtype=torch.float32).view(*left.shape[:-1], right.shape[-1])
    else:
        product = left @ right
    return product if factor == 1.0 else product.mul_(factor)


def _factor_dtype(q_BHQD: Tensor, k_BMKD: Tensor) -> torch.dtype:
    """Of what is multiplied: on CUDA bfloat16 as it is, whose products are exact there, and as fast as attention's."""
    on_tensor_cores = q_BHQD.is_cuda and q_BHQD.dtype == k_BMKD.dtype == torch.bfloat16
    return torch.bfloat16 if on_tensor_cores else _compute_dtype(q_BHQD)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
