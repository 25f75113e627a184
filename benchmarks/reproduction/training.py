"""Run trainings, several at a time, each a `train.py fit` in a process of its own, and keep what is finished."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from avar_lightning.data import DemoDataModule
from benchmarks.reproduction.recipes import GRPO, ROOT, Training, recipe_of


def train_all(trainings: Sequence[Training], seed: int, root: Path, *, jobs: int) -> None:
    """Run each training with a seed, those that others start from first.

    Raises:
        RuntimeError: One failed; the message names its log. What was finished is kept.
    """
    wanted = list(dict.fromkeys(each for training in trainings for each in training.before()))
    todo = [each for each in wanted if not is_finished(each.folder(root, seed))]
    _write_shards(todo)
    with (
        tqdm(total=len(todo), desc=f"trainings of seed {seed}", disable=not todo) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):

        def one(training: Training) -> None:
            train(training, seed, root, threads=threads_of(jobs))
            bar.update()

        for depth in sorted({len(each.before()) for each in todo}):
            list(pool.map(one, [each for each in todo if len(each.before()) == depth]))


def is_finished(place: Path) -> bool:
    """Whether a run has come to its end, which is when it writes its model."""
    return (place / "hf" / "config.json").is_file()


def threads_of(jobs: int) -> int:
    """Of each of several processes that share the cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


def command_of(training: Training, seed: int, root: Path) -> list[str]:
    """What `train.py` is called with."""
    place = training.folder(root, seed)
    command = [
        *("train.py", "fit", "--config", training.config, f"--seed_everything={seed}"),
        f"--data.init_args.seed={seed}",
        f"--model.init_args.vlm.pretrained={training.start_folder(root, seed)}",
        f"--trainer.logger.init_args.save_dir={root}",
        f"--trainer.logger.init_args.name={training.name}",
        f"--trainer.logger.init_args.version={place.name}",
        *training.options,
    ]
    return [*command, f"--model.init_args.sampling.seed={seed}"] if training.config == GRPO else command


def train(training: Training, seed: int, root: Path, *, threads: int) -> None:
    """Run one training; its output goes to a log beside it.

    Raises:
        RuntimeError: It failed.
    """
    log = root / "logs" / f"{training.name}_{seed}.log"
    run([sys.executable, *command_of(training, seed, root)], log, threads=threads)


def run(command: Sequence[str], log: Path, *, threads: int) -> None:
    """Run a command in the root of the project.

    Raises:
        RuntimeError: It ended with another status than 0; the message names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} … ended with status {done.returncode}; read {log}.")


def _write_shards(trainings: Sequence[Training]) -> None:
    """Once, before runs race for them."""
    for settings in {_data_settings(training) for training in trainings}:
        DemoDataModule(**dict(settings)).prepare_data()


def _data_settings(training: Training) -> tuple[tuple[str, Any], ...]:
    names = ("style", "train_hint_rate", "train_pictures")
    given = dict(recipe_of(training.config)["data"]["init_args"])
    for option in training.options:
        key, _, value = option.partition("=")
        if key.startswith("--data.init_args."):
            given[key.rpartition(".")[2]] = yaml.safe_load(value)
    return tuple((name, given[name]) for name in names if name in given)
