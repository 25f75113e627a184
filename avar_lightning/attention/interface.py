"""Observing and steering a vision-language model's attention, next to any kernel: two context managers.

A hook on the text decoder adds a fresh object to the keyword arguments of each forward; the attention wrapper
(`registry`) hands it every layer's queries and keys. It travels in the arguments because gradient checkpointing keeps
them and runs layers again with them, where they must do the same work as the first time, whether or not the context is
still open.

What travels is a plain object without masses. Masses live in the record; otherwise checkpointing, which keeps
the arguments alive from the graph, would close a reference cycle through the graph that is never freed. And
it is no dataclass, since FSDP2 rebuilds dataclasses that it finds in a forward's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from avar_lightning.attention.decoder import LayerSpec, find_vlm, select_layers
from avar_lightning.attention.observing import ForwardObserver
from avar_lightning.attention.record import AttentionRecord
from avar_lightning.attention.registry import WATCH, Watch, install
from avar_lightning.attention.steering import ForwardSteering, Intervention, Mode
from avar_lightning.attention.tracking import RoleTracker
from avar_lightning.roles import Role


@contextmanager
def observe_attention(
    model: nn.Module,
    role_ids: Tensor,
    *,
    queries: Sequence[int] = (Role.USER,),
    keys: Sequence[int] = (Role.IMAGE, Role.SYSTEM),
    layers: LayerSpec | None = None,
    received: bool = False,
    only_matching: bool = False,
) -> Iterator[AttentionRecord]:
    """Record how much attention the queries pay to each group of keys, in every forward inside the context.

    The masses are exact, float32 and differentiable when the forward is; attention dropout does not enter
    them. The model's own output is untouched, during and after (in float32 on a CPU with many rows and keys, up to
    rounding, though no difference was ever seen). The record holds the last fresh forward and
    its cached continuations, so a whole `generate`, whose new tokens count as responses (also those that pad
    a finished sequence). Contexts nest. Inside, compiled decoder layers stay compiled but for their attention, and a
    model that is compiled as a whole runs eagerly. Gradient checkpointing works unless it is the reentrant kind.
    Under FSDP the masses' loss needs company: added to a loss of the forward's own output, whose backward gathers
    each layer's weights before the masses of that layer need them.

    Args:
        model: A Hugging Face VLM, or any module that holds one (PEFT, a LightningModule).
        role_ids: Role of every token of the forward, int (B, N).
        queries: Roles whose rows are recorded.
        keys: Roles of the key groups.
        layers: Decoder layers to record: numbers, `"9-14"` (inclusive) or a part of the depth like `"0.3-0.5"`; by
            default all whose attention is a softmax over tokens.
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
    tracker = RoleTracker(role_ids, context="observe_attention", only_matching=only_matching)
    record = AttentionRecord(role_ids, _checked_roles("queries", queries), _checked_roles("keys", keys))
    observer = _Observer(record, tracker, select_layers(layers, _num_layers(decoder)), received=received)
    install(decoder)
    with _hooked(decoder, observer):
        yield record


class _Observer:
    """One `observe_attention` context: decides which forwards count, and gives each its `ForwardObserver`."""

    def __init__(
        self, record: AttentionRecord, tracker: RoleTracker, layers: tuple[int, ...] | None, *, received: bool
    ) -> None:
        self.record, self.tracker, self.layers, self.received = record, tracker, layers, received

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the decoder."""
        followed = self.tracker.follow(args, kwargs)
        if followed is None:
            return args, kwargs
        role_ids, num_past = followed
        masses = self.record.begin(role_ids, num_past, received=self.received)
        forward = ForwardObserver(masses, role_ids, num_past, self.record.queries, self.record.keys, self.layers)
        watch = Watch.of(kwargs)
        return args, kwargs | {WATCH: Watch((*watch.observers, forward), watch.steerings)}

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the decoder: what was asked for must have been recorded."""
        for forward in Watch.of(kwargs).observers:
            if isinstance(forward, ForwardObserver) and forward.masses() is self.record.latest:
                _check_reached(decoder, self.layers, forward.done, "observed")
                self.tracker.remember(output)


@contextmanager
def steer_attention(
    model: nn.Module,
    role_ids: Tensor,
    *,
    image: float = 0.15,
    system: float = 0.4,
    mode: Mode = "logit",
    queries: Sequence[int] | Literal["last"] | None = None,
    layers: LayerSpec | None = None,
    heads: Mapping[int, Sequence[int]] | None = None,
) -> Iterator[None]:
    """Give image tokens more attention and system tokens less, in every forward inside the context.

    With Z the scaled logits, a = `image` on image tokens and -`system` on system tokens: `logit` is Z (1 + a), the
    form of AVAR (arXiv 2603.03825); `mass` is Z + log(1 + a), which scales probabilities and renormalises; `abs` is
    Z + a |Z|, PAI's. All are exact beside any kernel. `logit` scales signed logits, so it moves attention away from
    image tokens whose logit is negative. It holds through a whole `generate`, whose new tokens count as responses.
    Strength 0 changes nothing, bit for bit; rows of the same layer that are not steered keep their exact attention.
    Contexts nest: with `observe_attention`, which then records the steered masses, and with others on other layers.
    Inside, compiled decoder layers stay compiled but for their attention, and a model compiled as a whole runs eagerly.

    Args:
        model: A Hugging Face VLM, or any module that holds one (PEFT, a LightningModule).
        role_ids: Role of every token of the forward, int (B, N).
        image: Strength on image tokens, -1 (hidden, under `mass`) or more.
        system: Strength on system tokens, 1 (hidden, under `mass`) or less; positive lowers their attention.
        mode: `logit`, `mass` or `abs`. `logit` and `mass` run in the model's own kernel; with `logit` only some rows or
            heads of a layer cost a second run of it. `abs` computes the steered rows outside of it.
        queries: Roles of the rows that are steered; `"last"` for the last token of every forward alone (PAI's); every
            row when unset (the paper's).
        layers: Decoder layers: numbers, `"9-14"` (inclusive) or a part of the depth like `"0.3-0.5"`; all when unset.
        heads: Query heads by layer, instead of `layers`.

    Raises:
        ValueError: At once, for arguments or a model that make no sense; in a forward, when its shape is not that of
            `role_ids`, when no layer's attention goes through transformers' attention registry, or when it has what
            steering does not know (softcap, sinks, packed sequences, …).

    Example:
        >>> with steer_attention(model, prompt["role_ids"], image=0.3, layers="9-14"):  # doctest: +SKIP
        ...     tokens = model.generate(**inputs)
    """
    rows = queries if queries is None or isinstance(queries, str) else tuple(queries)
    intervention = Intervention(image, system, mode, rows, layers, heads)
    vlm = find_vlm(model)
    decoder = vlm.get_decoder()
    steerer = _Steerer(intervention, RoleTracker(role_ids, context="steer_attention"), vlm)
    if not intervention.active:
        yield
        return
    install(decoder)
    with _hooked(decoder, steerer), ExitStack() as outer:
        if intervention.queries == "last":
            outer.callback(vlm.register_forward_pre_hook(steerer.see_padding, with_kwargs=True).remove)
        yield


