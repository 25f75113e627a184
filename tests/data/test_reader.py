"""Readers and their loader: equal shares, order, unusable samples, epochs, resuming."""

import gc
import json
import logging
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin

from avar_lightning.data.collate import IGNORE, Collator, SampleEncoder
from avar_lightning.data.loader import ShardLoader, TooManyBadSamples
from avar_lightning.data.reader import ShardReader
from avar_lightning.data.shards import MANIFEST, Shard, find_shards
from tests.data.conftest import Files, make_sample, sample_files, write_tar

Build = Callable[..., ShardLoader]


@pytest.fixture
def build(processor: ProcessorMixin) -> Build:
    def make(
        spec: Any,
        *,
        train: bool = True,
        max_length: int | None = None,
        num_workers: int = 0,
        max_bad_fraction: float = 1.0,
        batch_size: int = 2,
        **options: Any,
    ) -> ShardLoader:
        encoder = SampleEncoder(processor, max_length=max_length, with_prompt=not train)
        found = spec if isinstance(spec, list) else find_shards(spec)
        reader = ShardReader(found, encoder, Collator(0), batch_size=batch_size, train=train, **options)
        return ShardLoader(reader, num_workers=num_workers, max_bad_fraction=max_bad_fraction, name="train")

    return make


def indices(batches: Any) -> list[list[int]]:
    return [[columns["index"] for columns in batch["columns"]] for batch in batches]


def flattened(parts: Iterable[list[int]]) -> list[int]:
    return [index for part in parts for index in part]


def flat(batches: Any) -> list[int]:
    return flattened(indices(batches))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("size", [2, 100])
def test_each_sample_comes_once_an_epoch(shards: Callable[..., str], build: Build, num_workers: int, size: int):
    loader = build(shards(11, size), num_workers=num_workers, shuffle_window=4)
    first = list(loader)
    assert len(first) == len(loader) == 6
    assert sorted(flat(first)) == list(range(11))
    assert flat(first) == flat(loader)  # the same epoch is the same order
    loader.batch_sampler.sampler.set_epoch(1)  # as Lightning does
    second = flat(loader)
    assert sorted(second) == list(range(11))
    assert second != flat(first)
    assert loader.counts == {"seen": 33, "bad": 0, "too_long": 0}


def test_the_seed_decides_the_order(shards: Callable[..., str], build: Build):
    folder = shards(12, 4)
    assert flat(build(folder, seed=1)) == flat(build(folder, seed=1)) != flat(build(folder, seed=2))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_keeps_the_order_and_has_prompts(shards: Callable[..., str], build: Build, num_workers: int):
    batches = list(build(shards(5, 2), train=False, num_workers=num_workers))
    assert indices(batches) == [[0, 1], [2, 3], [4]]
    assert all("prompt" in batch for batch in batches)


