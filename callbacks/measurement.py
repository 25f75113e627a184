"""What one validation measured: a row a sample, sums of maps and shares, and their merger over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avar_lightning.roles import Role
from avar_lightning.vas import REDUCTIONS, vas_map, visual_attention_score

KEYS = (Role.IMAGE, Role.SYSTEM, Role.USER, Role.RESPONSE)
"""Roles whose share of attention is measured; image and system first, as VAS needs them."""

T = TypeVar("T")
QUERIES = {"user": Role.USER, "response": Role.RESPONSE}
"""Query sets by name."""


@dataclass
class NanMean:
    """Mean of arrays, element by element, over those additions in which the element was finite."""

    total: NDArray[np.float64] | None = None
    count: NDArray[np.float64] | None = None

    def add(self, total: NDArray[np.float64], count: NDArray[np.float64] | None = None) -> None:
        """Add one array, or with `count` the sums of another mean."""
        if count is None:
            count = np.isfinite(total).astype(np.float64)
            total = np.where(np.isfinite(total), total, 0.0)
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count

    def value(self) -> NDArray[np.float64] | None:
        """Give the mean, NaN where nothing was finite, None where nothing was added."""
        if self.total is None or self.count is None:
            return None
        return np.divide(self.total, self.count, out=np.full_like(self.total, np.nan), where=self.count > 0)


@dataclass
class Measurement:
    """VAS of the samples of one validation, seen by one process or, after `merge`, by all.

    Attributes:
        queries: names of the query sets that are measured, of `QUERIES`.
        batches: number of measured batches.
        unmatched: number of watched batches in which no forward over the batch's tokens happened.
        layers: number of each measured layer.
        rows: for each sample `id` and, for each query set, its score in every reduction, NaN where undefined.
        maps: for each query set the mean (L, H) map.
        shares: for each query set the mean (L, len(KEYS)) mass on each role, over samples with an image.
    """

    queries: tuple[str, ...]
    batches: int = 0
    unmatched: int = 0
    layers: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    maps: dict[str, NanMean] = field(default_factory=dict)
    shares: dict[str, NanMean] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maps = self.maps or {name: NanMean() for name in self.queries}
        self.shares = self.shares or {name: NanMean() for name in self.queries}

    @torch.no_grad()
    def update(self, mass_LBHNG: Tensor, role_ids: Tensor, ids: Sequence[Any], *, layers: Sequence[int]) -> None:
        """Add one batch.

        Args:
            mass_LBHNG: float32, attention of every query row on the roles of `KEYS`.
            role_ids: (B, N) roles.
            ids: an identifier a sample, or None.
            layers: number of each layer.
        """
        self.batches += 1
        self.layers = list(layers)
        role_ids = role_ids.to(mass_LBHNG.device)
        for index, identifier in enumerate(ids):
            if not role_ids[index].any():  # only fills up another process's batch
                continue
            row: dict[str, Any] = {"id": identifier}
            has_image = bool((role_ids[index] == Role.IMAGE).any())
            for name in self.queries:
                row[name] = self._add_sample(name, mass_LBHNG[:, index, :, role_ids[index] == QUERIES[name]], has_image)
            self.rows.append(row)

    def _add_sample(self, name: str, mass_LHQG: Tensor, has_image: bool) -> dict[str, float]:
        """Add the query rows of one sample; gives its score in every reduction."""
        image, system = mass_LHQG[:, None, ..., 0], mass_LHQG[:, None, ..., 1]
        everyone = torch.ones(1, mass_LHQG.shape[2], dtype=torch.bool, device=mass_LHQG.device)
        self.maps[name].add(_numpy(vas_map(image, system, everyone)))
        if has_image and mass_LHQG.shape[2]:
            self.shares[name].add(_numpy(mass_LHQG.double().mean(dim=(1, 2))))
        return {
            reduction: float(visual_attention_score(image, system, everyone, reduction=reduction))
            for reduction in REDUCTIONS
        }

    def mean(self, query: str, reduction: str) -> float:
        """Give the mean score over the samples where it is defined, NaN where there are none."""
        values = [row[query][reduction] for row in self.rows if math.isfinite(row[query][reduction])]
        return math.fsum(values) / len(values) if values else math.nan

    def attention_shares(self, query: str) -> dict[str, NDArray[np.float64]]:
        """Give the mean attention (L,) of the query set on each role; empty where no sample has an image."""
        value = self.shares[query].value()
        return {} if value is None else {key.name.lower(): value[:, column] for column, key in enumerate(KEYS)}

    def report(self, query: str) -> dict[str, Any]:
        """Give all that is known of one query set, as JSON types with null for undefined."""
        map_LH = self.maps[query].value()
        return {
            "num_scored": sum(math.isfinite(row[query][REDUCTIONS[0]]) for row in self.rows),
            **{reduction: self.mean(query, reduction) for reduction in REDUCTIONS},
            "map": None if map_LH is None else map_LH.tolist(),
            "attention_shares": {role: share.tolist() for role, share in self.attention_shares(query).items()},
        }


def merge(parts: Iterable[Measurement]) -> Measurement:
    """Join what several processes measured, in the order of their ranks."""
    parts = list(parts)
    joined = Measurement(parts[0].queries)
    for part in parts:
        joined.batches += part.batches
        joined.unmatched += part.unmatched
        joined.layers = joined.layers or part.layers
        joined.rows += part.rows
        for mine, theirs in ((joined.maps, part.maps), (joined.shares, part.shares)):
            for name, mean in theirs.items():
                if mean.total is not None:
                    mine[name].add(mean.total, mean.count)
    return joined


def gather(mine: T) -> list[T]:
    """What each process has, in the order of their ranks; a collective call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def _numpy(values: Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()
