"""What `observe_attention` saw: masses by layer, over one forward or over the passes of one generation.

Shape letters: L layers, B batch, H query heads, N rows (and keys) seen so far, G key groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from avar_lightning.attention.tracking import mask_of
from avar_lightning.roles import Role
from avar_lightning.vas import vas_map, visual_attention_score


class AttentionRecord:
    """Attention masses of the last fresh forward and of the cached ones that continued it.

    Attributes:
        role_ids: Roles of all rows seen, (B, N); what was generated counts as a response. Before the first
            forward, the roles that were given. With beams or several returned sequences B is the generation's
            batch.
        queries: Roles whose rows were recorded.
        keys: Roles of the key groups, in the order of the last dimension of `mass`.
    """

    def __init__(self, role_ids: Tensor, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        self.role_ids = role_ids
        self.queries = queries
        self.keys = keys
        self._forwards: list[ForwardMasses] = []

    @property
    def mass(self) -> dict[int, Tensor]:
        """Masses by layer: float32 (B, H, N, G), zero on rows whose role is not in `queries`.

        After beam search, row i is what the beam that stood in this place at step i saw: beams that were
        reordered later are not untangled.
        """
        return {layer: self._concatenate(layer) for layer in self.layers}

    @property
    def received(self) -> dict[int, Tensor]:
        """Mean attention that each key received from the query rows, by layer: (B, H, N), no gradient.

        Zeros for a sample without query rows; empty unless observed with `received=True`.
        """
        sums = [forward.received for forward in self._forwards if forward.received is not None]
        if not sums:
            return {}
        num_queries = torch.stack([forward.num_queries for forward in self._forwards]).sum(0).clamp(min=1)
        length = self.role_ids.shape[1]
        totals: dict[int, Tensor] = {}
        for layer in self.layers:
            parts = [pad(received[layer], (0, length - received[layer].shape[2])) for received in sums]
            totals[layer] = torch.stack(parts).sum(0) / num_queries.to(parts[0].device)[:, None, None]
        return totals

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were recorded, in order."""
        return tuple(sorted(self._forwards[0].mass)) if self._forwards else ()

    @property
    def latest(self) -> ForwardMasses | None:
        """What the last forward contributed."""
        return self._forwards[-1] if self._forwards else None

    def begin(self, role_ids: Tensor, num_past: int, *, received: bool) -> ForwardMasses:
        """Open the next forward: over again if it has no past, else behind its first `num_past` positions.

        Args:
            role_ids: Roles of all positions up to the end of the forward, (B, num_past + rows).
            num_past: Positions in the cache; less than was recorded when drafted tokens were rejected.
            received: Whether it records what keys receive.

        Returns:
            Empty masses, to be filled by the forward.

        Raises:
            ValueError: Positions were taken back, and what they gave to `received` cannot be.
        """
        if num_past == 0:
            self._forwards = []
        elif num_past < self.role_ids.shape[1]:
            if received:
                raise ValueError("received=True does not work with a cache that is cut back (assisted generation).")
            self._cut(num_past)
        self.role_ids = role_ids
        self._forwards.append(ForwardMasses(mask_of(role_ids[:, num_past:], self.queries).sum(1), received=received))
        return self._forwards[-1]

    def stacked(self) -> Tensor:
        """Masses of all recorded layers: (L, B, H, N, G)."""
        return self._stack(self.mass)

    def mass_of(self, key: int) -> Tensor:
        """Masses on one key role: (L, B, H, N).

        Raises:
            ValueError: The role is not one of the observed keys.
        """
        if key not in self.keys:
            raise ValueError(f"role {key!r} was not observed; add it to `keys` (observed: {list(self.keys)}).")
        return self._stack({layer: mass[..., self.keys.index(key)] for layer, mass in self.mass.items()})

    def query_mask(self, *roles: int) -> Tensor:
        """Bool (B, N): rows of the given roles, by default all recorded ones.

        Raises:
            ValueError: A role is not one of the observed queries.
        """
        if unknown := [role for role in roles if role not in self.queries]:
            raise ValueError(f"roles {unknown} were not observed; add them to `queries` ({list(self.queries)}).")
        return mask_of(self.role_ids, roles or self.queries)

    def vas(self) -> Tensor:
        """Visual Attention Score of each sample (B,): mean of image over system mass; NaN where undefined."""
        return visual_attention_score(*self._image_system_queries())

    def vas_map(self) -> Tensor:
        """Visual Attention Score of each layer and head (L, H), mean over the samples that have one."""
        return vas_map(*self._image_system_queries())

    def _image_system_queries(self) -> tuple[Tensor, Tensor, Tensor]:
        image, system = self.mass_of(Role.IMAGE), self.mass_of(Role.SYSTEM)
        return image, system, self.query_mask().to(image.device)

    def _stack(self, by_layer: dict[int, Tensor]) -> Tensor:
        if not by_layer:
            raise RuntimeError("nothing was recorded: run the model's forward inside `observe_attention`.")
        device = by_layer[self.layers[0]].device
        return torch.stack([by_layer[layer].to(device) for layer in self.layers])

    def _cut(self, length: int) -> None:
        """Forget the rows from position `length` on."""
        for forward in self._forwards:
            rows = 0
            for layer, mass in forward.mass.items():
                forward.mass[layer] = mass[:, :, : max(length, 0)]
                rows = mass.shape[2]
            length -= rows

    def _concatenate(self, layer: int) -> Tensor:
        parts = [forward.mass[layer] for forward in self._forwards]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class ForwardMasses:
    """What one forward contributed, by layer.

    Attributes:
        mass: (B, H, rows, G) of each layer.
        received: Sum over the forward's query rows of what each position received, (B, H, positions); None if
            unasked.
        num_queries: Query rows of each sample (B,).
    """

    def __init__(self, num_queries: Tensor, *, received: bool) -> None:
        self.num_queries = num_queries
        self.mass: dict[int, Tensor] = {}
        self.received: dict[int, Tensor] | None = {} if received else None
