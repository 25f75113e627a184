"""Shards for Lightning: one data module for training, validation, test and prediction."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import ProcessorMixin

from avar_lightning.data.collate import Collator, PromptRows, SampleEncoder
from avar_lightning.data.fetching import DEFAULT_FOLDER, ShardCache
from avar_lightning.data.loader import ShardLoader, Time
from avar_lightning.data.reader import ShardReader
from avar_lightning.data.shards import find_shards
from avar_lightning.processing import load_processor, padding_id

ShardSpec = str | Sequence[str]


class ShardDataModule(L.LightningDataModule):
    """Batches from WebDataset shards.

    Every rank and worker reads only its own share while it trains; nothing is preprocessed ahead. The order
    depends on ``seed`` and the epoch alone, not on who reads, and a checkpoint taken in the middle of an epoch
    resumes with the next sample.

    Args:
        train: Shards to train on: a .tar, a folder, a glob, a {000..009} pattern, a manifest.json, a pipe:
            command, a URL, or a list of these.
        val: Shards to validate on, written in the same ways.
        test: Shards to test on.
        predict: Shards to predict on.
        processor: The model's processor: "demo", a folder or a hub name (or a processor object).
        batch_size: Training samples a batch and rank.
        val_batch_size: The same for validation, test and prediction; batch_size when unset.
        num_workers: Reading processes a rank; 0 reads in the training process.
        max_length: Most tokens of a sample, image tokens included; longer samples are dropped whole,
            counted and reported.
        shuffle_window: Neighbouring training samples that are permuted, beside the order of shards.
        length_group: Neighbouring training samples, over all processes, that are sorted by length to make batches with
            little padding, some dozens of batches; 0 turns it off.
        seed: Of the training order.
        max_bad_fraction: Share of corrupt samples above which the run stops; below it they are skipped,
            counted and logged.
        drop_last: Leave out the last training batch when it would be short.
        min_pixels: Fewest pixels of a resized image (Qwen-VL families).
        max_pixels: Most pixels of a resized image, which bounds its tokens (Qwen-VL families).
        keep_images: Put the images themselves into evaluation batches, for overlays.
        cache_encoded: Keep encoded samples in each worker's memory; for sets that are small enough.
        cache_folder: Where shards behind URLs and pipes are kept once they have been fetched, on a local disk.
        cache_gigabytes: Most that they may take there; no limit when unset. The shards of two shuffle windows should
            find room.
        train_prompts: Training batches are prompts to answer (`PromptRows`), as GRPOModule needs them; samples need no
            response, and one that is there is left out.
    """

    def __init__(
        self,
        train: ShardSpec | None = None,
        val: ShardSpec | None = None,
        test: ShardSpec | None = None,
        predict: ShardSpec | None = None,
        processor: str | ProcessorMixin = "demo",
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 1,
        max_length: int | None = None,
        shuffle_window: int = 10_000,
        length_group: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.05,
        drop_last: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        keep_images: bool = False,
        cache_encoded: bool = False,
        cache_folder: str = DEFAULT_FOLDER,
        cache_gigabytes: float | None = None,
        train_prompts: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_length", max_length, 1),
            ("shuffle_window", shuffle_window, 0),
            ("length_group", length_group, 0),
            ("cache_gigabytes", cache_gigabytes, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {max_bad_fraction}; expected a share in [0, 1]")
        self.specs = {"train": train, "val": val, "test": test, "predict": predict}
        self.processor_source = processor
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.max_length = max_length
        self.shuffle_window = shuffle_window
        self.length_group = length_group
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.drop_last = drop_last
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.keep_images = keep_images
        self.cache_encoded = cache_encoded
        self.cache = ShardCache(cache_folder, limit=None if cache_gigabytes is None else cache_gigabytes * 1e9)
        self.train_prompts = train_prompts
        self._processor: ProcessorMixin | None = None
        self._loaders: dict[str, ShardLoader] = {}
        self.counts: dict[str, dict[str, int]] = {}
        """Samples ``seen``, ``bad`` and ``too_long`` so far on this rank, by stage."""

    @property
    def processor(self) -> ProcessorMixin:
        """The processor, loaded on first use."""
        if self._processor is None:
            source = self.processor_source
            self._processor = (
                load_processor(source, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
                if isinstance(source, str)
                else source
            )
        return self._processor

    def train_dataloader(self) -> ShardLoader:
        """Shuffled batches to learn from (of prompts alone under `train_prompts`), equally many on every rank."""
        return self._loader("train")

    def val_dataloader(self) -> ShardLoader | list[Any]:
        """Every validation sample once, in order, with its prompt; nothing where ``val`` is unset."""
        return self._loader("val") if self.specs["val"] is not None else []

    def test_dataloader(self) -> ShardLoader:
        """Every test sample once, in order, with its prompt."""
        return self._loader("test")

    def predict_dataloader(self) -> ShardLoader:
        """Every sample to predict once, in order, with its prompt."""
        return self._loader("predict")

    def teardown(self, stage: str) -> None:
        """Say what was left out, and let go of the loaders: the next trainer may have other ranks."""
        for name in self._loaders:
            counts = self.counts[name]
            if counts["bad"] or counts["too_long"]:
                rank_zero_warn(
                    f"{name} data: of {counts['seen']} samples read in this process {counts['bad']} were bad "
                    f"and skipped, {counts['too_long']} longer than max_length={self.max_length} and dropped"
                )
            else:
                rank_zero_info(f"{name} data: {counts['seen']} samples read in this process, none left out")
            self._loaders[name].close()
        self._loaders = {}

    def _loader(self, stage: str) -> ShardLoader:
        spec = self.specs[stage]
        if spec is None:
            raise ValueError(f"no {stage} shards: expected data.{stage} to name them; set --data.init_args.{stage}")
        if stage not in self._loaders:
            train = stage == "train"
            rank, world_size = self._place()
            prompts = train and self.train_prompts
            encoder = SampleEncoder(
                self.processor,
                max_length=self.max_length,
                with_prompt=not train,
                prompt_only=prompts,
                keep_images=prompts or (self.keep_images and not train),
            )
            filler = encoder.filler if world_size > 1 else None
            reader = ShardReader(
                find_shards(spec),
                encoder,
                PromptRows() if prompts else Collator(padding_id(self.processor), filler=filler),
                batch_size=self.batch_size if train else self.val_batch_size,
                train=train,
                rank=rank,
                world_size=world_size,
                seed=self.seed,
                shuffle_window=self.shuffle_window,
                length_group=self.length_group,
                drop_last=self.drop_last,
                cache_encoded=self.cache_encoded,
                cache=self.cache,
            )
            self._loaders[stage] = ShardLoader(
                reader,
                clock=_clock(self.trainer) if train else None,
                num_workers=self.num_workers,
                max_bad_fraction=self.max_bad_fraction,
                pin_memory=torch.cuda.is_available(),
                name=stage,
            )
            self.counts[stage] = self._loaders[stage].counts
        return self._loaders[stage]

    def _place(self) -> tuple[int, int]:
        """Rank and number of the processes that read different data (not all, under tensor parallelism)."""
        if self.trainer is not None:
            place = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
            return (place["rank"], place["num_replicas"]) if place else (0, 1)
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _clock(trainer: L.Trainer | None) -> Callable[[], Time | None]:
    """Reads a trainer's counters, which are right also when a batch is fetched ahead or a step is broken off."""
    known = weakref.ref(trainer) if trainer is not None else lambda: None

    def now() -> Time | None:
        trainer = known()
        if trainer is None or trainer.state.fn != "fit":
            return None
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current

        def recount(number: int) -> None:
            shift = number - batches.processed
            for name in ("ready", "started", "processed", "completed"):  # their differences say where in a step it was
                setattr(batches, name, getattr(batches, name) + shift)

        limit, count = trainer.limit_train_batches, trainer.num_training_batches
        return Time(batches.processed, min(count, limit) if isinstance(limit, int) else count, recount)

    return now
