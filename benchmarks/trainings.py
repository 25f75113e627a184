"""Trainings that a table is made of: each a `train.py` in a process of its own, kept when finished."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


SFT_SOURCES = [
    "configs/avar_sft.yaml",
    "avar_lightning/data/demo.py",
    "avar_lightning/data/demo_base/model.safetensors",
]
"""What a cold start hangs on."""


def table_options(description: str, *, name: str, arms: Iterable[str], steps: int) -> argparse.Namespace:
    """The command line of a table: seeds, steps, arms, jobs, and where things go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help="updates of a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; they share the cores")
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / name, help="where the runs go")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="where table and picture go")
    parser.add_argument("--collect", action="store_true", help="train nothing; tabulate the runs that are finished")
    parser.add_argument("extra", nargs="*", help="further overrides for every run, after --")
    return parser.parse_args()


def run_folder(folder: Path, name: str, seed: int, sources: list[str], options: list[str]) -> Path:
    """Where a run lies; changed sources (recipe, world, starting model) or options have another folder."""
    recipe = hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in sources))
    recipe.update(repr(options).encode())
    return folder / name / f"seed_{seed}_{recipe.hexdigest()[:8]}"


def fit_command(place: Path, config: str, seed: int, options: Sequence[str]) -> list[str]:
    """`train.py fit` with a seed into a folder that stands two levels under its root."""
    return [
        *("train.py", "fit", "--config", config, f"--seed_everything={seed}"),
        f"--data.init_args.seed={seed}",
        f"--trainer.logger.init_args.save_dir={place.parents[1]}",
        f"--trainer.logger.init_args.name={place.parent.name}",
        f"--trainer.logger.init_args.version={place.name}",
        *options,
    ]


def threads_of(jobs: int) -> int:
    """Of each of several processes that share the cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


def run(command: Sequence[str], log: Path, *, threads: int) -> None:
    """Run Python with a command line, in the root of the project; what it says goes to a log.

    Raises:
        RuntimeError: It ended with another status than 0; the message names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … ended with status {done.returncode}; read {log}.")


def train(place: Path, config: str, seed: int, options: Sequence[str], *, threads: int) -> None:
    """Run `train.py fit` with a seed into `place`, unless it is done there.

    Raises:
        RuntimeError: It failed; the message names its log.
    """
    if not (place / "summary.json").is_file():
        log = place.parents[1] / f"{place.parent.name}_{place.name}.log"
        run(fit_command(place, config, seed, options), log, threads=threads)
