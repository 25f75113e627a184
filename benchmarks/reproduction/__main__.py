"""Reproduce the paper's findings in miniature: train, measure on the test split, write docs/reproduction.md.

    python -m benchmarks.reproduction [PART…] [--seeds 0 1 2 3 4] [--jobs 2]

Parts are world, relation, lazy, steering, ablation and beyond; all of them when none is named. What is finished is
kept, so an interrupted reproduction goes on where it stopped, and trainings that parts share are run once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from avar_lightning.data.publishing import alone
from benchmarks.reproduction import ablation, beyond, lazy, page, relation, steering, world
from benchmarks.reproduction.recipes import Training
from benchmarks.reproduction.results import Results
from benchmarks.reproduction.training import train_all
from benchmarks.trainings import ROOT

PARTS = {
    "world": world,
    "relation": relation,
    "lazy": lazy,
    "steering": steering,
    "ablation": ablation,
    "beyond": beyond,
}
MOST_JOBS = 8  # on a GPU that all of them share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    jobs = min(os.cpu_count() or 1, MOST_JOBS)
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time; they share the cores")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "reproduction", help="where the runs go")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where page and pictures go")
    parser.add_argument("--collect", action="store_true", help="train and measure nothing; write what is there")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    parts = {name: part for name, part in PARTS.items() if name in options.parts or not options.parts}
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(options.folder.resolve(), options.seeds)
    if not options.collect:
        with alone(results.root):
            for seed in options.seeds:  # one after the other, so that an early end leaves whole seeds
                _make(parts, seed, results.root, jobs=options.jobs)
    page.write(results, parts, options.output)


def _make(parts: dict[str, object], seed: int, root: Path, *, jobs: int) -> None:
    models = [model for part in parts.values() for model in part.NEEDS]  # type: ignore[attr-defined]
    train_all([model for model in models if isinstance(model, Training)], seed, root, jobs=jobs)
    results = Results(root, [seed])
    results.measure(models, jobs=jobs)
    if "steering" in parts:
        steering.measure(results, jobs=jobs)


if __name__ == "__main__":
    main()
