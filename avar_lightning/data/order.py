"""The order of an epoch's samples, and the batches that are cut from it.

Both depend on the seed and the epoch, and on nothing about who reads: neither on processes nor on workers. So a run
can go on with others, and still sees every sample once.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

Place = tuple[int, int]  # number of the shard, and of the sample in it


@dataclass(frozen=True)
class Progress:
    """How far an epoch has come.

    Attributes:
        epoch: Number of the epoch.
        position: Samples of its order that have been dealt out.
        pending: Positions among these that are in no batch yet, in the order in which they will be.
    """

    epoch: int = 0
    position: int = 0
    pending: tuple[int, ...] = ()


class EpochOrder:
    """Where the samples of an epoch are, first to last.

    Shuffled, shards come in random order, the samples of all of them stand in a circle that begins anywhere, and each
    stretch of `window` samples is permuted: reading stays among a few shards at a time.

    Args:
        sizes: Samples of each shard; None where that is not known before it is opened.
        seed: Of the order, together with the epoch.
        epoch: Number of the epoch.
        shuffle: Whether there is an order of its own for each epoch; else that of the shards.
        window: Neighbouring samples that are permuted among themselves.
        size_of: Opens a shard of unknown size and counts its samples.
    """

    def __init__(
        self,
        sizes: Sequence[int | None],
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        window: int = 0,
        size_of: Callable[[int], int] | None = None,
    ) -> None:
        self.seed, self.epoch, self.window = seed, epoch, window if shuffle else 0
        self._sizes, self._size_of = list(sizes), size_of
        self.shards = list(range(len(sizes)))
        self._ends: list[int] = []  # in the order of `shards`, as far as they are known
        self._turn = 0
        self._blocks: dict[int, list[int]] = {}
        rng = random.Random(f"{seed}/{epoch}")
        if shuffle:
            rng.shuffle(self.shards)
        if None not in self._sizes:
            self._reach(None)
            # Mixes what stands together anew each epoch, also where there is a single shard.
            self._turn = rng.randrange(self._ends[-1]) if shuffle and self._ends[-1] else 0

    def has(self, position: int) -> bool:
        """Whether the epoch has so many samples."""
        return self._reach(position) > position

    def place(self, position: int) -> Place:
        """Shard and number of the sample at a position.

        Raises:
            IndexError: The epoch has fewer samples.
        """
        if not self.has(position):
            raise IndexError(f"position {position} in an epoch of {self._ends[-1]} samples")
        if self.window > 1:
            block = position // self.window
            position = self._block(block)[position - block * self.window]
        if self._turn:
            position = (position + self._turn) % self._ends[-1]
        index = bisect_right(self._ends, position)
        return self.shards[index], position - (self._ends[index - 1] if index else 0)

    def shards_around(self, position: int, ahead: int = 0) -> list[int]:
        """Shards that hold the window of a position, or one that comes so many windows after it."""
        window = self.window_of(position + ahead * max(self.window, 1))
        return list(dict.fromkeys(self.place(p)[0] for p in window))

    def window_of(self, position: int) -> range:
        """Positions that are permuted together with one."""
        size = max(self.window, 1)
        first = position // size * size
        return range(first, min(first + size, self._reach(first + size - 1)))

    def _block(self, number: int) -> list[int]:
        """Positions of one window, permuted."""
        if number not in self._blocks:
            if len(self._blocks) > 2:
                self._blocks.pop(next(iter(self._blocks)))
            block = list(self.window_of(number * self.window))
            random.Random(f"{self.seed}/{self.epoch}/{number}").shuffle(block)
            self._blocks[number] = block
        return self._blocks[number]

    def _reach(self, position: int | None) -> int:
        """Samples that are known of, once shards up to a position (or all) have been counted."""
        while len(self._ends) < len(self.shards) and (position is None or not self._ends or self._ends[-1] <= position):
            shard = self.shards[len(self._ends)]
            size = self._sizes[shard]
            if size is None:
                assert self._size_of is not None
                size = self._sizes[shard] = self._size_of(shard)
            self._ends.append((self._ends[-1] if self._ends else 0) + size)
        return self._ends[-1] if self._ends else 0


def num_batches(total: int, size: int, *, drop_last: bool = False) -> int:
    """Batches of `size` that an epoch has, over all processes.

    >>> num_batches(10, 4), num_batches(10, 4, drop_last=True)
    (3, 2)
    """
    return total // size if drop_last else -(-total // size)


def cut_batches(
    order: EpochOrder,
    size: int,
    *,
    start: Progress | None = None,
    drop_last: bool = False,
    group: int = 0,
    length_of: Callable[[int], float] | None = None,
) -> Iterator[tuple[list[int], Progress]]:
    """Positions of each batch of all processes together, with the progress after it.

    Args:
        order: Of the epoch.
        size: Samples a batch, over all processes.
        start: Where to go on; from the beginning when unset.
        drop_last: Leave out a short last batch.
        group: Neighbouring samples that are sorted by length to make batches of similar ones, which then come in
            random order; 0 for none.
        length_of: Length of the sample at a position, for sorting.
    """
    progress = start or Progress(order.epoch)
    position, pending = progress.position, list(progress.pending)
    while True:
        if len(pending) < size:
            wanted = max(group // size, 1) * size - len(pending)
            fresh = [p for p in range(position, position + wanted) if order.has(p)]
            position += len(fresh)
            pending += fresh
            if group and length_of is not None:
                pending = _sort_by_length(
                    pending, size, length_of, random.Random(f"{order.seed}/{order.epoch}+{position}")
                )
            if not pending or (drop_last and len(pending) < size):
                return
        batch, pending = pending[:size], pending[size:]
        yield batch, Progress(order.epoch, position, tuple(pending))


def share_of(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """What one process reads of a batch; of a short last one as much as the others, or one less.

    >>> [share_of([4, 5, 6, 7, 8], rank, 2) for rank in (0, 1)]
    [[4, 5], [6, 7, 8]]
    """
    first, last = len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size
    return list(batch[first:last])


def _sort_by_length(
    positions: list[int], size: int, length_of: Callable[[int], float], rng: random.Random
) -> list[int]:
    """Batches of similar lengths in random order; what does not fill one stays as it is, at the end."""
    whole = len(positions) // size * size
    ordered = iter(sorted(positions[:whole], key=length_of))
    batches = [list(islice(ordered, size)) for _ in range(whole // size)]
    rng.shuffle(batches)
    return [position for batch in batches for position in batch] + positions[whole:]
