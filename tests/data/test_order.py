"""Shares of readers: they cover every sample once, and ranks make equal numbers of batches."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avar_lightning.data.order import batches_per_rank, read_circle, read_stripe, split_samples
from avar_lightning.data.shards import Shard, find_shards


@given(
    total=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    num_workers=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_arcs_cover_the_circle(total: int, batch_size: int, world_size: int, num_workers: int, drop_last: bool):
    covered: list[int] = []
    for rank in range(world_size):
        arcs = [
            split_samples(
                total,
                batch_size,
                rank=rank,
                world_size=world_size,
                worker=worker,
                num_workers=num_workers,
                drop_last=drop_last,
            )
            for worker in range(num_workers)
        ]
        expected = batches_per_rank(total, batch_size, world_size=world_size, drop_last=drop_last)
        assert sum(arc.num_batches for arc in arcs) == expected
        assert all(arc.num_samples <= arc.num_batches * batch_size for arc in arcs)
        if drop_last:
            assert all(arc.num_samples == arc.num_batches * batch_size for arc in arcs)
        covered += itertools.chain.from_iterable(range(a.start, a.start + a.num_samples) for a in arcs)
    assert len(set(covered)) == len(covered)
    assert drop_last or sorted(covered) == list(range(total))


def keys(items: object, count: int) -> list[int]:
    return [int(raw["__key__"]) for raw in itertools.islice(items, count)]


@pytest.mark.parametrize("start", [0, 2, 3, 6, 9])
def test_the_circle_goes_round(shards: Callable[..., str], start: int):
    found = find_shards(shards(7, 3))
    assert keys(read_circle(found, start), 15) == [(start + i) % 7 for i in range(15)]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stripes_cover_shards_of_unknown_size(shards: Callable[..., str], size: int):
    found = [Shard(shard.url) for shard in find_shards(shards(10, size))]
    read = [keys(read_stripe(found, worker, 3), 100) for worker in range(3)]
    assert all(read)
    assert sorted(itertools.chain.from_iterable(read)) == list(range(10))
