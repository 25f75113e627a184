"""Writers that are killed, or write where others do: a folder holds a whole set or none, and is never a dead end."""

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from avar_lightning.data import publishing, writer
from avar_lightning.data.demo_datamodule import DemoDataModule
from avar_lightning.data.sample import Sample, SampleError
from avar_lightning.data.shards import MANIFEST, PUBLICATION, find_shards
from avar_lightning.data.writer import ShardWriter, encode_image, write_shards
from tests.breaking import killed


def texts(count: int) -> list[Sample]:
    return [Sample(messages=[{"role": "user", "content": f"{index}"}]) for index in range(count)]


def held(folder: Path) -> list[int]:
    """Samples of the shards that a reader gets."""
    try:
        return [shard.samples or 0 for shard in find_shards(folder)]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("before", [0, 2, 7])
def test_a_writer_may_be_killed_between_any_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int):
    refused = 0
    old = {0: [], 2: [2], 7: [2, 2, 2, 1]}[before]
    for stop in itertools.count():
        folder = tmp_path / str(stop)
        if before:
            write_shards(texts(before), folder, samples_per_shard=2)
        with killed(monkeypatch, stop) as seen:
            write_shards(texts(5), folder, samples_per_shard=2, overwrite=True)
        if not seen:
            break
        moving = (folder / PUBLICATION).exists()
        refused += moving
        assert held(folder) in ([], old, [2, 2, 1])
        if (folder / MANIFEST).exists():
            assert held(folder)  # or the demo would never write them again
        with contextlib.suppress(FileExistsError):
            write_shards(texts(3), folder, samples_per_shard=2)
        assert held(folder) in (old, [2, 2, 1], [2, 1])
        write_shards(texts(6), folder, samples_per_shard=2, overwrite=True)
        assert held(folder) == [2, 2, 2]
        assert not (folder / ".unfinished").exists()
        if moving:
            assert not list(folder.glob("*.tmp"))
    assert refused >= 4


def test_the_demo_writes_again_what_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for stop in itertools.count():
        data = DemoDataModule(str(tmp_path / str(stop)), num_train=3, num_val=2, num_test=2)
        with killed(monkeypatch, stop) as seen:
            data.prepare_data()
        data.prepare_data()
        assert (held(data.train_folder), held(data.val_folder)) == ([3], [2])
        if not seen:
            break
    assert stop > 8


def test_a_publication_that_lost_its_files_is_deleted_only_when_asked(tmp_path: Path):
    write_shards(texts(3), tmp_path, samples_per_shard=1)
    (tmp_path / PUBLICATION).parent.mkdir()
    (tmp_path / MANIFEST).replace(tmp_path / PUBLICATION)
    with pytest.raises(FileExistsError, match="some of them are gone since; pass overwrite=True"):
        ShardWriter(tmp_path)
    with ShardWriter(tmp_path, overwrite=True) as again:
        assert not list(tmp_path.glob("*.tar"))
        again.write(texts(1)[0])
    assert held(tmp_path) == [1]


def test_a_writer_waits_for_another_and_then_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "WAIT", 0.1)
    with publishing.alone(tmp_path), pytest.raises(RuntimeError, match="another process converts into"):
        write_shards(texts(3), tmp_path)
    assert not list(tmp_path.iterdir())
    write_shards(texts(3), tmp_path)
    assert held(tmp_path) == [3]


def test_where_files_cannot_be_locked_shards_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def flock(*_: Any) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(publishing.fcntl, "flock", flock)
    write_shards(texts(3), tmp_path)
    assert held(tmp_path) == [3]
    assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("broken", ["close", "publish"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write_shards(texts(3), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*((writer.ShardFile, "close") if broken == "close" else (publishing, "write_json")), full)
        with pytest.raises(OSError, match="No space"):
            write_shards(texts(2), tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_column_that_is_nested_too_deeply_is_refused(tmp_path: Path):
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with ShardWriter(tmp_path) as open_writer:
        with pytest.raises(SampleError, match="sample '00000000': a column is nested too deeply"):
            open_writer.write(Sample(messages=[{"role": "user", "content": "x"}], columns={"x": value}))
        open_writer.write(texts(1)[0])
    assert held(tmp_path) == [1]


def test_images_are_encoded_by_name():
    image = Image.new("RGBA", (2, 2), "red")
    assert encode_image(image, "png").startswith(b"\x89PNG")
    assert encode_image(image, "jpg").startswith(b"\xff\xd8")