class _Steerer:
    """One `steer_attention` context: gives each forward its `ForwardSteering`."""

    def __init__(self, intervention: Intervention, tracker: RoleTracker, vlm: PreTrainedModel) -> None:
        self.intervention, self.tracker = intervention, tracker
        asked = intervention.layers if intervention.heads is None else sorted(intervention.heads)
        self.layers = select_layers(asked, _num_layers(vlm.get_decoder()))
        self.signature = inspect.signature(type(vlm).forward)
        self.latest: ForwardSteering | None = None
        self.padding: Any = None

    def see_padding(self, vlm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model, which still has the mask that some families turn into others."""
        self.padding = self.signature.bind_partial(vlm, *args, **kwargs).arguments.get("attention_mask")

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the decoder."""
        followed = self.tracker.follow(args, kwargs)
        if followed is None:
            return args, kwargs
        role_ids, num_past = followed
        is_last_BN = None
        if self.intervention.queries == "last":
            mask, self.padding = kwargs.get("attention_mask") if self.padding is None else self.padding, None
            # What generates with a cache is padded on the left, whatever has become of its mask.
            is_generating = kwargs.get("past_key_values") is not None and not _tells_padding(mask)
            is_last_BN = _is_last(role_ids, num_past, None if is_generating else mask)
        self.latest = ForwardSteering(self.intervention, role_ids, num_past, self.layers, is_last_BN)
        watch = Watch.of(kwargs)
        return args, kwargs | {WATCH: Watch(watch.observers, (*watch.steerings, self.latest))}

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the decoder: what was asked for must have been steered."""
        if self.latest is not None and self.latest in Watch.of(kwargs).steerings:
            _check_reached(decoder, self.layers, self.latest.done, "steered")
            self.tracker.remember(output)


@contextmanager
def _hooked(decoder: nn.Module, hooks: _Observer | _Steerer) -> Iterator[None]:
    with ExitStack() as stack:
        # A compiled graph does not look whether hooks came or went, so what holds the decoder runs eagerly inside. What
        # it holds may be compiled: its layers, which see observers and steering among their arguments, and Flex.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(decoder.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_pre_hook(_compile_inside).remove)
        stack.callback(decoder.register_forward_hook(_not_outside).remove)
        stack.callback(decoder.register_forward_hook(hooks.after, with_kwargs=True).remove)
        yield


def _compile_inside(*_: Any) -> None:
    torch.compiler.set_stance("default")


def _not_outside(*_: Any) -> None:
    torch.compiler.set_stance("force_eager")


def _check_reached(decoder: nn.Module, layers: tuple[int, ...] | None, done: set[int], what: str) -> None:
    missing = sorted(set(layers or ()) - done)
    if missing or not done:
        which = f"layers {missing} of" if missing else "no layer of"
        raise ValueError(
            f"the attention of {which} {type(decoder).__name__} cannot be {what}, because it does "
            "not go through transformers' attention registry; choose layers or a model whose does."
        )


def _is_last(role_ids: Tensor, num_past: int, attention_mask: Any) -> Tensor:
    """True on the last row of each sample that is no padding, (B, rows)."""
    is_token = torch.ones_like(role_ids[:, num_past:], dtype=torch.bool)
    if _tells_padding(attention_mask):
        is_token = attention_mask[:, num_past : role_ids.shape[1]].bool().to(role_ids.device)
    elif attention_mask is not None:
        raise ValueError(
            f'queries="last" cannot tell padding from an attention mask that is {type(attention_mask).__name__} '
            f"{tuple(getattr(attention_mask, 'shape', ()))}, expected (batch, sequence); give the model such a one."
        )
    position = torch.arange(is_token.shape[1], device=role_ids.device)
    last = torch.where(is_token, position, -1).amax(1, keepdim=True)
    return position == last


def _tells_padding(attention_mask: Any) -> bool:
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 2


def _num_layers(decoder: nn.Module) -> int:
    return int(decoder.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def _checked_roles(name: str, roles: Sequence[int]) -> tuple[int, ...]:
    if not roles or not set(roles) <= set(Role) or len(set(roles)) != len(roles):
        known = ", ".join(f"Role.{role.name}" for role in Role)
        raise ValueError(f"{name} is {list(roles)}, expected one or more different roles among {known}.")
    return tuple(Role(role) for role in roles)
