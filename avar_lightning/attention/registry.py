"""The one registration with transformers: a wrapper around the attention function that a model uses already.

Each base implementation (eager, sdpa, flash, flex, custom) gets a wrapper in transformers' attention registry, under
its own name with a prefix, and the text decoder's config is pointed at it. The wrapper calls the base and does nothing
else unless the forward carries observers or steering in its keyword arguments. It stays in the config when a context is
left, because gradient checkpointing runs layers again in backward, usually later; without observers and steering it
computes what the base does, bit for bit. A saved config does not name the implementation, so it carries no trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avar_lightning.attention.flex import FlexCalls
from avar_lightning.attention.fused import FusedCalls, Told
from avar_lightning.attention.mass import Change
from avar_lightning.attention.visibility import Selection

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments that tell FlashAttention where sequences packed into one row start."""

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

PREFIX = "avar_"
WATCH = "avar_watch"
"""Keyword argument of the decoder's forward that carries a `Watch` to its attention layers."""

UNSUPPORTED = {
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "block_table": "a paged cache",
    "cache": "a paged cache",
    "score_mod": "a score function",
}
"""Arguments of attention functions that change the softmax in a way that `attention_mass` does not know."""


class LayerObserver(Protocol):
    """What a `Watch` observes with: asked by every attention layer."""

    def wants(self, module: nn.Module) -> bool:
        """Whether to observe this layer."""

    def many_groups(self, call: AttentionCall) -> Tensor | None:
        """Groups of keys (B, K, G) whose masses had better come from the kernel; None for none."""

    def observe(self, call: AttentionCall, told: Told | None) -> None:
        """Look at one call, and at what its kernel told of its rows."""


