"""Shards on disk: round trip, equal bytes, all or nothing, finding and counting."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avar_lightning.data.sample import Sample, SampleError, parse_sample
from avar_lightning.data.shards import MANIFEST, PUBLICATION, Shard, expand_urls, find_shards
from avar_lightning.data.tars import read_shard
from avar_lightning.data.writer import ShardWriter, write_shards
from tests.data.conftest import make_sample, sample_files, write_tar

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(st.none() | st.booleans() | st.integers() | text, lambda inner: st.lists(inner, max_size=3))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    colours = draw(st.lists(st.tuples(*[st.integers(0, 255)] * 3), max_size=3))
    parts = [{"type": "image"}] * len(colours) + [{"type": "text", "text": draw(text)}]
    return Sample(
        messages=[
            {"role": "user", "content": draw(st.permutations(parts))},
            {"role": "assistant", "content": draw(text)},
        ],
        images=[Image.new("RGB", (3, 2), colour) for colour in colours],
        answer=draw(values),
        id=draw(text.filter(bool)),
        source=draw(st.none() | text),
        columns=draw(st.dictionaries(text.map(lambda name: f"x{name}"), values, max_size=3)),
    )


@settings(max_examples=25, deadline=None)
@given(written=st.lists(samples(), max_size=5), size=st.integers(1, 3))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, written: list[Sample], size: int):
    folder = tmp_path_factory.mktemp("round")
    paths = write_shards(written, folder, samples_per_shard=size)
    assert len(paths) == -(-len(written) // size)
    read = [parse_sample(raw) for path in paths for raw in read_shard(path)]
    assert [(s.messages, s.fields()) for s in read] == [(s.messages, s.fields()) for s in written]
    assert [[image.tobytes() for image in s.images] for s in read] == [
        [image.tobytes() for image in s.images] for s in written
    ]


def test_equal_samples_give_equal_files(tmp_path: Path):
    for name in ("a", "b"):
        write_shards([make_sample(i) for i in range(5)], tmp_path / name, samples_per_shard=2)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [MANIFEST, "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_is_left_when_writing_fails(tmp_path: Path):
    def stream():
        yield from (make_sample(i) for i in range(3))
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_shards(stream(), tmp_path / "out", samples_per_shard=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_processes_that_write_the_same_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    samples = [Sample(messages=[{"role": "user", "content": f"{index}"}]) for index in range(5)]
    with ShardWriter(tmp_path, samples_per_shard=2, overwrite=True) as slow:
        slow.write(samples[0])
        with monkeypatch.context() as other:
            other.setattr("os.getpid", lambda: -1)
            write_shards(samples, tmp_path, samples_per_shard=2, overwrite=True)
        for sample in samples[1:]:
            slow.write(sample)
    assert [shard.samples for shard in find_shards(str(tmp_path))] == [2, 2, 1]
    assert not list(tmp_path.glob("*.tmp"))


def test_overwriting_must_be_asked_for(tmp_path: Path):
    write_shards([make_sample(i) for i in range(3)], tmp_path, samples_per_shard=1)
    with pytest.raises(FileExistsError, match=r"already holds 3 shard.*overwrite=True"):
        write_shards([make_sample()], tmp_path)
    assert len(write_shards([make_sample()], tmp_path, overwrite=True)) == 1
    assert find_shards(tmp_path) == [Shard(str(tmp_path / "shard-000000.tar"), 1)]


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (Sample(messages=[{"role": "assistant", "content": "x"}]), "no user turn"),
        (Sample(messages=make_sample().messages), r"show 1 image\(s\) but the sample has 0"),
        (Sample(messages=make_sample(images=0).messages, key="a.b"), "new plain name"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(tmp_path: Path, sample: Sample, says: str):
    with pytest.raises(SampleError, match=says), ShardWriter(tmp_path) as writer:
        writer.write(sample)


def test_the_writer_refuses_a_key_twice(tmp_path: Path):
    sample = make_sample()
    sample.key = "same"
    with pytest.raises(SampleError, match=r"'same'.*in use"):
        write_shards([sample, sample], tmp_path)


def test_jpg_shards(tmp_path: Path):
    path = write_shards([make_sample(200)], tmp_path, image_format="jpg")[0]
    (raw,) = read_shard(path)
    assert "0.jpg" in raw
    assert abs(parse_sample(raw).images[0].getpixel((0, 0))[0] - 200) < 5


def test_encoded_images_are_stored_as_they_are(tmp_path: Path):
    sample = make_sample(images=2)
    files = [("jpg", b"one"), ("png", b"two")]
    with ShardWriter(tmp_path) as writer:
        writer.write(sample, files)
        with pytest.raises(SampleError, match=r"show 2 image\(s\) but the sample has 1"):
            writer.write(sample, files[:1])
    (raw,) = read_shard(tmp_path / "shard-000000.tar")
    assert (raw["0.jpg"], raw["1.png"]) == (b"one", b"two")


def test_the_manifest_has_sizes_and_checksums(tmp_path: Path):
    write_shards([make_sample(i) for i in range(3)], tmp_path, samples_per_shard=2)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["samples"], [shard["samples"] for shard in manifest["shards"]]) == (3, [2, 1])
    for shard in manifest["shards"]:
        content = (tmp_path / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_shards_are_found_by_folder_glob_braces_list_and_manifest(shards: Callable[..., str]):
    folder = shards(5, 2)
    names = [f"{folder}/shard-{n:06d}.tar" for n in range(3)]
    for spec in (folder, f"{folder}/*.tar", f"{folder}/shard-{{000000..000002}}.tar", names, f"{folder}/{MANIFEST}"):
        assert expand_urls(spec) == names
        assert [shard.samples for shard in find_shards(spec)] == [2, 2, 1]


def test_urls_and_pipes_pass_through():
    assert expand_urls(["s3://b/{0..1}.tar", "pipe:cat x.tar"]) == ["s3://b/0.tar", "s3://b/1.tar", "pipe:cat x.tar"]
    assert find_shards("pipe:cat x.tar") == [Shard("pipe:cat x.tar", None)]


def test_a_manifest_counts_pipes(tmp_path: Path):
    path = tmp_path / MANIFEST
    path.write_text(json.dumps({"shards": [{"name": "pipe:cat x.tar", "samples": 7}]}))
    assert find_shards(path) == [Shard("pipe:cat x.tar", 7)]


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/*.tar", "nowhere/{0..3}.tar", ["nowhere/a.tar"]])
def test_no_such_shard_names_the_pattern_and_the_fix(spec: str | list[str]):
    with pytest.raises(FileNotFoundError, match=r"no such shard: nowhere.*correct the path or write the shards"):
        expand_urls(spec)


def test_an_empty_folder_is_no_data_set(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"no shard in the folder {tmp_path}"):
        expand_urls(tmp_path)


def test_shards_without_a_manifest_are_counted_by_their_headers(tmp_path: Path):
    files = {f"a/k{i}": sample_files(make_sample(i, images=i % 3)) for i in range(7)}
    path = write_tar(tmp_path / "x.tar", files)
    assert find_shards(path) == [Shard(str(path), 7)]
    assert len(list(read_shard(path, 7))) == 7


def test_a_stale_manifest_is_not_believed(shards: Callable[..., str], caplog: pytest.LogCaptureFixture):
    folder = Path(shards(3))
    path = write_tar(folder / "shard-000000.tar", {f"k{i}": sample_files(make_sample(i)) for i in range(5)})
    with caplog.at_level(logging.WARNING):
        assert find_shards(folder) == [Shard(str(path), 5)]
    assert "not the file that its manifest.json lists" in caplog.text


def test_samples_that_were_cut_off_still_count(shards: Callable[..., str]):
    folder = Path(shards(6))
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:6000])
    assert [shard.samples for shard in find_shards(folder)] == [6]


def test_shards_that_are_being_moved_are_no_data_set(shards: Callable[..., str]):
    folder = shards(3)
    (Path(folder) / PUBLICATION).parent.mkdir()
    (Path(folder) / PUBLICATION).touch()
    with pytest.raises(FileNotFoundError, match=r"being moved into .* interrupted; call what writes"):
        find_shards(folder)
    for spec in (f"{folder}/*.tar", f"{folder}/shard-{{000000..000000}}.tar", f"{folder}/{MANIFEST}"):
        with pytest.raises(FileNotFoundError, match="being moved into"):
            find_shards(spec)


def test_a_manifest_that_is_named_is_checked_like_one_that_is_found(shards: Callable[..., str]):
    folder = Path(shards(3))
    write_tar(folder / "shard-000000.tar", {f"k{i}": sample_files(make_sample(i)) for i in range(5)})
    assert [shard.samples for shard in find_shards(str(folder / MANIFEST))] == [5]
