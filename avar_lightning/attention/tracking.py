"""The roles of the tokens that a forward attends to, through the passes of a generation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from avar_lightning.roles import Role


class RoleTracker:
    """Tells the roles of each forward's keys, from those that were given for the first.

    Args:
        role_ids: Roles of every token of a forward, int (B, N).
        context: Name of the context manager, for messages.
        only_matching: Leave forwards alone whose shape is not that of `role_ids`, instead of raising.

    Raises:
        ValueError: They are no roles, or have another shape.
    """

    def __init__(self, role_ids: Tensor, *, context: str, only_matching: bool = False) -> None:
        self.given = self.seen = _checked(role_ids)
        self.context, self.only_matching = context, only_matching
        self._cache: weakref.ref[Any] | None = None

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int] | None:
        """Roles (B, num_past + rows) of a decoder forward's keys and its `num_past`; None to leave it alone.

        Raises:
            ValueError: The forward is not one over the tokens whose roles were given, nor continues such a one.
        """
        candidates = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        inputs = next(tensor for tensor in candidates if tensor is not None)
        cache = kwargs.get("past_key_values")
        num_past = int(cache.get_seq_length()) if cache is not None else 0
        role_ids = self._roles(inputs.shape[0], inputs.shape[1], num_past, cache)
        if role_ids is None:
            return None
        if num_past == 0:
            self._cache = weakref.ref(cache) if cache is not None else None
        self.seen = role_ids.to(inputs.device)
        return self.seen, num_past

    def remember(self, output: Any) -> None:
        """Note the cache that a followed forward made, so that its continuations are known."""
        made = getattr(output, "past_key_values", None)
        if self._cache is None and made is not None:
            self._cache = weakref.ref(made)

    def _roles(self, batch: int, num_rows: int, num_past: int, cache: Any) -> Tensor | None:
        problem = None
        if num_past:
            is_ours = self._cache is not None and self._cache() is cache
            if is_ours and self.seen.shape[0] == batch and self.seen.shape[1] >= num_past:
                return pad(self.seen[:, :num_past], (0, num_rows), value=int(Role.RESPONSE))
            problem = (
                f"this forward continues a cache of {num_past} tokens whose beginning was not observed; "
                f"enter {self.context} before the cache is filled."
            )
        elif (batch, num_rows) == tuple(self.given.shape):
            return self.given
        elif cache is not None and not self.only_matching and self._is_repeated(batch, num_rows):
            return self.given.repeat_interleave(batch // self.given.shape[0], dim=0)
        if self.only_matching:
            return None
        raise ValueError(
            problem
            or f"role_ids has shape {tuple(self.given.shape)}, but the forward has (batch, sequence) = "
            f"{(batch, num_rows)}; give the roles of exactly the tokens that the model gets."
        )

    def _is_repeated(self, batch: int, num_rows: int) -> bool:
        """Whether `generate` repeated every sample, for beams or for several returned sequences."""
        return num_rows == self.given.shape[1] and batch % self.given.shape[0] == 0


def roles_of_keys(role_ids: Tensor, num_keys: int) -> Tensor:
    """Roles (B, K) of a layer's keys: a sliding cache keeps the last positions, a static one has spare ones (-1)."""
    surplus = num_keys - role_ids.shape[1]
    return pad(role_ids, (surplus, 0) if surplus < 0 else (0, surplus), value=-1)


def mask_of(role_ids: Tensor, roles: tuple[int, ...]) -> Tensor:
    """True where the role is one of `roles`."""
    return torch.isin(role_ids, torch.tensor([int(role) for role in roles], device=role_ids.device))


def _checked(role_ids: Tensor) -> Tensor:
    if role_ids.dim() != 2 or role_ids.dtype.is_floating_point or role_ids.dtype == torch.bool:
        raise ValueError(f"role_ids is {role_ids.dtype} {tuple(role_ids.shape)}, expected integers (batch, sequence).")
    if role_ids.numel() and not set(role_ids.unique().tolist()) <= set(Role):
        raise ValueError(
            f"role_ids has the values {role_ids.unique().tolist()}, expected those of Role, 0 to {max(Role)}."
        )
    return role_ids
