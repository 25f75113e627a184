"""The demo world as a data module that writes its own shards on first use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from avar_lightning.data.datamodule import ShardDataModule
from avar_lightning.data.demo import TASKS, WORLD_VERSION, Stage, Style, Task, demo_samples, pretraining_samples
from avar_lightning.data.sample import Sample
from avar_lightning.data.shards import MANIFEST
from avar_lightning.data.writer import write_shards


class DemoDataModule(ShardDataModule):
    """Shards of the demo world, written where they are missing.

    Args:
        folder: Where the shards are kept, in one subfolder for each choice of the options below.
        style: How training responses are written; `see` and `read` are the stages of the base's pretraining. The
            reference responses of validation are `anchored` for `mixed`, `direct` for these stages.
        num_train: Training samples.
        num_val: Validation samples.
        num_test: Test samples, written when a test asks for them. Nothing that ships was chosen by them.
        train_tasks: Questions of the training samples; every kind when unset. Stages of pretraining have their own.
        train_hint_rate: Probability that the note in a training question is right.
        train_pictures: Whether training questions show their scene; if not, they describe it in words.
        val_hint_rate: Probability that the note in a validation or test question is right.
        world_seed: Of the samples; `seed` is that of their order.
        processor: Name or folder of the model whose processor encodes the samples, or a processor.
        batch_size: Samples a training batch and process.
        val_batch_size: Samples a validation batch; large, since answers are generated in it.
        cache_encoded: Keep encoded samples in memory (170 KB each): encoding costs more than a small model's step.
        **kwargs: Everything else that `ShardDataModule` takes.
    """

    def __init__(
        self,
        folder: str = "data/demo",
        style: Style | Stage = "anchored",
        num_train: int = 6000,
        num_val: int = 200,
        num_test: int = 400,
        train_tasks: list[Task] | None = None,
        train_hint_rate: float = 0.8,
        train_pictures: bool = True,
        val_hint_rate: float = 0.25,
        world_seed: int = 0,
        processor: Any = "demo",
        batch_size: int = 8,
        val_batch_size: int = 100,
        cache_encoded: bool = True,
        **kwargs: Any,
    ) -> None:
        root = Path(folder) / f"world-{WORLD_VERSION}"
        self.num_train, self.num_val, self.num_test, self.world_seed = num_train, num_val, num_test, world_seed
        self.style, self.train_pictures = style, train_pictures
        self.train_hint_rate, self.val_hint_rate = train_hint_rate, val_hint_rate
        self.train_tasks = tuple(train_tasks or TASKS)
        if unknown := set(self.train_tasks) - set(TASKS):
            raise ValueError(f"train_tasks has {sorted(unknown)}, expected some of {', '.join(TASKS)}.")
        kinds = "" if self.train_tasks == TASKS else f"-{'-'.join(self.train_tasks)}"
        kinds += "" if train_pictures else "-text"
        self.train_folder = root / f"train-{style}{kinds}-{num_train}-notes-{train_hint_rate}-seed-{world_seed}"
        reference: dict[Style | Stage, Style] = {"see": "direct", "read": "direct", "mixed": "anchored"}
        self.val_style: Style = reference.get(style, style)  # type: ignore[arg-type]
        held_out = f"{self.val_style}-{{}}-notes-{val_hint_rate}-seed-{world_seed}"
        self.val_folder = root / f"val-{held_out.format(num_val)}"
        self.test_folder = root / f"test-{held_out.format(num_test)}"
        super().__init__(
            train=str(self.train_folder),
            val=str(self.val_folder),
            test=str(self.test_folder),
            predict=str(self.val_folder),
            processor=processor,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            cache_encoded=cache_encoded,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Write the shards that are not there and are needed now; without a Trainer, all. One process does it."""
        seed = self.world_seed
        train: Iterable[Sample]
        if self.style == "see" or self.style == "read":
            train = pretraining_samples(self.num_train, stage=self.style, seed=seed)
        else:
            train = demo_samples(
                self.num_train,
                style=self.style,
                hint_rate=self.train_hint_rate,
                seed=seed,
                split="train",
                tasks=self.train_tasks,
                pictures=self.train_pictures,
            )
        val, test = (
            demo_samples(count, style=self.val_style, hint_rate=self.val_hint_rate, seed=seed, split=split)
            for split, count in (("val", self.num_val), ("test", self.num_test))
        )
        wanted = [(train, self.train_folder, self.num_train), (val, self.val_folder, self.num_val)]
        held_back = [(test, self.test_folder, self.num_test)]
        if self.trainer is None:
            wanted += held_back
        elif self.trainer.testing:
            wanted = held_back
        for samples, folder, count in wanted:
            if not (folder / MANIFEST).is_file():
                write_shards(samples, folder, overwrite=True, progress=True, total=count)
        super().prepare_data()
