"""What tests of the observed attention share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from avar_lightning.attention import attention_mass, observing


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Numbers of rows and keys of every call in which masses are computed beside the kernel."""
    calls: list[tuple[int, int]] = []

    def counted(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return attention_mass(q, k, *args, **kwargs)

    monkeypatch.setattr(observing, "attention_mass", counted)
    return calls
