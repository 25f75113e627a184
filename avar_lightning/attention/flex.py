"""FlexAttention's log-sum-exp, which is differentiable, before transformers rounds it to the dtype of the values."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from transformers.integrations import flex_attention as integration

from avar_lightning.attention.fused import Overheard, Told

WITHOUT_LSE = ("cpu",)
"""Devices where compiled FlexAttention has none."""


class FlexCalls(Overheard):
    """While active, FlexAttention runs as transformers calls it, and the log-sum-exps of this thread's calls are kept.

    What transformers calls is a name in its module, which stands for this object meanwhile. Calls of other threads pass
    through it; another thread's object waits.
    """

    _turn = threading.RLock()

    def __enter__(self) -> Self:
        self._turn.acquire()
        self._thread = threading.get_ident()
        self._theirs: Callable[..., Any] = integration.compile_friendly_flex_attention
        integration.compile_friendly_flex_attention = self._attend  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        integration.compile_friendly_flex_attention = self._theirs
        self._turn.release()

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, return_aux: Any, **others: Any
    ) -> Any:
        theirs = partial(self._theirs, query, key, value, scale=scale, **others)
        if threading.get_ident() != self._thread:
            return theirs(return_aux=return_aux)
        if query.device.type in WITHOUT_LSE:
            self.keep(None, query, key, scale)
            return theirs(return_aux=return_aux)
        out, aux = theirs(return_aux=(return_aux or AuxRequest())._replace(lse=True))
        self.keep(Told(aux.lse), query, key, scale)
        return out if return_aux is None else (out, aux)
