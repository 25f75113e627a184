"""Which keys each selected query row sees: every mask that transformers hands to attention, in one shape.

Shape letters: B batch, H heads, N rows of the forward, Q selected rows, K keys, C selected keys, S selected of either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from avar_lightning.attention.registry import AttentionCall


class Visibility(Protocol):
    """Which keys the selected rows see, asked for a block of rows at a time so that no N×N mask is built."""

    def limit(self, start: int, stop: int) -> int:
        """Number of leading keys outside of which rows `start:stop` see nothing."""

    def __call__(self, start: int, stop: int, num_keys: int) -> Tensor | None:
        """Mask of rows `start:stop` on the first `num_keys` keys, or None when they see them all.

        Shape (B or 1, H or 1, stop - start, num_keys); bool, True for visible, or a float bias that is added
        to the logits and hides a key where it is as low as its dtype goes.
        """

    def of_keys(self, start: int, stop: int, index_BC: Tensor) -> Tensor | None:
        """The same on some keys of each sample, (B or 1, H or 1, stop - start, C)."""


class Selection:
    """The query rows of a forward that are wanted, or keys, gathered per sample and padded to the largest count.

    Args:
        mask_BN: Bool, True for a wanted one.
    """

    def __init__(self, mask_BN: Tensor) -> None:
        counts = mask_BN.sum(1)
        self.shape = mask_BN.shape
        self.count = int(counts.max()) if mask_BN.numel() else 0
        order = (~mask_BN).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.count]
        slots = torch.arange(self.count, device=mask_BN.device)
        self.valid_BS = slots < counts[:, None]
        # Spare slots repeat the sample's last wanted one, so that the positions never decrease.
        self.index_BS = order.gather(1, torch.minimum(slots, (counts[:, None] - 1).clamp(min=0)))
        self.is_everything = self.count == mask_BN.shape[1] and bool(self.valid_BS.all())
        self.last = self.index_BS.amax(0).tolist() if self.count else []

    def gather(self, x_BHND: Tensor) -> Tensor:
        """Select: (B, H, N, D) to (B, H, Q, D)."""
        if self.is_everything:
            return x_BHND
        index = self.index_BS[:, None, :, None]
        return x_BHND.gather(2, index.expand(-1, x_BHND.shape[1], -1, x_BHND.shape[3]))

    def scatter(self, x_BHQG: Tensor) -> Tensor:
        """Put the rows back: (B, H, Q, G) to (B, H, N, G), zero where a row was not wanted."""
        if self.is_everything:
            return x_BHQG
        x_BHQG = torch.where(self.valid_BS[:, None, :, None], x_BHQG, 0)
        full = x_BHQG.new_zeros(*x_BHQG.shape[:2], self.shape[1], x_BHQG.shape[3])
        # Adding lets the zeros of spare slots land on a real row without overwriting it.
        return full.scatter_add(2, self.index_BS[:, None, :, None].expand_as(x_BHQG), x_BHQG)


def in_groups(groups_BKG: Tensor) -> tuple[Selection, Tensor]:
    """The keys that are in a group, and in which they are, bool (B, C, G)."""
    keys = Selection(groups_BKG.any(-1))
    return keys, groups_BKG.take_along_dim(keys.index_BS[..., None], dim=1) & keys.valid_BS[..., None]


class Everything:
    """Every row sees every one of `num_keys` keys."""

    def __init__(self, num_keys: int) -> None:
        self.num_keys = num_keys

    def limit(self, start: int, stop: int) -> int:
        """All keys."""
        return self.num_keys

    def __call__(self, start: int, stop: int, num_keys: int) -> None:
        """No mask."""

    def of_keys(self, start: int, stop: int, index_BC: Tensor) -> None:
        """No mask."""


class Causal:
    """Row i sees keys up to i + offset, at most `window` of them, and none that is padding.

    Args:
        rows: The selected rows.
        offset: Keys that were there before row 0 (the cache).
        window: Sliding window, in keys, or None.
        padding_BK: Bool, False for keys that are padding; rows that are padding themselves see nothing.
        documents_BK: Numbers; rows see no key of another number than their own.
    """

    def __init__(
        self,
        rows: Selection,
        *,
        offset: int = 0,
        window: int | None = None,
        padding_BK: Tensor | None = None,
        documents_BK: Tensor | None = None,
    ) -> None:
        self.rows, self.offset, self.window = rows, offset, window
        self.padding_BK, self.documents_BK = padding_BK, documents_BK

    def limit(self, start: int, stop: int) -> int:
        """The key of the last row of the block."""
        return self.rows.last[stop - 1] + self.offset + 1 if stop > start else 0

    def __call__(self, start: int, stop: int, num_keys: int) -> Tensor:
        """Triangle, band and padding of the block."""
        return self.of_keys(start, stop, torch.arange(num_keys, device=self.rows.index_BS.device)[None])

    def of_keys(self, start: int, stop: int, index_BC: Tensor) -> Tensor:
        """The same where the keys are."""
        position_BQ = self.rows.index_BS[:, start:stop] + self.offset
        seen_BQC = index_BC[:, None] <= position_BQ[:, :, None]
        if self.window is not None:
            seen_BQC &= index_BC[:, None] > position_BQ[:, :, None] - self.window
        if self.padding_BK is not None:
            index_BC = index_BC.expand(len(self.padding_BK), -1)
            seen_BQC &= (
                self.padding_BK.gather(1, index_BC)[:, None] & self.padding_BK.gather(1, position_BQ)[:, :, None]
            )
        if self.documents_BK is not None:
            of_keys_BC = self.documents_BK.gather(1, index_BC.expand(len(self.documents_BK), -1))
            seen_BQC &= of_keys_BC[:, None] == self.documents_BK.gather(1, position_BQ)[:, :, None]
        return seen_BQC[:, None]


class _Scanned(ABC):
    """Visibility whose end is not known beforehand: looked up once a block, then kept for the other layers."""

    def __init__(self, rows: Selection, num_keys: int) -> None:
        self.rows, self.num_keys = rows, num_keys
        self._limits: dict[tuple[int, int], int] = {}

    def limit(self, start: int, stop: int) -> int:
        """One more than the last key that any of the rows sees."""
        if (start, stop) not in self._limits:
            mask = self(start, stop, self.num_keys)
            seen = mask if mask.dtype == torch.bool else ~is_hidden(mask)
            columns = seen.flatten(0, -2).any(0).nonzero()
            self._limits[start, stop] = int(columns[-1]) + 1 if len(columns) else 0
        return self._limits[start, stop]

    @abstractmethod
    def __call__(self, start: int, stop: int, num_keys: int) -> Tensor:
        """The block's mask."""

    @abstractmethod
    def of_keys(self, start: int, stop: int, index_BC: Tensor) -> Tensor:
        """The block's mask on some keys."""


