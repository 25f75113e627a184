"""Reproduce the paper's findings in miniature: train, measure on the test split, write docs/reproduction.md.

    python benchmarks/reproduction [PART…] [--seeds 0 1 2 3 4] [--jobs 2]

Parts are relation, lazy, steering, ablation and beyond; all of them when none is named. What is finished is kept, so an
interrupted reproduction goes on where it stopped, and trainings that parts share are run once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import ablation
import beyond
import lazy
import page
import relation
import steering
from recipes import ROOT, Training
from results import Results
from training import train_all

PARTS = {"relation": relation, "lazy": lazy, "steering": steering, "ablation": ablation, "beyond": beyond}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; they share the cores")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "reproduction", help="where the runs go")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where page and pictures go")
    parser.add_argument("--collect", action="store_true", help="train and measure nothing; write what is there")
    options = parser.parse_args()
    results = Results(options.folder.resolve(), options.seeds)
    parts = {name: part for name, part in PARTS.items() if name in options.parts or not options.parts}
    if not options.collect:
        models = [model for part in parts.values() for model in part.NEEDS]
        trainings = [model for model in models if isinstance(model, Training)]
        for seed in options.seeds:  # one after the other, so that an early end leaves whole seeds
            train_all(trainings, seed, results.root, jobs=options.jobs)
            mine = Results(results.root, [seed])
            mine.measure(models, jobs=options.jobs)
            if "steering" in parts:
                steering.measure(mine, jobs=options.jobs)
    page.write(results, parts, options.output)


if __name__ == "__main__":
    main()
