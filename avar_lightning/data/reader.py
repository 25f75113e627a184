"""Places to batches: read, decode, encode, collate; and what happens to unusable samples.

In training such a sample is replaced by another one of the epoch, drawn by its position, so that every batch is full
on every process; a process that gets nothing of a short last batch repeats the first sample of the epoch. In evaluation
each sample is used once; only where a process would make no batch while others do, is a sample used again, with
``"repeated": True`` in its columns.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from avar_lightning.data.collate import Encoded, SampleEncoder, TooLong
from avar_lightning.data.fetching import FetchError, ShardCache
from avar_lightning.data.order import EpochOrder, Place, Progress, cut_batches, num_batches, share_of
from avar_lightning.data.sample import SampleError, parse_sample
from avar_lightning.data.shards import Shard, is_remote
from avar_lightning.data.tars import LocalShard, Raw

MAX_OPEN = 256  # shards that a process keeps open,
MAX_INDEXED = 50_000  # and samples in them, unless a shuffle window has more
MAX_DRAWS = 200  # samples that are tried in place of an unusable one


@dataclass(frozen=True)
class Task:
    """One batch to make: positions of its samples in an epoch."""

    epoch: int
    positions: list[int]


@dataclass
class Delivery:
    """What a reader hands to the main process: a batch, and what happened on the way to it.

    Attributes:
        batch: The collated batch, or ``None`` where none of its samples can be used.
        seen: Samples read for it.
        bad: Messages about those that could not be used.
        too_long: Messages about those that are longer than ``max_length``.
        failure: Why the reader cannot go on.
    """

    batch: dict[str, Any] | None = None
    seen: int = 0
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    failure: str = ""

    def pin_memory(self) -> Delivery:
        """The same with its tensors in page-locked memory; DataLoader asks for it by this name."""
        return replace(self, batch=pin_memory(self.batch))


class ShardReader(Dataset[Delivery]):
    """Make the batches of one process.

    Args:
        shards: All shards of the data set, the same list on every process.
        encoder: Makes tensors of one sample.
        collator: Makes a batch of them.
        batch_size: Samples a batch of this process.
        train: Shuffle, and replace unusable samples; otherwise keep the order and use each sample once.
        rank: This process among those that read different data.
        world_size: Number of these processes.
        seed: Of the order, together with the epoch.
        shuffle_window: Neighbouring samples that are permuted (training).
        length_group: Neighbouring samples, over all processes, that are sorted by length to make batches with little
            padding (training); 0: off.
        drop_last: Leave out the last, short batch (training).
        cache_encoded: Keep encoded samples in memory.
        cache: Where remote shards go.

    Raises:
        ValueError: When several processes are to share shards of unknown size, or there is not one batch.
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
        shuffle_window: int = 10_000,
        length_group: int = 0,
        drop_last: bool = False,
        cache_encoded: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        counts = [shard.samples for shard in shards if shard.samples is not None]
        self.total = sum(counts) if len(counts) == len(shards) else None
        self.shards, self.encoder, self.collator = shards, encoder, collator
        self.batch_size, self.train, self.rank, self.world_size = batch_size, train, rank, world_size
        self.seed, self.shuffle_window = seed, shuffle_window if train else 0
        self.length_group, self.drop_last = length_group if train else 0, drop_last and train
        self.encoded: dict[Place, Encoded] | None = {} if cache_encoded else None
        self.cache = cache or ShardCache()
        self._any_remote = any(is_remote(shard.url) for shard in shards)
        self._files: OrderedDict[int, LocalShard | SampleError] = OrderedDict()
        self._order: EpochOrder | None = None
        self._window = -1  # whose successor is being fetched
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
        """Batches of every process in one epoch, ``None`` when the shards' sizes are unknown."""
        size = self.batch_size * self.world_size
        return None if self.total is None else num_batches(self.total, size, drop_last=self.drop_last)

    @property
    def order_key(self) -> dict[str, Any]:
        """What the order of an epoch and its batches depend on; not on where the shards lie."""
        names = [
            (shard.url if shard.url.startswith("pipe:") else Path(shard.url).name, shard.samples)
            for shard in self.shards
        ]
        return {
            "shards": hashlib.sha256(repr(names).encode()).hexdigest()[:16],
            "samples": self.total,
            "seed": self.seed,
            "shuffle_window": self.shuffle_window,
            "batch_size × processes": self.batch_size * self.world_size,
        }

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch, the same on every process and worker."""
        if self._order is None or self._order.epoch != epoch:
            sizes = [shard.samples for shard in self.shards]
            self._order = EpochOrder(
                sizes,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.train,
                window=self.shuffle_window,
                size_of=self._count,
            )
            self._window = -1
            for index in [index for index, shard in self._files.items() if isinstance(shard, SampleError)]:
                del self._files[index]  # perhaps it is there now
        return self._order

    def tasks(self, start: Progress) -> Iterator[tuple[Task, Progress]]:
        """The batches of an epoch that this process makes, with the progress of all after each."""
        order = self.order(start.epoch)
        batches = cut_batches(
            order,
            self.batch_size * self.world_size,
            start=start,
            drop_last=self.drop_last,
            group=self.length_group,
            length_of=lambda position: self.length(order.place(position)),
        )
        for batch, progress in batches:
            yield Task(start.epoch, share_of(batch, self.rank, self.world_size)), progress

    def __getitem__(self, task: Task) -> Delivery:
        """Make one batch."""
        order, news = self.order(task.epoch), Delivery()
        self._fetch_ahead(order, task.positions)
        # A process that gets nothing of a short last batch takes part all the same.
        positions = task.positions or ([0] if self.train else [])
        group = []
        for position in positions:
            encoded = self._encode(order.place(position), news)
            if encoded is None and self.train:
                encoded = self._draw(order, position, news)
            if news.failure:
                return news
            group += [encoded] if encoded is not None else []
        if not group and self.world_size > 1:
            group = self._filling(order, news)
        news.batch = self.collator(group) if group else None
        return news

    def length(self, place: Place) -> float:
        """About how many tokens a sample has, from its headers alone: its text's bytes and its images' sizes.

        Raises:
            RuntimeError: The shard cannot be opened here; other processes, which can, would sort its samples otherwise.
        """
        shard = self._opened(place[0])
        if isinstance(shard, SampleError):
            raise RuntimeError(f"{shard}; length_group needs every shard on every machine, mend it or set it to 0")
        if place[1] >= len(shard.index.samples):
            return 0.0
        _, files = shard.index.samples[place[1]]
        sizes = []
        for name, (offset, size) in files.items():
            if name != "json":
                try:
                    with Image.open(_Slice(shard, offset, size)) as image:  # type: ignore[arg-type]
                        sizes.append((image.height, image.width))
                except _CannotRead:
                    raise
                except Exception:  # Pillow's plugins raise anything; who reads the sample will say what is wrong
                    return 0.0
        return files.get("json", (0, 0))[1] / 4 + self.encoder.image_tokens(sizes)

    def _encode(self, place: Place, news: Delivery, *, again: bool = False) -> Encoded | None:
        """One sample as tensors; None, with the reason among the news, where it cannot be used."""
        news.seen += not again
        encoded = self.encoded.get(place) if self.encoded is not None else None
        if encoded is not None:
            return encoded
        try:
            raw = self._read(place)
            if isinstance(raw, SampleError):
                raise raw
            encoded = self.encoder(parse_sample(raw))
        except TooLong as error:
            news.too_long += [] if again else [str(error)]
        except SampleError as error:
            news.bad += [] if again else [str(error)]
        if self.encoded is not None and encoded is not None:
            self.encoded[place] = encoded
        return encoded

    def _draw(self, order: EpochOrder, position: int, news: Delivery) -> Encoded | None:
        """Another sample in place of an unusable one, the same whoever reads; first from the same window."""
        rng = random.Random(f"{order.seed}/{order.epoch}/{position}: another")
        window = order.window_of(position)
        for draw in range(MAX_DRAWS):
            near = len(window) > 1 and draw < MAX_DRAWS // 2
            other = rng.choice(window) if near else rng.randrange(self.total or position + 1)
            encoded = self._encode(order.place(other), news, again=True)
            if encoded is not None:
                return encoded
        what = (news.bad + news.too_long)[-1:] or ["see the log"]
        news.failure = f"none of {MAX_DRAWS} others drawn in its place can be used either: {what[0]}"
        return None

    def _filling(self, order: EpochOrder, news: Delivery) -> list[Encoded]:
        """The first usable sample, for a process that would leave the others waiting."""
        position = 0
        while order.has(position):
            encoded = self._encode(order.place(position), news, again=True)
            if encoded is not None:
                return [encoded.marked_repeated()]
            position += 1
        news.failure = f"none of the {self.total} samples can be used"
        return []

    def _read(self, place: Place) -> Raw:
        shard = self._opened(place[0])
        return shard if isinstance(shard, SampleError) else shard.read(place[1])

    def _opened(self, index: int) -> LocalShard | SampleError:
        """A shard, kept open; an error for each of its samples where it is not to be had."""
        if index in self._files:
            self._files.move_to_end(index)
            return self._files[index]
        shard = self.shards[index]
        try:
            found: LocalShard | SampleError = LocalShard(self.cache.open(shard), shard.url, shard.samples)
        except (FileNotFoundError, PermissionError, FetchError) as error:  # others are the machine's, and end the run
            if shard.samples is None:
                raise RuntimeError(f"{shard.url} cannot be read ({error}); without it the epoch has no end") from error
            found = SampleError(f"{shard.url}: {error}")
        self._files[index] = found
        while len(self._files) > MAX_OPEN or self._indexed > max(MAX_INDEXED, 4 * self.shuffle_window):
            self._files.popitem(last=False)
        return found

    @property
    def _indexed(self) -> int:
        return sum(len(shard) for shard in self._files.values() if isinstance(shard, LocalShard))

    def _count(self, index: int) -> int:
        shard = self._opened(index)
        assert isinstance(shard, LocalShard)  # one of unknown size that is not to be had is an error
        return len(shard)

    def _fetch_ahead(self, order: EpochOrder, positions: list[int]) -> None:
        """Have the remote shards of the next window come while this one is read."""
        if not positions or not self._any_remote:
            return
        window = positions[0] // max(order.window, 1)
        if window > self._window:
            self._window = window
            wanted = order.shards_around(positions[0]) + order.shards_around(positions[0], ahead=1)
            self.cache.fetch_ahead([self.shards[index] for index in dict.fromkeys(wanted)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_order": None}  # open files stay in their process


class _CannotRead(RuntimeError):
    """The disk fails, not what is on it."""


class _Slice(io.RawIOBase):
    """Part of a shard as a file, of which only what is asked for is read."""

    def __init__(self, shard: LocalShard, offset: int, size: int) -> None:
        super().__init__()
        self._shard, self._offset, self._size, self._at = shard, offset, size, 0

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        try:
            found = self._shard.bytes_of(self._offset + self._at, size)
        except OSError as error:
            raise _CannotRead(f"{self._shard.url}: {error}") from error
        self._at += size
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