class Masked(_Scanned):
    """A mask that was already made: (B or 1, H or 1, N or 1, at least K), bool or additive float."""

    def __init__(self, rows: Selection, mask: Tensor, num_keys: int) -> None:
        super().__init__(rows, num_keys)
        self.mask = mask

    def __call__(self, start: int, stop: int, num_keys: int) -> Tensor:
        """The block's rows of the mask."""
        mask = self.mask[..., :num_keys]
        if mask.shape[2] == 1:
            return mask
        if self.rows.is_everything:
            return mask[:, :, start:stop]
        index_BQ = self.rows.index_BS[:, start:stop]
        batch = torch.arange(index_BQ.shape[0], device=index_BQ.device) if mask.shape[0] > 1 else index_BQ.new_zeros(1)
        # Two index tensors around a slice put the indexed dimensions first: (B, Q, H, K).
        return mask[batch[:, None], :, index_BQ].transpose(1, 2)

    def of_keys(self, start: int, stop: int, index_BC: Tensor) -> Tensor:
        """The block's rows, the keys' columns; never whole rows, which are many where the keys are few."""
        rows_BQ1, keys_B1C = self.rows.index_BS[:, start:stop, None], index_BC[:, None]
        batch_B11 = torch.arange(len(index_BC), device=index_BC.device)[:, None, None]
        whole_batch, _, whole_rows, _ = self.mask.shape
        mask_BQCH = self.mask[
            batch_B11 if whole_batch > 1 else batch_B11 * 0, :, rows_BQ1 if whole_rows > 1 else rows_BQ1 * 0, keys_B1C
        ]
        return mask_BQCH.permute(0, 3, 1, 2)


