"""The order of an epoch: every sample once, the same for all who read, wherever they begin."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avar_lightning.data.order import EpochOrder, Progress, cut_batches, num_batches, share_of

sizes_of_shards = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


def places(order: EpochOrder) -> list[tuple[int, int]]:
    found = []
    while order.has(len(found)):
        found.append(order.place(len(found)))
    return found


@given(sizes=sizes_of_shards, window=st.integers(0, 50), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_sample_has_one_place(sizes: list[int], window: int, seed: int, epoch: int):
    order = EpochOrder(sizes, seed=seed, epoch=epoch, shuffle=True, window=window)
    expected = [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    assert sorted(places(order)) == expected
    assert places(EpochOrder(sizes)) == expected
    with pytest.raises(IndexError, match=f"position {len(expected)} in an epoch of {len(expected)}"):
        order.place(len(expected))


def test_seed_and_epoch_decide_the_order():
    def made(**options: Any) -> list[tuple[int, int]]:
        return places(EpochOrder([20, 30], shuffle=True, window=100, **options))

    assert made(seed=1, epoch=2) == made(seed=1, epoch=2)
    assert len({str(made(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_each_place_is_equally_likely():
    """Where a sample comes in an epoch says nothing about where it lies."""
    order_of = [places(EpochOrder([6], epoch=epoch, shuffle=True, window=6)) for epoch in range(3000)]
    for position in (0, 5):
        counts = Counter(order[position][1] for order in order_of)
        assert all(430 < counts[number] < 570 for number in range(6))  # 500 expected, sd 20


def test_a_window_keeps_reading_among_few_shards():
    order = EpochOrder([10] * 20, shuffle=True, window=20)
    for first in range(0, 200, 20):
        shards = {order.place(position)[0] for position in range(first, first + 20)}
        assert len(shards) <= 3
        assert set(order.shards_around(first + 7)) == shards
    assert order.shards_around(190, ahead=1) == []
    assert set(order.shards_around(0, ahead=1)) == {order.place(position)[0] for position in range(20, 40)}


@given(sizes=sizes_of_shards, window=st.integers(0, 50))
def test_unknown_sizes_are_counted_when_a_shard_is_reached(sizes: list[int], window: int):
    counted: list[int] = []

    def count(shard: int) -> int:
        counted.append(shard)
        return sizes[shard]

    order = EpochOrder([None] * len(sizes), shuffle=True, window=window, size_of=count)
    assert counted == []
    expected = [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    assert sorted(places(order)) == expected
    assert sorted(counted) == list(range(len(sizes)))


@given(
    total=st.integers(1, 120),
    size=st.integers(1, 12),
    group=st.sampled_from([0, 5, 24]),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_batches_go_on_where_they_were_left(total: int, size: int, group: int, drop_last: bool, data: st.DataObject):
    order = EpochOrder([total], shuffle=True, window=50)
    options: dict[str, Any] = {"drop_last": drop_last, "group": group, "length_of": lambda position: position * 7 % 11}
    whole = list(cut_batches(order, size, **options))
    assert len(whole) == num_batches(total, size, drop_last=drop_last)
    seen = [position for batch, _ in whole for position in batch]
    assert len(set(seen)) == len(seen)
    assert len(seen) == (total // size * size if drop_last else total)
    done = data.draw(st.integers(0, len(whole)))
    start = whole[done - 1][1] if done else Progress()
    again = EpochOrder([total], shuffle=True, window=50)
    assert [batch for batch, _ in cut_batches(again, size, start=start, **options)] == [b for b, _ in whole[done:]]


@given(
    total=st.integers(1, 120),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4),
    group=st.sampled_from([0, 24]),
)
def test_every_sample_comes_once_though_batches_change_their_size(total: int, sizes: list[tuple[int, int]], group: int):
    """As when a run goes on with another number of processes."""
    progress, seen = Progress(), []
    for size, steps in [*sizes, (3, total)]:
        order = EpochOrder([total], shuffle=True, window=50)
        batches = cut_batches(order, size, start=progress, group=group, length_of=lambda position: position * 7 % 11)
        for batch, after in islice(batches, steps):
            seen += batch
            progress = after
    assert sorted(seen) == list(range(total))


def test_batches_of_a_group_have_similar_lengths():
    order = EpochOrder([64], shuffle=True, window=64)
    batches = [b for b, _ in cut_batches(order, 4, group=64, length_of=lambda position: position)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)
    starts = [min(batch) for batch in batches]
    assert starts != sorted(starts)


@given(batch=st.integers(0, 40), world_size=st.integers(1, 8))
def test_processes_share_a_batch(batch: int, world_size: int):
    shares = [share_of(list(range(batch)), rank, world_size) for rank in range(world_size)]
    assert [position for share in shares for position in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