class LayerSteering(Protocol):
    """What a `Watch` steers with: asked by every attention layer, and runs the base function itself."""

    def wants(self, module: nn.Module) -> bool:
        """Whether to steer this layer."""

    def change_of(self, call: AttentionCall, rows: Selection) -> Change | None:
        """What it does to the logits of the given rows."""

    def attend(
        self, call: AttentionCall, value: Tensor, base: AttentionFunction, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The steered result of `base(query, key, value, **kwargs)`."""


class Watch:
    """What travels in `WATCH`: one object, since a compiled layer looks whether it is there, and not what it holds."""

    def __init__(self, observers: Sequence[LayerObserver] = (), steerings: Sequence[LayerSteering] = ()) -> None:
        self.observers, self.steerings = tuple(observers), tuple(steerings)

    @staticmethod
    def of(kwargs: Mapping[str, Any]) -> Watch:
        """What travels in some keyword arguments; empty where nothing does."""
        watch: Watch = kwargs.get(WATCH) or Watch()
        return watch


class AttentionCall:
    """One call of an attention function, read the way its base implementation reads it.

    Attributes:
        module: The attention layer, which has a `layer_idx`.
        q_BHND: Queries.
        k_BMKD: Keys, not repeated for grouped queries.
        mask: 4-D mask, 2-D padding, block mask or None.
        is_causal: Whether a missing or 2-D mask means causal.
        is_flash: Whether the base is a FlashAttention.
        is_eager: Whether the base is the modeling file's own eager function.
        window: Sliding window in keys where the base reads it from its arguments, else None.
        scale: Factor of the logits, or None for D^-0.5.
        softcap: Cap of the logits, or None.
        steering: What steers the call, or None.
    """

    def __init__(
        self,
        base: str,
        module: nn.Module,
        q_BHND: Tensor,
        k_BMKD: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        steering: LayerSteering | None = None,
    ) -> None:
        for name, what in UNSUPPORTED.items():
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"attention with {what} (`{name}`) cannot be observed or steered; choose other layers or models."
                )
        self.steering = steering
        self.module, self.q_BHND, self.k_BMKD, self.mask = module, q_BHND, k_BMKD, mask
        self.is_flash, self.is_eager = "flash" in base, base == "eager"
        self._position_ids: Tensor | None = kwargs.get("position_ids")
        self._starts: tuple[Tensor, Tensor] | None = None
        if kwargs.get("cu_seq_lens_q") is not None:
            if not self.is_flash:
                raise ValueError(
                    f"sequences packed for FlashAttention (`cu_seq_lens_q`) cannot be observed or steered under "
                    f'{base}, which does not look at it; load the model with attn_implementation="flash_attention_2".'
                )
            # transformers looks at them only where all are there.
            if all(kwargs.get(name) is not None for name in VARLEN):
                self._starts = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # Eager and flex attention take no hint: without a mask they see everything.
        self.is_causal = bool(is_causal) and base not in ("eager", "flex_attention")
        self.window: int | None = kwargs.get("sliding_window") if self.is_flash else None
        self.scale: float | None = kwargs.get("scaling")
        self.softcap: float | None = kwargs.get("softcap")

    def documents(self) -> Tensor | None:
        """Number of the sequence that each key is of, (1, K), where FlashAttention gets several packed into one row.

        Raises:
            ValueError: Queries are packed in another way than keys, as over a cache.
        """
        batch, _, num_rows, _ = self.q_BHND.shape
        num_keys = self.k_BMKD.shape[2]
        if not self.is_flash or self.mask is not None or (batch != 1 and self._starts is None):
            return None
        if batch != 1:
            raise ValueError(
                f"sequences packed by `cu_seq_lens_q` into {batch} rows cannot be observed or steered; "
                "join them in one row."
            )
        if self._starts is not None:
            queries, keys = self._starts
            is_start = torch.zeros(num_keys + 1, dtype=torch.long, device=self.k_BMKD.device)
            is_start[keys.long()] = 1
            is_same = queries is keys or torch.equal(queries, keys)
        else:
            positions = self._position_ids
            if positions is None or positions.dim() != 2 or num_rows == 1 or not bool((positions.diff() != 1).any()):
                return None
            is_start = (positions[0] == positions.min()).long()
            is_same = len(is_start) == num_keys
        if num_rows != num_keys or not is_same:
            raise ValueError(
                f"packed sequences of {num_rows} rows over {num_keys} keys cannot be observed or steered under "
                "FlashAttention, expected rows and keys to be the same tokens; pad them where there is a cache."
            )
        return is_start[:num_keys].cumsum(0)[None]

    def change_of(self, rows: Selection) -> Change | None:
        """What steering does to the logits of the given rows."""
        return None if self.steering is None else self.steering.change_of(self, rows)


def install(decoder: PreTrainedModel) -> None:
    """Point a text decoder at the wrapper of the implementation that it uses; nothing else changes.

    Raises:
        ValueError: The decoder's eager attention function cannot be found.
    """
    base = decoder.config._attn_implementation or "eager"
    if base.startswith(PREFIX):
        return
    if base == "eager":
        for module in decoder.modules():
            if hasattr(module, "layer_idx") and "Attention" in type(module).__name__:
                _eager_function(module)
    AttentionInterface.register(PREFIX + base, _wrapper(base))
    # Without its own mask function a name gets no mask at all, and rows would see other keys than before.
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    decoder.config._attn_implementation = PREFIX + base


def _wrapper(base: str) -> AttentionFunction:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        watch = kwargs.pop(WATCH, None)
        if watch is not None:
            return _watched(base, watch, module, query, key, value, attention_mask, kwargs)
        with _own_name(module, base):
            return _base_function(module, base)(module, query, key, value, attention_mask, **kwargs)

    return attention


@torch.compiler.disable
def _watched(
    base: str,
    watch: Watch,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """One layer's call under a watch. In a compiled layer this is all that runs eagerly."""
    observers = [observer for observer in watch.observers if observer.wants(module)]
    steerings = [steering for steering in watch.steerings if steering.wants(module)]
    function = _base_function(module, base)
    if len(steerings) > 1:
        raise ValueError(
            f"layer {module.layer_idx} is steered by {len(steerings)} contexts; give each layers of its own."
        )

    def run(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return function(module, query, key, value, attention_mask, **kwargs)

    with _own_name(module, base):
        if not observers and not steerings:
            return run(query, key, value, **kwargs)
        call = AttentionCall(base, module, query, key, attention_mask, kwargs, steerings[0] if steerings else None)
        if steerings:
            for observer in observers:
                observer.observe(call, None)
            return steerings[0].attend(call, value, run, kwargs)
        is_flex = base == "flex_attention"
        groups = [None if is_flex else observer.many_groups(call) for observer in observers]
        wanted = [each for each in groups if each is not None]
        overheard = FlexCalls() if is_flex else FusedCalls(torch.cat(wanted, dim=-1) if wanted else None)
        with overheard:
            result = run(query, key, value, **kwargs)
        # Flex caps logits, SDPA does not.
        told = overheard.of(query, key, call.scale) if is_flex or call.softcap is None else None
        sizes = [0 if each is None else each.shape[-1] for each in groups]
        parts = [None] * len(observers) if told is None else told.split(sizes)
        for observer, part in zip(observers, parts, strict=True):
            observer.observe(call, part)
        return result


@contextmanager
def _own_name(module: nn.Module, base: str) -> Iterator[None]:
    """Let the base find its own name in the config: FlashAttention's functions load their kernel by it."""
    config: Any = getattr(module, "config", None)
    if config is None or base in ("eager", "sdpa", "flex_attention"):
        yield
        return
    config._attn_implementation = base
    try:
        yield
    finally:
        config._attn_implementation = PREFIX + base


def _base_function(module: nn.Module, base: str) -> AttentionFunction:
    if base == "eager":
        return _eager_function(module)
    # A modeling file may keep a registry of its own, with its own sdpa.
    registry = _from_modeling_file(module, "ALL_ATTENTION_FUNCTIONS") or ALL_ATTENTION_FUNCTIONS
    function: AttentionFunction = registry[base]
    return function


def _eager_function(module: nn.Module) -> AttentionFunction:
    function: AttentionFunction | None
    function = _from_modeling_file(module, "eager_attention_forward")
    if function is None:
        raise ValueError(
            f"{type(module).__name__} has no eager_attention_forward in its modeling file, so its attention "
            'cannot be observed; load the model with attn_implementation="sdpa".'
        )
    return function


def _from_modeling_file(module: nn.Module, name: str) -> Any:
    # Along the bases, because FSDP2 and others put a class of their own in front of the model's.
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found
    return None
