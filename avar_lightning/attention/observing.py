"""One observed forward, as its attention layers see it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from avar_lightning.attention.decoder import is_cross_attention
from avar_lightning.attention.fused import Told, as_autocast
from avar_lightning.attention.mass import attention_mass, attention_received
from avar_lightning.attention.record import ForwardMasses
from avar_lightning.attention.registry import AttentionCall
from avar_lightning.attention.tracking import mask_of, roles_of_keys
from avar_lightning.attention.visibility import OnKeys, Selection, Visibility, in_groups, visibility_of

MANY = 1 / 12
"""Share of all pairs of rows and keys from which on masses are cheaper from wider heads (measured: docs/log.md)."""


FEWEST_ROWS = 16
"""Of a call whose heads may grow: for less it would take longer to copy the keys."""


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
        self.groups: dict[tuple[torch.device, int], Tensor] = {}
        self.grouped: dict[tuple[torch.device, int], tuple[Selection, Tensor]] = {}
        self.seen: dict[tuple[Any, ...], tuple[Any, Visibility]] = {}
        self.seen_of_grouped: dict[int, OnKeys] = {}

    def wants(self, module: nn.Module) -> bool:
        """Whether to record this layer. The keys of cross-attention are not tokens, so it has no masses."""
        if is_cross_attention(module):
            return False
        return self.layers is None or module.layer_idx in self.layers

    def many_groups(self, call: AttentionCall) -> Tensor | None:
        """Groups of keys (B, K, G) where they and the rows are so many that masses had better be the kernel's."""
        if call.softcap is not None or call.q_BHND.shape[2] < FEWEST_ROWS:
            return None
        rows, (keys, _) = self._rows_on(call.q_BHND.device), self._grouped_of(call)
        pairs = rows.index_BS.shape[1] * keys.index_BS.shape[1]
        return self._groups_of(call) if pairs > MANY * call.q_BHND.shape[2] * call.k_BMKD.shape[2] else None

    def observe(self, call: AttentionCall, told: Told | None = None) -> None:
        """Measure one layer, faster where its kernel told the log-sum-exp of its rows, or their masses.

        A checkpoint's second run must do the same work, but the first result stays.
        """
        layer: int = call.module.layer_idx  # type: ignore[assignment]
        if self.with_grad and not torch.is_grad_enabled():
            raise ValueError(
                "attention cannot be observed under reentrant gradient checkpointing, which loses its "
                'gradient; enable checkpointing with gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        rows = self._rows_on(call.q_BHND.device)
        if call.q_BHND.shape[2] != rows.shape[1]:
            raise ValueError(
                f"layer {layer} attends from {call.q_BHND.shape[2]} of the forward's {rows.shape[1]} rows; "
                "attention cannot be observed in a layer that drops rows."
            )
        softmax: dict[str, Any] = {
            "visible": self._visibility(call, rows),
            "scale": call.scale,
            "softcap": call.softcap,
            "change": call.change_of(rows),
        }
        if told is None:
            mass_BHQG = attention_mass(rows.gather(call.q_BHND), call.k_BMKD, self._groups_of(call), **softmax)
        elif told.mass_BHNG is not None:
            mass_BHQG = rows.gather(told.mass_BHNG)
        else:
            mass_BHQG = self._mass_of_grouped(call, told, rows, softmax)
        mass_BHNG = rows.scatter(mass_BHQG)
        masses = self.masses()
        if layer in self.done or masses is None:
            return
        self.done.add(layer)
        masses.mass[layer] = mass_BHNG
        if masses.received is not None:
            masses.received[layer] = self._received(call, told, rows, softmax)

    def _mass_of_grouped(self, call: AttentionCall, told: Told, rows: Selection, softmax: dict[str, Any]) -> Tensor:
        """Masses (B, H, Q, G) from the keys of the groups alone."""
        keys, groups_BCG = self._grouped_of(call)
        visible = softmax["visible"]
        if id(visible) not in self.seen_of_grouped:
            self.seen_of_grouped[id(visible)] = OnKeys(visible, keys)
        # The numbers that the kernel made its log-sum-exp of.
        q_BHQD, k_BMCD = as_autocast(rows.gather(call.q_BHND), keys.gather(call.k_BMKD))
        arguments = softmax | {"visible": self.seen_of_grouped[id(visible)], "lse_BHQ": _lse_of(told, rows)}
        return attention_mass(q_BHQD, k_BMCD, groups_BCG, **arguments)

    @torch.no_grad()  # in the first run of a checkpoint alone, so it must keep nothing for a backward
    def _received(self, call: AttentionCall, told: Told | None, rows: Selection, softmax: dict[str, Any]) -> Tensor:
        """What every position receives from the rows, (B, H, positions)."""
        q_BHQD, k_BMKD = rows.gather(call.q_BHND), call.k_BMKD
        if told is not None:
            q_BHQD, k_BMKD = as_autocast(q_BHQD, k_BMKD)
            softmax = softmax | {"lse_BHQ": _lse_of(told, rows)}
        return self._by_position(attention_received(q_BHQD, k_BMKD, rows.valid_BS, **softmax))

    def _rows_on(self, device: torch.device) -> Selection:
        """The query rows, on the device of the layer (the layers of one model may be spread over several)."""
        if device not in self.rows:
            self.rows[device] = Selection(mask_of(self.role_ids[:, self.num_past :], self.queries).to(device))
        return self.rows[device]

    def _groups_of(self, call: AttentionCall) -> Tensor:
        """Which keys are in which group, (B, K, G)."""
        device, num_keys = call.k_BMKD.device, call.k_BMKD.shape[2]
        if (device, num_keys) not in self.groups:
            roles_BK = roles_of_keys(self.role_ids, num_keys).to(device)
            self.groups[device, num_keys] = torch.stack([roles_BK == key for key in self.keys], dim=-1)
        return self.groups[device, num_keys]

    def _grouped_of(self, call: AttentionCall) -> tuple[Selection, Tensor]:
        """The keys that are in a group, and in which, (B, C, G)."""
        place = call.k_BMKD.device, call.k_BMKD.shape[2]
        if place not in self.grouped:
            self.grouped[place] = in_groups(self._groups_of(call))
        return self.grouped[place]

    def _visibility(self, call: AttentionCall, rows: Selection) -> Visibility:
        """What the rows see; one for all layers that were given the same mask, because it may look into it once."""
        key = (id(call.mask), call.q_BHND.device, call.k_BMKD.shape[2], call.window, call.is_causal)
        if key not in self.seen:
            # The mask is kept too, so that no other can get its id.
            self.seen[key] = (call.mask, visibility_of(call, rows))
        return self.seen[key][1]

    def _by_position(self, received_BHK: Tensor) -> Tensor:
        """Undo `roles_of_keys`: (B, H, K) to (B, H, positions)."""
        surplus = received_BHK.shape[2] - self.role_ids.shape[1]
        return pad(received_BHK, (-surplus, 0) if surplus < 0 else (0, -surplus))


def _lse_of(told: Told, rows: Selection) -> Tensor:
    """Log-sum-exps of the rows, (B, H, Q)."""
    return rows.gather(told.lse_BHN.unsqueeze(-1)).squeeze(-1)
