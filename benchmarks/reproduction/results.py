"""What the runs' own files say: measurements on the test split, by model and seed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from avar_lightning.files import whole_lines
from avar_lightning.processing import resolve_pretrained
from benchmarks.reproduction.differences import Interval, crossed, over_seeds, spread
from benchmarks.reproduction.recipes import Training, shipped_digest
from benchmarks.reproduction.testing import answers_path, held_out, result_path
from benchmarks.reproduction.training import is_finished
from benchmarks.trainings import run, threads_of

TOGETHER = 4
"""Models that a process measures, since it takes half as long to start as to measure one."""
Model = Training | str
"""A training, or the name of a model that ships."""
SHIPPED_TITLES = {"demo": "base", "demo_small": "small base"}


@dataclass(frozen=True)
class Figure:
    """One figure of a measurement: where it stands there, and how tables show it."""

    key: tuple[str, ...]
    factor: float = 1.0
    digits: int = 2

    def of(self, result: dict[str, Any]) -> float:
        """Its value, NaN where it is undefined."""
        value: Any = result
        for name in self.key:
            value = value[name]
        return float("nan") if value is None else float(value)


def percentage(*key: str) -> Figure:
    """A share that is shown in percent."""
    return Figure(key, factor=100.0, digits=1)


ACCURACY = percentage("accuracy")
VAS = Figure(("references", "response", "ratio_of_means"))
VAS_USER = Figure(("references", "user", "ratio_of_means"))
VAS_PUBLISHED = Figure(("references", "user", "mean_of_ratios"))
VAS_ANSWERS = Figure(("answers", "vas_ratio_of_means_response"))
SHARE = percentage("references", "response", "share")
LOSS = Figure(("reference_loss",), digits=3)
SYSTEM_MASS = Figure(("system_mass",))
NEED = percentage("need_of_picture")
DESCRIBES = percentage("describes")


def title_of(model: Model) -> str:
    """What tables call a model."""
    return SHIPPED_TITLES[model] if isinstance(model, str) else model.title


@dataclass
class Results:
    """Measurements of the models in `root`, for some seeds."""

    root: Path
    seeds: Sequence[int]

    def of(self, model: Model) -> dict[int, dict[str, Any]]:
        """The measurement of each seed that is finished; of a shipped model, seed 0's stands for all."""
        found = {}
        for seed, folder in self._folders(model).items():
            path = result_path(folder)
            if path.is_file():
                found[seed] = json.loads(path.read_text())
        return found

    def values(self, model: Model, figure: Figure) -> list[float]:
        """One figure of each."""
        return [figure.of(result) for result in self.of(model).values()]

    def row(self, model: Model, *figures: Figure) -> list[str]:
        """Cells of a table: the number of seeds, then mean ± standard deviation of each figure."""
        found = list(self.of(model).values())
        cells = [spread([f.of(each) for each in found], factor=f.factor, digits=f.digits) for f in figures]
        return [str(len(found)), *cells]

    def drawn(self, name: str, model: Model) -> dict[str, Any]:
        """A row of `plot_results`."""
        figures = {"accuracy": ACCURACY, "vas": VAS, "share": SHARE}
        return {"name": name} | {key: self.values(model, figure) for key, figure in figures.items()}

    def finished(self, models: Iterable[Model]) -> list[Model]:
        """Those with a measurement."""
        return [model for model in models if self.of(model)]

    def accuracy_difference(self, model: Model, other: Model) -> Interval | None:
        """How much more often `model` is right than `other`; None where no seed has both."""
        pairs = [(self._right(a), self._right(b)) for a, b in self._pairs(model, other)]
        return crossed([b for _, b in pairs], [a for a, _ in pairs]) if pairs else None

    def difference(self, model: Model, other: Model, figure: Figure, *, relative: bool = False) -> Interval:
        """How much more `model` has than `other` of another figure, over seeds; or what share more."""
        ours, theirs = self.of(model), self.of(other)
        shared = [(figure.of(ours[a]), figure.of(theirs[b])) for a, b in self._seeds(model, other)]
        return over_seeds([a / b - 1 if relative else a - b for a, b in shared])

    def measure(self, models: Iterable[Model], *, jobs: int) -> None:
        """Measure those that are trained and not measured, several at a time."""
        folders = [folder for model in dict.fromkeys(models) for folder in self._folders(model).values()]
        todo = [folder for folder in folders if is_finished(folder.parent) and not result_path(folder).is_file()]
        if todo:
            held_out().prepare_data()  # once, before processes would race for it
        parts = [todo[start : start + TOGETHER] for start in range(0, len(todo), TOGETHER)]
        with tqdm(total=len(todo), desc="tests", disable=not todo) as bar, ThreadPoolExecutor(jobs) as pool:

            def one(index: int) -> None:
                log = self.root / "logs" / f"testing_{index}.log"
                command = ["-m", "benchmarks.reproduction.testing", *map(str, parts[index])]
                run(command, log, threads=threads_of(jobs))
                bar.update(len(parts[index]))

            list(pool.map(one, range(len(parts))))

    def _folders(self, model: Model) -> dict[int, Path]:
        if isinstance(model, Training):
            return {seed: model.folder(self.root, seed) / "hf" for seed in self.seeds}
        source = Path(resolve_pretrained(model))
        folder = self.root / "shipped" / f"{model}_{shipped_digest(model)[:8]}"
        if not folder.is_dir():
            half = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.copytree(source, half / "hf")
            half.rename(folder)
        return {0: folder / "hf"}

    def _seeds(self, model: Model, other: Model) -> list[tuple[int, int]]:
        """Seeds of two models that belong together; a shipped model belongs to all."""
        ours, theirs = self.of(model), self.of(other)
        if isinstance(model, str):
            return [(0, seed) for seed in theirs if ours]
        if isinstance(other, str):
            return [(seed, 0) for seed in ours if theirs]
        return [(seed, seed) for seed in ours if seed in theirs]

    def _pairs(self, model: Model, other: Model) -> list[tuple[Path, Path]]:
        ours, theirs = self._folders(model), self._folders(other)
        return [(ours[a], theirs[b]) for a, b in self._seeds(model, other)]

    def _right(self, folder: Path) -> NDArray[np.float64]:
        """Whether each question was answered right (questions,)."""
        rows = [json.loads(line) for line in whole_lines(answers_path(folder))]
        return np.array([row["accuracy"] for row in sorted(rows, key=lambda row: row["id"])], float)
