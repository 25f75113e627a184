"""Run trainings, several at a time, each a `train.py fit` in a process of its own, and keep what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from avar_lightning.data import DemoDataModule
from benchmarks.reproduction.recipes import GRPO, Training, recipe_of
from benchmarks.trainings import fit_command, run, threads_of


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
            log = root / "logs" / f"{training.name}_{seed}.log"
            run(command_of(training, seed, root), log, threads=threads_of(jobs))
            bar.update()

        for depth in sorted({len(each.before()) for each in todo}):
            list(pool.map(one, [each for each in todo if len(each.before()) == depth]))


def is_finished(place: Path) -> bool:
    """Whether a run has come to its end, which is when it writes its model."""
    return (place / "hf" / "config.json").is_file()


def command_of(training: Training, seed: int, root: Path) -> list[str]:
    """What `train.py` is called with."""
    start = f"--model.init_args.vlm.pretrained={training.start_folder(root, seed)}"
    sampling = [f"--model.init_args.sampling.seed={seed}"] if training.config == GRPO else []
    return fit_command(training.folder(root, seed), training.config, seed, [start, *training.options, *sampling])


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
