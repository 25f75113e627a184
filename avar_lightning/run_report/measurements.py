"""Measurements of VASCallback, read back from `vas/step_*.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUERIES = ("user", "response")
REDUCTIONS = ("mean_of_ratios", "ratio_of_means", "share", "median")
SAMPLES = '\n "samples": ['
"""Where the rows of samples begin in a file; what a report shows of every step stands before."""


@dataclass(frozen=True)
class Measured:
    """One file.

    Attributes:
        metrics: Every `val/*` metric.
        scores: By query set and reduction.
        layers: Number of each layer.
        maps: By query set (L, H), where they were asked for.
        shares: By query set and role (L,), likewise.
    """

    path: Path
    step: int
    baseline: bool
    metrics: dict[str, float]
    scores: dict[str, dict[str, float]]
    layers: list[int]
    model: str = ""
    num_samples: int = 0
    maps: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    shares: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)

    @property
    def when(self) -> str:
        """When it was measured, in words."""
        return "before training" if self.baseline else f"step {self.step}"


def read_measured(path: Path, *, maps: bool = True) -> Measured:
    """Read a file up to the rows of its samples.

    Raises:
        ValueError: It is none of VASCallback, or broken off.
    """
    try:
        found = _head(path)
        own = {query: found[query] for query in QUERIES if found.get(query)}
        if not own:
            raise KeyError("user or response")
        layers = [int(layer) for layer in found["layers"]]
        return Measured(
            path,
            step=int(found["step"]),
            baseline=bool(found.get("baseline")),
            metrics={str(name): number(value) for name, value in mapping(found.get("metrics")).items()},
            scores={query: {name: number(of.get(name)) for name in REDUCTIONS} for query, of in own.items()},
            layers=layers,
            model=str(found.get("model", "")),
            num_samples=int(found.get("num_samples", 0)),
            maps={query: _array(of["map"], 2, len(layers)) for query, of in own.items() if maps and of.get("map")},
            shares={
                query: {role: _array(share, 1, len(layers)) for role, share in of["attention_shares"].items()}
                for query, of in own.items()
                if maps and {"system", "user", "image"} <= set(of.get("attention_shares") or ())
            },
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path.name} cannot be read: {what}") from error


def read_grids(measured: Measured) -> list[tuple[Any, NDArray[np.float64]]]:
    """Id, and attention on image tokens (rows, columns), of each sample in `overlays`; the whole file is read.

    Raises:
        ValueError: They cannot be read.
    """
    try:
        found = json.loads(measured.path.read_text()).get("overlays") or []
        return [(overlay["id"], _array(overlay["grid"], 2, None)) for overlay in found]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"the overlays of {measured.path.name} cannot be read ({error})") from error


def _head(path: Path) -> dict[str, Any]:
    text = ""
    with path.open() as file:
        while chunk := file.read(1 << 17):
            before = max(0, len(text) - len(SAMPLES))
            text += chunk
            if (end := text.find(SAMPLES, before)) >= 0:
                text = text[:end].rstrip().removesuffix(",") + "}"
                break
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, found {type(found).__name__}")
    return found


def _array(values: Any, dimensions: int, rows: int | None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)  # None, for undefined, becomes NaN
    if array.ndim != dimensions or rows not in (None, len(array)):
        raise ValueError(f"an array has shape {array.shape}, expected {dimensions} dimensions of {rows} rows")
    return array


def by_step(paths: Iterable[Path]) -> list[Path]:
    """Files whose names end in a step, in the order of the numbers.

    >>> [path.name for path in by_step([Path("step_10.json"), Path("step_2.json")])]
    ['step_2.json', 'step_10.json']
    """
    return sorted(paths, key=lambda path: (int((re.findall(r"\d+", path.stem) or ["0"])[-1]), path.name))


def number(value: Any) -> float:
    """A number of a JSON file or a table, NaN for null, an empty cell and everything else.

    >>> number(None), number("0.5"), number("")
    (nan, 0.5, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def mapping(value: Any) -> dict[str, Any]:
    """A mapping of a file; nothing in place of what is none."""
    return value if isinstance(value, dict) else {}
