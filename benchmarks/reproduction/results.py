"""What the runs' own files say: measurements on the test split by training and seed, and differences with intervals."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import Training
from testing import result_path
from tqdm import tqdm
from training import is_finished, run, threads_of

from avar_lightning.processing import resolve_pretrained

TOGETHER = 4
"""Models that a process measures, since it takes half as long to start as to measure one."""
Model = Training | str
"""A training, or the name of a model that ships."""
# Student's t at 97.5 % by degrees of freedom, for intervals of means over few seeds.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# Of a measurement: what is read, and how it is called in tables, with the factor to the unit that is shown.
ACCURACY = ("accuracy",)
VAS = ("references", "response", "ratio_of_means")
VAS_USER = ("references", "user", "ratio_of_means")
VAS_PUBLISHED = ("references", "user", "mean_of_ratios")
VAS_ANSWERS = ("answers", "vas_ratio_of_means_response")
SHARE = ("references", "response", "share")
LOSS = ("reference_loss",)
GAIN = ("picture_gain",)


@dataclass
class Results:
    """Measurements of the models in `root`, for some seeds."""

    root: Path
    seeds: Sequence[int]

    def of(self, model: Model) -> list[dict[str, Any]]:
        """One measurement a finished seed; of a shipped model, one."""
        paths = [result_path(folder) for folder in self._folders(model)]
        return [json.loads(path.read_text()) for path in paths if path.is_file()]

    def values(self, model: Model, key: Sequence[str]) -> list[float]:
        """One figure of each."""
        return [_at(result, key) for result in self.of(model)]

    def by_seed(self, model: Model, key: Sequence[str]) -> dict[int, float]:
        """One figure of each finished seed; a shipped model is the same for all."""
        if isinstance(model, str):
            return dict.fromkeys(self.seeds, _first(self, model, key))
        paths = {seed: result_path(model.folder(self.root, seed) / "hf") for seed in self.seeds}
        return {seed: _at(json.loads(path.read_text()), key) for seed, path in paths.items() if path.is_file()}

    def difference(self, model: Model, other: Model, key: Sequence[str]) -> Interval:
        """How much more `model` has than `other`: seeds are pairs, and a shipped model is one for all of them."""
        mine, theirs = (self.by_seed(each, key) for each in (model, other))
        return interval([mine[seed] - theirs[seed] for seed in mine if seed in theirs])

    def measure(self, models: Iterable[Model], *, jobs: int) -> None:
        """Measure those that are trained and not measured, several at a time."""
        folders = [folder for model in dict.fromkeys(models) for folder in self._folders(model)]
        todo = [folder for folder in folders if is_finished(folder.parent) and not result_path(folder).is_file()]
        script = str(Path(__file__).with_name("testing.py"))
        parts = [todo[start : start + TOGETHER] for start in range(0, len(todo), TOGETHER)]
        with tqdm(total=len(todo), desc="tests", disable=not todo) as bar, ThreadPoolExecutor(jobs) as pool:

            def one(index: int) -> None:
                log = self.root / "logs" / f"testing_{index}.log"
                run([sys.executable, script, *map(str, parts[index])], log, threads=threads_of(jobs))
                bar.update(len(parts[index]))

            list(pool.map(one, range(len(parts))))

    def _folders(self, model: Model) -> list[Path]:
        if isinstance(model, Training):
            return [model.folder(self.root, seed) / "hf" for seed in self.seeds]
        folder = self.root / "shipped" / model / "hf"
        if not folder.is_dir():
            shutil.copytree(resolve_pretrained(model), folder)
        return [folder]


def _first(results: Results, model: str, key: Sequence[str]) -> float:
    return next(iter(results.values(model, key)), math.nan)


def _at(result: dict[str, Any], key: Sequence[str]) -> float:
    value: Any = result
    for name in key:
        value = value[name]
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Interval:
    """Mean of some numbers, one a seed, with Student's 95 % interval; NaN where there are fewer than two."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __format__(self, spec: str) -> str:
        """`+1.2 (-0.3 to +2.7)`, with a star where 0 is left out."""
        if not math.isfinite(self.low):
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} ({self.low:{spec}} to {self.high:{spec}}){' *' if self.significant else ''}"

    def scaled(self, factor: float) -> Interval:
        """In another unit."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.n)


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean."""
    count = len(values)
    if count < 2:
        return Interval(values[0] if values else math.nan, math.nan, math.nan, count)
    half = STUDENT.get(count - 1, 1.96) * statistics.stdev(values) / math.sqrt(count)
    mean = statistics.fmean(values)
    return Interval(mean, mean - half, mean + half, count)


def spread(values: Sequence[float], *, factor: float = 1.0, digits: int = 1) -> str:
    """Mean ± sample standard deviation, as tables show them."""
    if not values:
        return "–"
    scaled = [factor * value for value in values]
    style = f".{digits}f" if abs(statistics.fmean(scaled)) < 10_000 else ".1e"
    mean = f"{statistics.fmean(scaled):{style}}"
    return f"{mean} ± {statistics.stdev(scaled):{style}}" if len(scaled) > 1 else mean


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


Section = Callable[[Results, Path], str]
