"""Any sample of a shard without the others, as WebDataset would read it; and what is missing from a damaged one."""

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from avar_lightning.data.sample import SampleError, parse_sample
from avar_lightning.data.shards import find_shards
from avar_lightning.data.tars import LocalShard, index_tar, read_shard
from tests.data.conftest import make_sample, sample_files, write_tar


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "x.tar", {f"a/k{i}": sample_files(make_sample(i, images=i % 3)) for i in range(7)})


def test_samples_are_those_of_webdataset(tar: Path):
    expected = list(wds.WebDataset(str(tar), shardshuffle=False))
    shard = LocalShard(tar)
    assert len(shard) == 7
    for number in (6, 0, 3, 3, 1, 5, 2, 4):
        theirs = {name: value for name, value in expected[number].items() if not name.startswith("__local")}
        assert shard.read(number) == theirs


def test_an_open_shard_outlives_its_name(tar: Path):
    """A cache may drop a shard that somebody reads."""
    shard = LocalShard(tar)
    before = shard.read(2)
    tar.unlink()
    assert shard.read(2) == before


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 0.77, 0.95, 0.99])
def test_a_cut_tar_is_noticed(tmp_path: Path, share: float, counted: bool):
    """Wherever a tar breaks off, at least one item is bad, and a known count is delivered exactly."""
    path = write_tar(tmp_path / "x.tar", {f"k{i}": sample_files(make_sample(i)) for i in range(6)})
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size  # zeros follow
    path.write_bytes(path.read_bytes()[: int(end * share)])
    (shard,) = find_shards(path)
    items = list(read_shard(path, 6 if counted else None))
    assert len(items) == (6 if counted else shard.samples)
    bad = 0
    for item in items:
        try:
            if isinstance(item, SampleError):
                raise item
            parse_sample(item)
        except SampleError:
            bad += 1
    assert bad >= 1


def test_a_lost_shard_is_as_many_bad_samples(shards: Callable[..., str]):
    lost = find_shards(shards(6, 3))[0]
    Path(lost.url).unlink()
    items = list(read_shard(lost.url, lost.samples))
    assert len(items) == 3
    assert all("shard-000000.tar: No such file" in str(item) for item in items)


def test_a_file_that_comes_twice_makes_a_bad_sample(tmp_path: Path):
    files = sample_files(make_sample())
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as out:
        for name in ("json", "0.png", "0.png"):
            Path(tmp_path / "file").write_bytes(files[name])
            out.add(tmp_path / "file", f"k.{name}")
    (raw,) = read_shard(path)
    assert not isinstance(raw, SampleError)
    with pytest.raises(SampleError, match=r"unexpected file KEY.0.png \(again\)"):
        parse_sample(raw)


def test_what_is_no_tar_holds_nothing(tmp_path: Path, tar: Path):
    (tmp_path / "text.tar").write_text("no tar at all, though it is called one" * 100)
    index = index_tar(tmp_path / "text.tar")
    assert index.samples == []
    assert index.problem
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ValueError, match=r"packed.tar.gz is compressed, expected a plain .tar; decompress"):
        index_tar(tmp_path / "packed.tar.gz")


def test_a_file_that_shrinks_is_noticed(tar: Path):
    shard = LocalShard(tar)
    with tar.open("r+b") as file:
        file.truncate(3000)
    assert not isinstance(shard.read(0), SampleError)
    assert "was changed while it was read" in str(shard.read(6))
