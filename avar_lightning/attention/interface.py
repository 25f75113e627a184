"""Observing a vision-language model's attention, next to any kernel: a context manager and its hooks.

A hook on the text decoder adds a fresh `ForwardObserver` to the keyword arguments of each forward; the
attention wrapper (`registry`) hands it every layer's queries and keys. It travels in the arguments because
gradient checkpointing keeps them and runs layers again with them, where they must do the same work as the
first time, whether or not the context is still open.

What travels is a plain object without masses. Masses live in the record; otherwise checkpointing, which keeps
the arguments alive from the graph, would close a reference cycle through the graph that is never freed. And
it is no dataclass, since FSDP2 rebuilds dataclasses that it finds in a forward's arguments.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from avar_lightning.attention.mass import attention_mass, attention_received
from avar_lightning.attention.record import AttentionRecord, ForwardMasses, mask_of
from avar_lightning.attention.registry import OBSERVERS, AttentionCall, install
from avar_lightning.attention.visibility import QueryRows, Visibility, visibility_of
from avar_lightning.roles import Role


@contextmanager
def observe_attention(
    model: nn.Module,
    role_ids: Tensor,
    *,
    queries: Sequence[int] = (Role.USER,),
    keys: Sequence[int] = (Role.IMAGE, Role.SYSTEM),
    layers: Sequence[int] | None = None,
    received: bool = False,
    only_matching: bool = False,
) -> Iterator[AttentionRecord]:
    """Record how much attention the queries pay to each group of keys, in every forward inside the context.

    The masses are exact, float32 and differentiable when the forward is; attention dropout does not enter
    them. The model's own output is untouched, during and after. The record holds the last fresh forward and
    its cached continuations, so a whole `generate`, whose new tokens count as responses (also those that pad
    a finished sequence). Contexts nest. Gradient checkpointing works as long as it is not the reentrant kind.
    Under FSDP the masses' loss needs company: added to a loss of the forward's own output, whose backward gathers
    each layer's weights before the masses of that layer need them.

    Args:
        model: A Hugging Face VLM, or any module that holds one (PEFT, a LightningModule).
        role_ids: Role of every token of the forward, int (B, N).
        queries: Roles whose rows are recorded.
        keys: Roles of the key groups.
        layers: Decoder layers to record; by default all whose attention is a softmax over tokens.
        received: Also record the mean attention that every key receives from the queries (no gradient).
        only_matching: Leave forwards alone whose shape is not that of `role_ids`, instead of raising; for
            observing inside someone else's code, which may run other forwards too.

    Yields:
        The record, filled by each forward.

    Raises:
        ValueError: At once, for roles, layers or a model that make no sense; in a forward, when its shape is
            not that of `role_ids`, when checkpointing is reentrant, or when the attention cannot be measured.

    Example:
        >>> with observe_attention(model, batch["role_ids"]) as record:  # doctest: +SKIP
        ...     loss = model(**inputs).loss
        >>> record.vas()  # doctest: +SKIP
    """
    decoder = find_vlm(model).get_decoder()
    record = AttentionRecord(_checked_ids(role_ids), _checked_roles("queries", queries), _checked_roles("keys", keys))
    observer = _Observer(record, _checked_layers(layers, decoder), received=received, only_matching=only_matching)
    install(decoder)
    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(observer.before, with_kwargs=True).remove)
        hooks.callback(decoder.register_forward_hook(observer.after, with_kwargs=True).remove)
        yield record


def find_vlm(module: nn.Module) -> PreTrainedModel:
    """The Hugging Face vision-language model in a module: itself, or the outermost below PEFT or Lightning.

    Args:
        module: Any module.

    Returns:
        The model; its config has a text config beside others.

    Raises:
        ValueError: There is none, or there are several side by side.
    """
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for inner in module.modules():
        if id(inner) in inside or not isinstance(inner, PreTrainedModel):
            continue
        if inner.config.get_text_config() is not inner.config:
            found.append(inner)
            inside.update(id(below) for below in inner.modules())
    if len(found) != 1:
        what = f"{len(found)} vision-language models" if found else "no Hugging Face vision-language model"
        raise ValueError(f"{type(module).__name__} holds {what}; pass the one transformers model to observe.")
    return found[0]


class _Observer:
    """One `observe_attention` context: decides which forwards count, and gives each its `ForwardObserver`."""

    def __init__(
        self, record: AttentionRecord, layers: tuple[int, ...] | None, *, received: bool, only_matching: bool
    ) -> None:
        self.record, self.layers, self.received, self.only_matching = record, layers, received, only_matching
        self.given_ids = record.role_ids
        self.cache: weakref.ref[Any] | None = None

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the decoder."""
        candidates = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        inputs = next(tensor for tensor in candidates if tensor is not None)
        cache = kwargs.get("past_key_values")
        num_past = int(cache.get_seq_length()) if cache is not None else 0
        role_ids = self._role_ids(inputs.shape[0], inputs.shape[1], num_past, cache)
        if role_ids is None:
            return args, kwargs
        if num_past == 0:
            self.cache = weakref.ref(cache) if cache is not None else None
        role_ids = role_ids.to(inputs.device)
        masses = self.record.begin(role_ids, num_past, received=self.received)
        forward = ForwardObserver(masses, role_ids, num_past, self.record.queries, self.record.keys, self.layers)
        return args, kwargs | {OBSERVERS: (*kwargs.get(OBSERVERS, ()), forward)}

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the decoder: what was asked for must have been recorded."""
        mine = [forward for forward in kwargs.get(OBSERVERS, ()) if forward.masses() is self.record.latest]
        for forward in mine:
            missing = sorted(set(self.layers or ()) - forward.done)
            if missing or not forward.done:
                which = f"layers {missing} of" if missing else "no layer of"
                raise ValueError(
                    f"the attention of {which} {type(decoder).__name__} cannot be observed, because it does "
                    "not go through transformers' attention registry; choose layers or a model whose does."
                )
            made = getattr(output, "past_key_values", None)
            if self.cache is None and made is not None:
                self.cache = weakref.ref(made)

    def _role_ids(self, batch: int, num_rows: int, num_past: int, cache: Any) -> Tensor | None:
        """Roles of this forward's keys (batch, num_past + num_rows), or None when it is to be left alone."""
        given, seen = self.given_ids, self.record.role_ids
        problem = None
        if num_past:
            is_ours = self.cache is not None and self.cache() is cache
            if is_ours and seen.shape[0] == batch and seen.shape[1] >= num_past:
                return pad(seen[:, :num_past], (0, num_rows), value=int(Role.RESPONSE))
            problem = (
                f"this forward continues a cache of {num_past} tokens whose beginning was not observed; "
                "enter observe_attention before the cache is filled."
            )
        elif (batch, num_rows) == tuple(given.shape):
            return given
        elif cache is not None and not self.only_matching and self._is_repeated(batch, num_rows):
            return given.repeat_interleave(batch // given.shape[0], dim=0)
        if self.only_matching:
            return None
        raise ValueError(
            problem
            or f"role_ids has shape {tuple(given.shape)}, but the forward has (batch, sequence) = "
            f"{(batch, num_rows)}; give the roles of exactly the tokens that the model gets."
        )

    def _is_repeated(self, batch: int, num_rows: int) -> bool:
        """Whether `generate` repeated every sample, for beams or for several returned sequences."""
        return num_rows == self.given_ids.shape[1] and batch % self.given_ids.shape[0] == 0


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
        self.rows: dict[torch.device, QueryRows] = {}
        self.seen: dict[tuple[Any, ...], tuple[Any, Visibility]] = {}

    def wants(self, module: nn.Module) -> bool:
        """Whether to record this layer. The keys of cross-attention are not tokens, so it has no masses."""
        if "CrossAttention" in type(module).__name__:
            return False
        return self.layers is None or module.layer_idx in self.layers

    @torch.compiler.disable
    def observe(self, call: AttentionCall) -> None:
        """Measure one layer. A checkpoint's second run must do the same work, but the first result stays."""
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
        visible = self._visibility(call, rows)
        roles_BK = self._roles_of_keys(num_keys).to(call.k_BMKD.device)
        groups_BKG = torch.stack([roles_BK == key for key in self.keys], dim=-1)
        q_BHQD = rows.gather(call.q_BHND)
        mass_BHQG = attention_mass(
            q_BHQD, call.k_BMKD, groups_BKG, visible=visible, scale=call.scale, softcap=call.softcap
        )
        mass_BHNG = rows.scatter(mass_BHQG)
        masses = self.masses()
        if layer in self.done or masses is None:
            return
        self.done.add(layer)
        masses.mass[layer] = mass_BHNG
        if masses.received is not None:
            received_BHK = attention_received(
                q_BHQD, call.k_BMKD, rows.valid_BQ, visible=visible, scale=call.scale, softcap=call.softcap
            )
            masses.received[layer] = self._by_position(received_BHK)

    def _rows_on(self, device: torch.device) -> QueryRows:
        """The query rows, on the device of the layer (the layers of one model may be spread over several)."""
        if device not in self.rows:
            self.rows[device] = QueryRows(mask_of(self.role_ids[:, self.num_past :], self.queries).to(device))
        return self.rows[device]

    def _visibility(self, call: AttentionCall, rows: QueryRows) -> Visibility:
        """What the rows see; one for all layers that were given the same mask, because it may look into it once."""
        key = (id(call.mask), call.q_BHND.device, call.k_BMKD.shape[2], call.window, call.is_causal)
        if key not in self.seen:
            # The mask is kept too, so that no other can get its id.
            self.seen[key] = (call.mask, visibility_of(call, rows))
        return self.seen[key][1]

    def _roles_of_keys(self, num_keys: int) -> Tensor:
        """Roles (B, K) of the keys: a sliding cache keeps the last positions, a static one has spare ones."""
        surplus = num_keys - self.role_ids.shape[1]
        return pad(self.role_ids, (surplus, 0) if surplus < 0 else (0, surplus), value=-1)

    def _by_position(self, received_BHK: Tensor) -> Tensor:
        """Undo `_roles_of_keys`: (B, H, K) to (B, H, positions)."""
        surplus = received_BHK.shape[2] - self.role_ids.shape[1]
        return pad(received_BHK, (-surplus, 0) if surplus < 0 else (0, -surplus))


def _checked_ids(role_ids: Tensor) -> Tensor:
    if role_ids.dim() != 2 or role_ids.dtype.is_floating_point or role_ids.dtype == torch.bool:
        raise ValueError(f"role_ids is {role_ids.dtype} {tuple(role_ids.shape)}, expected integers (batch, sequence).")
    if role_ids.numel() and not set(role_ids.unique().tolist()) <= set(Role):
        raise ValueError(
            f"role_ids has the values {role_ids.unique().tolist()}, expected those of Role, 0 to {max(Role)}."
        )
    return role_ids


def _checked_roles(name: str, roles: Sequence[int]) -> tuple[int, ...]:
    if not roles or not set(roles) <= set(Role) or len(set(roles)) != len(roles):
        known = ", ".join(f"Role.{role.name}" for role in Role)
        raise ValueError(f"{name} is {list(roles)}, expected one or more different roles among {known}.")
    return tuple(Role(role) for role in roles)


def _checked_layers(layers: Sequence[int] | None, decoder: PreTrainedModel) -> tuple[int, ...] | None:
    count = decoder.config.num_hidden_layers
    if layers is not None and (not layers or not set(layers) <= set(range(count))):
        raise ValueError(f"layers is {list(layers)}, expected one or more of the decoder's layers 0 to {count - 1}.")
    return None if layers is None else tuple(layers)
