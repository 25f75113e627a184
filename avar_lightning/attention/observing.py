"""One observed forward, as its attention layers see it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from avar_lightning.attention.decoder import is_cross_attention
from avar_lightning.attention.fused import as_autocast
from avar_lightning.attention.mass import attention_mass, attention_received
from avar_lightning.attention.record import ForwardMasses
from avar_lightning.attention.registry import AttentionCall
from avar_lightning.attention.tracking import mask_of, roles_of_keys
from avar_lightning.attention.visibility import OnKeys, Selection, Visibility, visibility_of


class ForwardObserver:
    """One observed forward, as its attention layers see it. Holds no masses and no graph."""

    def __init__(
        self,
        masses: ForwardMasses,
        role_ids: Tensor,
        num_past: int,
        queries: tuple[int, ...],
        keys: tuple[int, ...],
        layers: tuple[int, ...] | None,
    ) -> None:
        self.masses = weakref.ref(masses)
        self.role_ids, self.num_past = role_ids, num_past
        self.queries, self.keys, self.layers = queries, keys, layers
        self.with_grad = torch.is_grad_enabled()
        self.done: set[int] = set()
        self.rows: dict[torch.device, Selection] = {}
        self.grouped: dict[tuple[torch.device, int], tuple[Selection, Tensor, Tensor]] = {}
        self.seen: dict[tuple[Any, ...], tuple[Any, Visibility, OnKeys]] = {}

    def wants(self, module: nn.Module) -> bool:
        """Whether to record this layer. The keys of cross-attention are not tokens, so it has no masses."""
        if is_cross_attention(module):
            return False
        return self.layers is None or module.layer_idx in self.layers

    @torch.compiler.disable
    def observe(self, call: AttentionCall, lse_BHN: Tensor | None = None) -> None:
        """Measure one layer, faster where its kernel told the log-sum-exp of its rows.

        A checkpoint's second run must do the same work, but the first result stays.
        """
        layer: int = call.module.layer_idx  # type: ignore[assignment]
        if self.with_grad and not torch.is_grad_enabled():
            raise ValueError(
                "attention cannot be observed under reentrant gradient checkpointing, which loses its "
                'gradient; enable checkpointing with gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        rows, num_keys = self._rows_on(call.q_BHND.device), call.k_BMKD.shape[2]
        if call.q_BHND.shape[2] != rows.shape[1]:
            raise ValueError(
                f"layer {layer} attends from {call.q_BHND.shape[2]} of the forward's {rows.shape[1]} rows; "
                "attention cannot be observed in a layer that drops rows."
            )
        keys, groups_BKG, groups_BCG = self._groups_on(call.k_BMKD.device, num_keys)
        q_BHQD = rows.gather(call.q_BHND)
        visible, of_keys = self._visibility(call, rows, keys)
        softmax: dict[str, Any] = {
            "visible": visible,
            "scale": call.scale,
            "softcap": call.softcap,
            "change": call.change_of(rows),
        }
        if lse_BHN is None:
            mass_BHQG = attention_mass(q_BHQD, call.k_BMKD, groups_BKG, **softmax)
        else:
            lse_BHQ = rows.gather(lse_BHN.unsqueeze(-1)).squeeze(-1)
            # The numbers that the kernel made its log-sum-exp of.
            q_BHQD, k_BMCD = as_autocast(q_BHQD, keys.gather(call.k_BMKD))
            mass_BHQG = attention_mass(q_BHQD, k_BMCD, groups_BCG, **softmax | {"visible": of_keys}, lse_BHQ=lse_BHQ)
        mass_BHNG = rows.scatter(mass_BHQG)
        masses = self.masses()
        if layer in self.done or masses is None:
            return
        self.done.add(layer)
        masses.mass[layer] = mass_BHNG
        if masses.received is not None:
            received_BHK = attention_received(q_BHQD, call.k_BMKD, rows.valid_BQ, **softmax)
            masses.received[layer] = self._by_position(received_BHK)

    def _rows_on(self, device: torch.device) -> Selection:
        """The query rows, on the device of the layer (the layers of one model may be spread over several)."""
        if device not in self.rows:
            self.rows[device] = Selection(mask_of(self.role_ids[:, self.num_past :], self.queries).to(device))
        return self.rows[device]

    def _groups_on(self, device: torch.device, num_keys: int) -> tuple[Selection, Tensor, Tensor]:
        """The keys of all groups; groups of every key (B, K, G), and of these keys (B, C, G)."""
        if (device, num_keys) not in self.grouped:
            roles_BK = roles_of_keys(self.role_ids, num_keys).to(device)
            groups_BKG = torch.stack([roles_BK == key for key in self.keys], dim=-1)
            keys = Selection(groups_BKG.any(-1))
            groups_BCG = groups_BKG.take_along_dim(keys.index_BQ[..., None], dim=1) & keys.valid_BQ[..., None]
            self.grouped[device, num_keys] = keys, groups_BKG, groups_BCG
        return self.grouped[device, num_keys]

    def _visibility(self, call: AttentionCall, rows: Selection, keys: Selection) -> tuple[Visibility, OnKeys]:
        """What the rows see, of all keys and of some; one for all layers of a mask, which is looked into once."""
        key = (id(call.mask), call.q_BHND.device, call.k_BMKD.shape[2], call.window, call.is_causal)
        if key not in self.seen:
            # The mask is kept too, so that no other can get its id.
            visible = visibility_of(call, rows)
            self.seen[key] = call.mask, visible, OnKeys(visible, keys)
        return self.seen[key][1:]

    def _by_position(self, received_BHK: Tensor) -> Tensor:
        """Undo `roles_of_keys`: (B, H, K) to (B, H, positions)."""
        surplus = received_BHK.shape[2] - self.role_ids.shape[1]
        return pad(received_BHK, (-surplus, 0) if surplus < 0 else (0, -surplus))