@pytest.mark.parametrize("num_shards", [1, 3, 8])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_make_equal_numbers_of_batches(
    shards: Callable[..., str], build: Build, num_shards: int, drop_last: bool
):
    """Also when shards are fewer than readers, and when samples are bad or too long on one rank only."""
    folder = shards(17, -(-17 // num_shards), words=lambda index: 40 if index in (1, 2, 5) else 3)
    loaders = [
        build(folder, rank=rank, world_size=2, num_workers=2, max_length=60, drop_last=drop_last, shuffle_window=3)
        for rank in range(2)
    ]
    for epoch in range(2):
        lists = []
        for loader in loaders:
            loader.set_epoch(epoch)
            lists.append(list(loader))
        assert [len(batches) for batches in lists] == [len(loaders[0])] * 2 == [4 if drop_last else 5] * 2
        read = Counter(flat(lists[0]) + flat(lists[1]))
        assert not read.keys() & {1, 2, 5}
        assert max(read.values()) <= 3  # gaps are filled with several samples, not with one again and again
    assert sum(loader.counts["too_long"] for loader in loaders) >= 3


def test_ranks_evaluate_each_sample_once_and_mark_what_fills_up(shards: Callable[..., str], build: Build):
    folder = shards(9)
    columns = []
    for rank in range(2):
        batches = list(build(folder, train=False, rank=rank, world_size=2, batch_size=4))
        assert len(batches) == 2
        for batch in batches:
            columns += batch["columns"]
            counts = [not column.get("repeated") for column in batch["columns"]]
            assert (batch["labels"] != IGNORE).any(1).tolist() == counts  # what fills up has no loss
            assert batch["role_ids"].bool().any(1).tolist() == counts  # and no score
    assert sorted(c["index"] for c in columns if "repeated" not in c) == list(range(9))
    # The last batch has one sample for two processes: the first has nothing of it, and repeats the first it can use.
    assert [c["index"] for c in columns if c.get("repeated")] == [0]


def test_one_rank_evaluates_nothing_twice(shards: Callable[..., str], build: Build):
    loader = build(shards(6, words=lambda index: 40 if index > 3 else 3), train=False, max_length=60)
    assert indices(loader) == [[0, 1], [2, 3]]
    assert loader.counts == {"seen": 6, "bad": 0, "too_long": 2}


def test_fewer_samples_than_readers_do_not_hang(shards: Callable[..., str], build: Build):
    folder = shards(3)
    for rank in range(4):
        assert len(list(build(folder, rank=rank, world_size=4, num_workers=2, batch_size=1))) == 1
    with pytest.raises(ValueError, match=r"3 sample\(s\) .* do not fill a batch of 1 on each of 4 rank"):
        build(folder, world_size=4, batch_size=1, drop_last=True)


def test_length_groups_pad_less(shards: Callable[..., str], build: Build):
    rng = random.Random(0)
    lengths = [rng.choice((1, 1, 1, 60)) for _ in range(64)]
    folder = shards(64, words=lambda index: lengths[index])

    def padding(**options: Any) -> float:
        batches = list(build(folder, batch_size=4, **options))
        assert sorted(flat(batches)) == list(range(64))
        masks = [batch["attention_mask"] for batch in batches]
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    plain, grouped = padding(), padding(length_group=32)
    assert plain > 0.25
    assert grouped < plain / 3


def bad_files() -> dict[str, Files]:
    good = sample_files(make_sample())
    no_user = make_sample()
    no_user.messages = no_user.messages[1:]
    no_user.images = []
    return {
        "png": {**good, "0.png": good["0.png"][:50]},
        "json": {**good, "json": b"{'"},
        "count": {**good, "1.png": good["0.png"]},
        "user": sample_files(no_user),
        "answer": sample_files(make_sample(answered=False)),
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_skipped_counted_and_said_once(
    tmp_path: Path, build: Build, caplog: pytest.LogCaptureFixture, num_workers: int
):
    good = {f"g{i}": sample_files(make_sample(i)) for i in range(15)}
    path = write_tar(tmp_path / "x.tar", {**good, **bad_files()})
    loader = build(path, num_workers=num_workers, max_bad_fraction=0.6)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == 10  # bad samples are replaced
            assert set(flat(batches)) == set(range(15))
    assert loader.counts["bad"] >= 10
    for key in bad_files():
        assert caplog.text.count(f"x.tar: sample {key!r}") == 1


def test_too_many_bad_samples_stop_the_run(tmp_path: Path, build: Build):
    files = {f"g{i}": sample_files(make_sample(i)) for i in range(15)} | bad_files()
    path = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(TooManyBadSamples, match=r"samples read \d are bad \(max_bad_fraction 0.1\).*last: .*x.tar"):
        list(build(path, max_bad_fraction=0.1, num_workers=1))
    with pytest.raises(TooManyBadSamples, match="samples read 1 are bad"):
        list(build(path, max_bad_fraction=0.0))
    few = write_tar(tmp_path / "few.tar", {"png": bad_files()["png"], "g": sample_files(make_sample())})
    with pytest.raises(TooManyBadSamples, match="of 2 samples read 1 are bad"):  # judged at the end of the epoch
        list(build(few, max_bad_fraction=0.4, train=False))


@pytest.mark.parametrize("train", [True, False])
def test_no_usable_sample_is_an_error(shards: Callable[..., str], build: Build, train: bool):
    with pytest.raises(TooManyBadSamples, match=r"can be used.*"):
        list(build(shards(3), max_length=5, train=train))


def test_a_lost_shard_counts_as_bad(shards: Callable[..., str], build: Build):
    folder = shards(8, 4)
    loader = build(folder)
    Path(folder, "shard-000001.tar").unlink()
    assert set(flat(loader)) == {0, 1, 2, 3}
    assert loader.counts["bad"] >= 4


def test_pipes_are_read_and_have_no_length(shards: Callable[..., str], build: Build):
    folder = shards(7, 3)
    pipes = [f"pipe:cat {folder}/shard-{n:06d}.tar" for n in range(3)]
    loader = build(pipes and [Shard(pipe) for pipe in pipes], num_workers=2)
    with pytest.raises(TypeError, match="unknown size"):
        len(loader)
    assert sorted(flat(loader)) == list(range(7))
    with pytest.raises(ValueError, match=r"2 ranks cannot make equal numbers.*manifest.json"):
        build([Shard(pipe) for pipe in pipes], world_size=2)
    manifest = Path(folder).parent / MANIFEST
    manifest.write_text(json.dumps({"shards": [{"name": p, "samples": n} for p, n in zip(pipes, (3, 3, 1))]}))
    ranks = [flat(build(str(manifest), rank=rank, world_size=2)) for rank in range(2)]
    assert set(ranks[0] + ranks[1]) == set(range(7))


@pytest.mark.skipif(sys.platform == "win32", reason="forks workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_goes_on_with_the_next_batch(shards: Callable[..., str], build: Build, num_workers: int):
    folder = shards(12, 3)
    whole = build(folder, num_workers=num_workers)
    whole.set_epoch(3)
    expected = indices(whole)
    stopped = build(folder, num_workers=num_workers)
    stopped.set_epoch(3)
    iterator = iter(stopped)
    assert indices(next(iterator) for _ in range(2)) == expected[:2]
    resumed = build(folder, num_workers=num_workers)
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(3)
    assert indices(resumed) == expected[2:]
    assert indices(resumed) == expected  # once
    state = resumed.state_dict()
    assert (state["epoch"], state["position"], state["pending"]) == (4, 0, ())


@pytest.mark.parametrize("options", [{}, {"length_group": 12}])
def test_who_reads_changes_nothing(shards: Callable[..., str], build: Build, options: dict[str, Any]):
    """Each batch of all processes together is the same, with any number of processes and of workers."""
    folder = shards(25, 4, words=lambda index: 1 + index * 7 % 13)
    expected = indices(build(folder, batch_size=6, **options))
    for num_workers in (1, 3):
        assert indices(build(folder, batch_size=6, num_workers=num_workers, **options)) == expected
    for world_size in (2, 3):
        size = 6 // world_size
        ranks = [
            indices(build(folder, batch_size=size, rank=rank, world_size=world_size, num_workers=rank, **options))
            for rank in range(world_size)
        ]
        joined = list(map(flattened, zip(*ranks, strict=True)))
        assert joined[:-1] == expected[:-1]
        # The last one has a single sample; who gets nothing of it trains on another.
        assert expected[-1][0] in joined[-1]
        assert len(joined[-1]) == world_size


@pytest.mark.parametrize("group", [0, 12])
def test_a_run_may_go_on_with_others(shards: Callable[..., str], build: Build, group: int):
    """With more processes and other workers, the steps that follow are the same."""
    folder = shards(48, 5, words=lambda index: 1 + index * 7 % 13)
    options = {"seed": 3, "length_group": group}
    expected = list(map(sorted, indices(build(folder, batch_size=6, **options))))
    first = iter(alone := build(folder, batch_size=6, num_workers=2, **options))
    seen = indices(next(first) for _ in range(2))
    for world_size, steps in ((2, 3), (3, 3)):
        state = alone.state_dict()
        ranks = [
            build(folder, batch_size=6 // world_size, rank=rank, world_size=world_size, num_workers=rank, **options)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        parts = [indices(next(batches) for _ in range(steps)) for batches in map(iter, ranks)]
        seen += map(flattened, zip(*parts, strict=True))
        alone = ranks[-1]
    assert list(map(sorted, seen)) == expected


def test_what_replaces_an_unusable_sample_depends_on_nobody(shards: Callable[..., str], build: Build):
    folder = shards(24, 5, words=lambda index: 40 if index % 5 == 0 else 3)
    options = {"max_length": 60, "seed": 1}
    alone = indices(build(folder, batch_size=4, **options))
    assert [len(batch) for batch in alone] == [4] * 6
    counts = Counter(flattened(alone))
    assert set(counts) == {index for index in range(24) if index % 5}
    assert sum(counts.values()) - len(counts) == 5
    ranks = [indices(build(folder, batch_size=2, rank=rank, world_size=2, num_workers=2, **options)) for rank in (0, 1)]
    assert list(map(flattened, zip(*ranks, strict=True))) == alone


def test_a_position_in_other_data_is_refused(shards: Callable[..., str], build: Build):
    state = build(shards(8), seed=1).state_dict()
    for other, says in (
        (build(shards(9, name="more"), seed=1), "samples 8, now 9"),
        (build(shards(8, 3, name="smaller"), seed=1), "shards '.*', now '.*'"),
        (build(shards(8, name="same"), seed=2), "seed 1, now 2"),
    ):
        with pytest.raises(ValueError, match=rf"position in the train data was taken with .*{says}.*: restore that"):
            other.load_state_dict(state)
    build(shards(8, name="elsewhere"), seed=1).load_state_dict(state)


@pytest.mark.parametrize(("batch_size", "world_size"), [(2, 1), (8, 1), (2, 2), (3, 1)])
def test_a_position_is_one_in_samples(shards: Callable[..., str], build: Build, batch_size: int, world_size: int):
    """Whatever a batch is later, each sample of the epoch comes once."""
    folder = shards(24, 5, words=lambda index: 1 + index * 5 % 11)
    options = {"seed": 1, "length_group": 8}
    first = build(folder, batch_size=4, **options)
    batches = iter(first)
    seen = flattened([[columns["index"] for columns in next(batches)["columns"]] for _ in range(2)])
    state = first.state_dict()
    for rank in range(world_size):
        loader = build(folder, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        loader.load_state_dict(state)
        seen += flattened(indices(loader))
    assert sorted(seen) == list(range(24))


def test_a_position_that_was_loaded_is_not_forgotten(shards: Callable[..., str], build: Build):
    """Also where a checkpoint is saved before the first step."""
    loader = build(folder := shards(8))
    next(iter(loader))
    state = loader.state_dict()
    assert state["position"] == 2
    again = build(folder)
    again.load_state_dict(state)
    assert again.state_dict() == state


def test_length_groups_need_every_shard(shards: Callable[..., str], build: Build):
    """A process that took a lost shard's lengths for nothing would order samples otherwise than the others."""
    folder = shards(16, 4)
    loader = build(folder, length_group=8)
    Path(folder, "shard-000001.tar").unlink()
    with pytest.raises(RuntimeError, match=r"shard-000001.tar: .*length_group needs every shard on every machine"):
        list(loader)


def test_cached_samples_are_the_same_samples(shards: Callable[..., str], build: Build, monkeypatch: pytest.MonkeyPatch):
    folder = shards(8, 3)
    plain, cached = build(folder), build(folder, cache_encoded=True)
    for epoch in range(2):
        for loader in (plain, cached):
            loader.set_epoch(epoch)
        assert indices(plain) == indices(cached)
    monkeypatch.setattr(SampleEncoder, "__call__", None)
    assert indices(cached) == indices(cached)


def test_a_loader_goes_when_it_is_let_go(shards: Callable[..., str], build: Build):
    """Kept alive by a cycle, its workers would take torch's five seconds each to end."""
    loader = build(shards(4, 2))
    loader.set_epoch(1)
    gone = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert gone() is None
    finally:
        gc.enable()
