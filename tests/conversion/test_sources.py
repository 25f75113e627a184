"""Every kind of input, written by the tools that write it for others, and read back from shards with webdataset."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avar_lightning.conversion.sources import find_source
from tests.conversion.conftest import add_pictures, make, picture, read, record, rejected, shown, write_lines

IMAGE = {"type": "image"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def table(count: int = 7, **options: Any) -> datasets.Dataset:
    """Rows with an image each, of their own colour, but the fourth, which has none."""
    pictures = [None if i == 3 else Image.open(io.BytesIO(picture((i, 0, 0)))) for i in range(count)]
    rows = {"image": pictures, "question": [f"q{i}" for i in range(count)], "answer": [str(i) for i in range(count)]}
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features), **options)


def check_table(folder: Path, count: int = 7) -> None:
    samples = read(folder)
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(count)]
    for index, sample in enumerate(samples):
        assert sample["json"]["answer"] == str(index)
        parts = [] if index == 3 else [IMAGE]
        question = {"type": "text", "text": f"q{index}"}
        assert sample["json"]["messages"][0]["content"] == ([*parts, question] if parts else f"q{index}")
        assert [image.getpixel((0, 0)) for image in shown(sample)] == [(index, 0, 0)] * len(parts)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_files_and_their_folder(tmp_path: Path, suffix: str) -> None:
    records = [record(index, extra=[index]) for index in range(5)]
    src = write_lines(tmp_path / "in" / f"data.{suffix}", records)
    if suffix == "json":
        src.write_text(json.dumps(records, indent=2))
    for number, place in enumerate((src, src.parent)):
        out = tmp_path / f"out{number}"
        report = make(place, out, samples_per_shard=2)
        assert (report.records, report.samples, report.shards, report.format) == (5, 5, 3, "sharegpt")
        samples = read(out)
        assert [sample["json"]["id"] for sample in samples] == [f"r{i}" for i in range(5)]
        assert [sample["json"]["extra"] for sample in samples] == [[i] for i in range(5)]
        pictures = [(src.parent / "pics" / f"{i % 4}.png").read_bytes() for i in range(5)]
        assert [sample["0.png"] for sample in samples] == pictures
        assert samples[0]["json"]["messages"] == [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "What colour?"}]},
            {"role": "assistant", "content": "Red."},
        ]


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "in" / "data.jsonl", [record(0, image="0.png")])
    assert make(src, tmp_path / "out", images=src.parent / "pics").samples == 1


@pytest.mark.parametrize("row_group", [1, 3, 100])
@pytest.mark.parametrize("per_shard", [2, 100])
def test_parquet(tmp_path: Path, row_group: int, per_shard: int) -> None:
    (tmp_path / "in").mkdir()
    table().to_parquet(tmp_path / "in" / "x.parquet")
    whole = pyarrow.parquet.read_table(tmp_path / "in" / "x.parquet")
    pyarrow.parquet.write_table(whole, tmp_path / "in" / "x.parquet", row_group_size=row_group)
    report = make(tmp_path / "in" / "x.parquet", tmp_path / "out", samples_per_shard=per_shard)
    assert report.format == "columns"
    check_table(tmp_path / "out")


def test_a_repository_of_parquet_files(tmp_path: Path) -> None:
    data = tmp_path / "in" / "data"
    data.mkdir(parents=True)
    for number in range(2):
        table().shard(2, number, contiguous=True).to_parquet(data / f"train-0000{number}-of-00002.parquet")
    table(2).to_parquet(data / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"holds test, train; say which one with --split"):
        make(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="no split 'val'; expected one of test, train"):
        make(tmp_path / "in", tmp_path / "out", split="val")
    make(tmp_path / "in", tmp_path / "out", split="train", samples_per_shard=3)
    check_table(tmp_path / "out")
    make(tmp_path / "in", tmp_path / "test", split="test")
    check_table(tmp_path / "test", 2)


@pytest.mark.parametrize("shards", [1, 3])
def test_save_to_disk(tmp_path: Path, shards: int) -> None:
    table().save_to_disk(tmp_path / "in", num_shards=shards)
    make(tmp_path / "in", tmp_path / "out", samples_per_shard=4)
    check_table(tmp_path / "out")


def test_save_to_disk_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 2)
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "flush_every", 2, raising=False)
    dataset = datasets.concatenate_datasets([table().select([i]) for i in range(7)])
    dataset.save_to_disk(tmp_path / "in")
    make(tmp_path / "in", tmp_path / "out", samples_per_shard=4)
    check_table(tmp_path / "out")


def test_save_to_disk_of_splits(tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(), test=table(2)).save_to_disk(tmp_path / "in")
    with pytest.raises(ValueError, match="holds test, train; say which"):
        make(tmp_path / "in", tmp_path / "out")
    make(tmp_path / "in", tmp_path / "out", split="train")
    check_table(tmp_path / "out")


def test_arrow_files_without_their_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cache of `datasets` has them; and paths may be relative."""
    table().save_to_disk(tmp_path / "in", num_shards=2)
    (tmp_path / "in" / "state.json").unlink()
    monkeypatch.chdir(tmp_path)
    make(Path("in"), Path("out"))
    check_table(tmp_path / "out")


