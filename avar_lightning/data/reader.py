"""Samples to batches: shuffle, decode, encode, group by length; and what happens to unusable samples.

In training such a sample is replaced by one from beyond the reader's own arc, so that no rank comes up
short and leaves the others waiting. In evaluation each sample is used once; only where a rank would make a
batch less than the others is a sample used again, with ``"repeated": True`` in its columns.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from avar_lightning.data.collate import Encoded, SampleEncoder, TooLong
from avar_lightning.data.order import Arc, Raw, batches_per_rank, read_circle, read_stripe, split_samples
from avar_lightning.data.sample import SampleError, parse_sample
from avar_lightning.data.shards import Shard


@dataclass
class Delivery:
    """What a reader hands to the main process: a batch, and what happened on the way to it.

    Attributes:
        batch: The collated batch, or ``None`` when only news is sent.
        seen: Samples read since the last delivery.
        bad: Messages about those that could not be used.
        too_long: Messages about those that are longer than ``max_length``.
        failure: Why the reader cannot go on.
    """

    batch: dict[str, Any] | None = None
    seen: int = 0
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    failure: str = ""

    def pin_memory(self) -> "Delivery":
        """The same with its tensors in page-locked memory; DataLoader asks for it by this name."""
        return replace(self, batch=pin_memory(self.batch))


class ShardReader(IterableDataset[Delivery]):
    """Read, shuffle, decode, encode and batch the samples of one reader's arc.

    Args:
        shards: All shards of the data set, the same list on every rank.
        encoder: Makes tensors of one sample.
        collator: Makes a batch of them.
        batch_size: Samples a batch.
        train: Shuffle, and replace unusable samples; otherwise keep the order and use each sample once.
        rank: This process among those that read different data.
        world_size: Number of these processes.
        seed: Of the order, together with the epoch.
        shuffle_buffer: Undecoded samples among which the next one is drawn (training).
        length_group_buffer: Encoded samples sorted by length to make batches with little padding
            (training); 0: off.
        drop_last: Leave out the last, short batch (training).
        cache_encoded: Keep encoded samples in memory.

    Raises:
        ValueError: When several ranks are to share shards of unknown size, or there is not one batch.
    """

    def __init__(
        self,
        shards: list[Shard],
        encoder: SampleEncoder,
        collator: Callable[[Sequence[Encoded]], dict[str, Any]],
        *,
        batch_size: int,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        length_group_buffer: int = 0,
        drop_last: bool = False,
        cache_encoded: bool = False,
    ) -> None:
        super().__init__()
        counts = [shard.samples for shard in shards if shard.samples is not None]
        self.total = sum(counts) if len(counts) == len(shards) else None
        self.shards, self.encoder, self.collator = shards, encoder, collator
        self.batch_size, self.train, self.rank, self.world_size = batch_size, train, rank, world_size
        self.seed, self.shuffle_buffer = seed, shuffle_buffer if train else 0
        self.group_size = max(length_group_buffer // batch_size, 1) * batch_size if train else batch_size
        self.drop_last = drop_last and train
        self.cache: dict[tuple[str, str], Encoded] | None = {} if cache_encoded else None
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers outlive an epoch
        if self.total is None and world_size > 1:
            raise ValueError(
                f"the {len(shards)} shard(s) from {shards[0].url} are of unknown size, so "
                f"{world_size} ranks cannot make equal numbers of batches; give a manifest.json that lists "
                "every shard with its sample count"
            )
        if self.num_batches == 0:
            raise ValueError(
                f"{self.total} sample(s) from {shards[0].url} do not fill a batch of {batch_size} on each of "
                f"{world_size} rank(s); lower batch_size, set drop_last to false or add samples"
            )

    @property
    def num_batches(self) -> int | None:
        """Batches of this rank in one epoch, ``None`` when the shards' sizes are unknown."""
        if self.total is None:
            return None
        return batches_per_rank(self.total, self.batch_size, world_size=self.world_size, drop_last=self.drop_last)

    def __iter__(self) -> Iterator[Delivery]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        shared = random.Random(f"{self.seed} {int(self.epoch)}")  # the same on every reader
        own = random.Random(f"{self.seed} {int(self.epoch)} {self.rank} {worker}")
        shards = shared.sample(self.shards, len(self.shards)) if self.train else self.shards
        arc: Arc | None = None
        if self.total is None:
            mine = rest = read_stripe(shards, worker, num_workers)
        else:
            arc = split_samples(
                self.total,
                self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
                worker=worker,
                num_workers=num_workers,
                drop_last=self.drop_last,
            )
            if arc.num_batches == 0:
                return
            # Turning the circle mixes arcs anew each epoch, also where there is a single shard.
            rest = read_circle(shards, arc.start + (shared.randrange(self.total) if self.train else 0))
            mine = itertools.islice(rest, arc.num_samples)
        if self.shuffle_buffer:
            mine = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=own)(mine)
        # `rest` goes on where `mine` ends; where the total is unknown nothing is left by then.
        stream = itertools.chain(((raw, False) for raw in mine), ((raw, True) for raw in rest))
        yield from self._batches(stream, arc, own)

    def _batches(self, stream: Iterator[tuple[Raw, bool]], arc: Arc | None, rng: random.Random) -> Iterator[Delivery]:
        news = Delivery()
        group: list[Encoded] = []
        made = 0
        needed = self._samples_needed(arc)
        for index, (raw, extra) in enumerate(stream):
            if extra and made >= needed:
                break
            if arc is not None and not made and index > arc.num_samples + (self.total or 0):
                yield Delivery(failure=f"none of the {self.total} samples from {self.shards[0].url} can be used")
                return
            news.seen += 1
            try:
                group.append(self._encode(raw, repeated=extra and not self.train))
                made += 1
            except TooLong as error:
                news.too_long.append(str(error))
            except SampleError as error:
                news.bad.append(str(error))
                yield news  # at once: too many of them must stop the run, also where no batch comes of it
                news = Delivery()
            if len(group) == self.group_size:
                for batch in self._cut(group, rng):
                    news.batch = batch
                    yield news
                    news = Delivery()
                group = []
        for batch in self._cut(group, rng):
            news.batch = batch
            yield news
            news = Delivery()
        if news.seen:
            yield news

    def _samples_needed(self, arc: Arc | None) -> int:
        """Usable samples that this reader must make, going beyond its own arc for them if need be."""
        if arc is None:
            return 0
        least = (arc.num_batches - 1) * self.batch_size + 1  # the fewest that make its number of batches
        if self.train:
            return max(arc.num_samples, least)
        return least if self.world_size > 1 else 0

    def _encode(self, raw: Raw, *, repeated: bool) -> Encoded:
        if isinstance(raw, SampleError):
            raise raw
        name = (raw["__url__"], raw["__key__"])
        encoded = self.cache.get(name) if self.cache is not None else None
        if encoded is None:
            encoded = self.encoder(parse_sample(raw))
            if self.cache is not None:
                self.cache[name] = encoded
        return encoded.marked_repeated() if repeated else encoded

    def _cut(self, group: list[Encoded], rng: random.Random) -> Iterator[dict[str, Any]]:
        """Cut a group into batches of similar lengths, in random order; a single batch keeps its order."""
        if len(group) > self.batch_size:
            group = sorted(group, key=len)
        batches = [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        rng.shuffle(batches)
        return map(self.collator, batches)
