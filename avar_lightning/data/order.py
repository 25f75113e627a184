"""Who reads which samples, and in what order they come from the shards.

A reader is one worker of one rank. The samples of all shards stand in a circle, and every reader owns one
arc of it: shards are opened where they are needed, no reader starves when there are fewer shards than
readers, and every rank makes the same number of batches.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import webdataset as wds

from avar_lightning.data.sample import SampleError
from avar_lightning.data.shards import Shard

Raw = dict[str, Any] | SampleError  # the files of one sample, or why there are none


@dataclass(frozen=True)
class Arc:
    """One reader's share of an epoch.

    Attributes:
        start: Position of its first sample in the circle.
        num_samples: Samples that it owns.
        num_batches: Batches that it makes of them.
    """

    start: int
    num_samples: int
    num_batches: int


def batches_per_rank(total: int, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
    """Number of batches that every rank makes of ``total`` samples.

    >>> batches_per_rank(10, 4), batches_per_rank(10, 4, drop_last=True)
    (3, 2)
    """
    return total // world_size // batch_size if drop_last else -(-total // (world_size * batch_size))


def split_samples(
    total: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    worker: int = 0,
    num_workers: int = 1,
    drop_last: bool = False,
) -> Arc:
    """The arc of one reader: ranks differ by one sample at most, and only the last reader has a short batch.

    >>> [split_samples(10, 4, worker=worker, num_workers=2) for worker in (0, 1)]
    [Arc(start=0, num_samples=8, num_batches=2), Arc(start=8, num_samples=2, num_batches=1)]
    """
    batches = batches_per_rank(total, batch_size, world_size=world_size, drop_last=drop_last)
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    first = worker * (batches // num_workers) + min(worker, batches % num_workers)
    count = batches // num_workers + (worker < batches % num_workers)
    begin = start + first * batch_size
    end = min(begin + count * batch_size, stop)
    return Arc(begin, max(end - begin, 0), count)


def read_shard(shard: Shard, first: int = 0) -> Iterator[Raw]:
    """Yield the samples of one shard from number ``first``, undecoded, in the order of the tar.

    Where the count is known exactly that many items come out: a :class:`SampleError` stands for every
    sample that a missing, cut or damaged tar should have had.
    """
    problems: list[Exception] = []

    def note(error: Exception) -> bool:
        problems.append(error)
        return True

    index = -1
    files = wds.tariterators.url_opener([{"url": shard.url}], handler=note)
    files = wds.tariterators.tar_file_expander(files, handler=note)
    for index, raw in enumerate(wds.tariterators.group_by_keys(files, handler=note)):
        if index >= first and (shard.samples is None or index < shard.samples):
            yield raw
    found, reason = index + 1, f" ({problems[0]})" if problems else ""
    missing = int(bool(problems)) if shard.samples is None else shard.samples - max(found, first)
    for _ in range(missing):
        expected = "" if shard.samples is None else f" of {shard.samples}"
        yield SampleError(f"{shard.url}: the shard breaks off after {found}{expected} sample(s){reason}")


def read_circle(shards: list[Shard], position: int) -> Iterator[Raw]:
    """All samples of shards of known size from ``position``, round and round."""
    sizes = [shard.samples or 0 for shard in shards]
    position %= sum(sizes)
    index = 0
    while position >= sizes[index]:
        position -= sizes[index]
        index += 1
    for shard in itertools.islice(itertools.cycle(shards), index, None):
        yield from read_shard(shard, position)
        position = 0


def read_stripe(shards: list[Shard], worker: int, num_workers: int) -> Iterator[Raw]:
    """One worker's part of shards of unknown size: whole shards, or every n-th sample where they are few."""
    if len(shards) >= num_workers:
        return itertools.chain.from_iterable(map(read_shard, shards[worker::num_workers]))
    return itertools.islice(itertools.chain.from_iterable(map(read_shard, shards)), worker, None, num_workers)