class MaskFunction(_Scanned):
    """FlexAttention's rule, a function of batch, head, query and key indices."""

    def __init__(self, rows: Selection, function: Callable[..., Tensor], num_heads: int, num_keys: int) -> None:
        super().__init__(rows, num_keys)
        self.function, self.num_heads = function, num_heads

    def __call__(self, start: int, stop: int, num_keys: int) -> Tensor:
        """The rule, evaluated on the block."""
        return self.of_keys(start, stop, torch.arange(num_keys, device=self.rows.index_BS.device)[None])

    def of_keys(self, start: int, stop: int, index_BC: Tensor) -> Tensor:
        """The rule, evaluated on the keys."""
        index_BQ = self.rows.index_BS[:, start:stop]
        device = index_BQ.device
        batch = torch.arange(index_BQ.shape[0], device=device)[:, None, None, None]
        head = torch.arange(self.num_heads, device=device)[None, :, None, None]
        seen = self.function(batch, head, index_BQ[:, None, :, None], index_BC[:, None, None])
        return seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, stop - start, index_BC.shape[1])))


class OnKeys:
    """Visibility of some keys only, in their order; keeps for other layers which blocks see them all.

    Args:
        visible: Visibility of all keys.
        keys: The keys.
    """

    def __init__(self, visible: Visibility, keys: Selection) -> None:
        self.visible, self.keys = visible, keys
        self._sees_all: dict[tuple[int, int], bool] = {}

    def limit(self, start: int, stop: int) -> int:
        """All of them."""
        return self.keys.count

    def __call__(self, start: int, stop: int, num_keys: int) -> Tensor | None:
        """The block's mask on the first `num_keys` of them."""
        if self._sees_all.get((start, stop)):
            return None
        mask = self.visible.of_keys(start, stop, self.keys.index_BS[:, :num_keys])
        if (start, stop) not in self._sees_all:
            self._sees_all[start, stop] = mask is None or (mask.dtype == torch.bool and bool(mask.all()))
        return None if self._sees_all[start, stop] else mask


def is_hidden(bias: Tensor) -> Tensor:
    """Where an additive mask hides a key: at half its dtype's lowest number or below, and at -inf."""
    # Half, because masks are sums of "lowest" and small biases.
    return bias <= torch.finfo(bias.dtype).min / 2


def visibility_of(call: AttentionCall, rows: Selection) -> Visibility:
    """What the selected rows see in a call of an attention function of transformers.

    Args:
        call: The call; its mask is a FlexAttention block mask, (B or 1, H or 1, N, K) bool or additive, (B,
            K) padding as FlashAttention's functions get it, or None. FlashAttention aligns a causal mask with
            the last key, SDPA with the first.
        rows: The selected rows.

    Returns:
        The visibility of the rows.

    Raises:
        ValueError: The mask has another number of dimensions, or packed sequences are not causal.
    """
    mask, num_keys, num_rows = call.mask, call.k_BMKD.shape[2], rows.shape[1]
    if isinstance(mask, BlockMask):
        return MaskFunction(rows, mask.mask_mod, call.q_BHND.shape[1], num_keys)
    if mask is not None and mask.dim() == 4:
        return Masked(rows, mask, num_keys)
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"an attention mask of shape {tuple(mask.shape)} is neither (B, K) nor (B, H, N, K).")
    if mask is not None:
        # Under a static cache the mask is shorter than the cache: what lies behind it does not exist yet.
        num_keys = mask.shape[1]
        if not call.is_causal:
            return Masked(rows, mask.bool()[:, None, None], num_keys)
        return Causal(rows, offset=num_keys - num_rows, window=call.window, padding_BK=mask.bool())
    documents = call.documents()
    if call.is_flash and call.is_causal:
        return Causal(rows, offset=num_keys - num_rows, window=call.window, documents_BK=documents)
    if documents is not None:
        raise ValueError(
            "sequences packed for FlashAttention cannot be observed in a layer that is not causal; pad them instead."
        )
    if call.is_causal and num_rows > 1:
        return Causal(rows)
    return Everything(num_keys)