def test_save_to_disk_that_lost_a_file(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "in", num_shards=2)
    next((tmp_path / "in").glob("*.arrow")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data-0000\d-of-00002.arrow.*copy the whole folder"):
        make(tmp_path / "in", tmp_path / "out")


def test_messages_of_datasets_with_images_of_their_own(tmp_path: Path) -> None:
    """Arrow gives every part the same fields and fills them with null."""
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    said += [{"role": "assistant", "content": [{"type": "text", "text": "Yo"}]}]
    rows = {"messages": [said] * 3, "images": [[Image.new("RGB", (4, 4), (i, 0, 0))] for i in range(3)]}
    features = datasets.Features(
        messages=[{"role": datasets.Value("string"),
                   "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}]}],
        images=datasets.Sequence(datasets.Image()),
    )  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    assert make(tmp_path / "x.parquet", tmp_path / "out").format == "messages"
    samples = read(tmp_path / "out")
    assert [sample["json"]["messages"] for sample in samples] == [said] * 3
    assert [shown(sample)[0].getpixel((0, 0)) for sample in samples] == [(i, 0, 0) for i in range(3)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("split", [None, "train"])
def test_a_folder_of_images(tmp_path: Path, kind: str, split: str | None) -> None:
    folder = add_pictures(tmp_path / "in" / (split or ""))
    rows = [{"file_name": f"pics/{i}.png", "prompt": f"q{i}", "label": "red"} for i in range(4)]
    with (folder / f"metadata.{kind}").open("w", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    report = make(tmp_path / "in", tmp_path / "out", split=split)
    assert (report.samples, report.format) == (4, "columns")
    assert [(s["json"]["answer"], s["0.png"]) for s in read(tmp_path / "out")] == [
        ("red", (folder / f"pics/{i}.png").read_bytes()) for i in range(4)
    ]


def test_alpaca_files(tmp_path: Path) -> None:
    rows = [{"instruction": "<image>\nLook", "input": "", "output": "Red", "images": ["pics/1.png"]}] * 2
    report = make(write_lines(tmp_path / "in" / "a.jsonl", rows), tmp_path / "out")
    assert (report.samples, report.format) == (2, "alpaca")


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    """A row group that cannot be read is as many bad records; the others are kept."""
    path = tmp_path / "x.parquet"
    table(9).to_parquet(path)
    whole = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(whole, path, row_group_size=3, compression="zstd")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(2)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    report = make(path, tmp_path / "out", max_rejected=0.5)
    assert report.rejected == {"damaged file": 3}
    assert [row["where"] for row in rejected(tmp_path / "out")] == [f"{path}:row {row}" for row in (3, 4, 5)]
    assert [sample["__key__"] for sample in read(tmp_path / "out")] == [f"{i:08d}" for i in (0, 1, 2, 6, 7, 8)]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_file_that_is_not_what_it_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=f"{name} cannot be read as"):
        make(tmp_path / name, tmp_path / "out")


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*/nowhere"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds nothing that can be converted; expected .parquet files"):
        find_source(tmp_path)
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"ends in '.gz'; expected one of .* unpack it first"):
        find_source(tmp_path / "a.jsonl.gz")
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds a, b; say which one"):
        find_source(tmp_path)
    with pytest.raises(ValueError, match="is one file; leave split out"):
        find_source(tmp_path / "a.jsonl", "train")
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"holds b.json, b.jsonl; name the file"):
        find_source(tmp_path, "b")


def test_without_pyarrow_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(1).to_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'avar-lightning\[convert\]'"):
        make(tmp_path / "x.parquet", tmp_path / "out")


said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: "<image>" not in t)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    conversations=st.lists(st.lists(st.tuples(said, said), min_size=1, max_size=3), min_size=1, max_size=4),
    array=st.booleans(),
)
def test_conversations_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[list[tuple[str, str]]], array: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    messages = [
        [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
        for pairs in conversations
    ]
    rows = [{"messages": conversation} for conversation in messages]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) if array else lines)
    make(folder / "a.json", folder / "out", samples_per_shard=2)
    assert [sample["json"]["messages"] for sample in read(folder / "out")] == messages
