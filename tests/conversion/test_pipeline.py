"""Rejections with file and line, equal bytes by any way, nothing half, and memory that does not grow."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from avar_lightning.conversion import chunks, pipeline
from avar_lightning.conversion.rejecting import short
from avar_lightning.conversion.workfolder import WorkFolder
from avar_lightning.data.shards import find_shards
from tests.breaking import Broken, killed
from tests.conversion.conftest import TURNS, contents, make, picture, read, record, rejected, write_lines


def said(value: str, **more: Any) -> dict[str, Any]:
    return {"id": "bad", "conversations": [{"from": "human", "value": value}], **more}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        ('{"id": "bad", ', "not JSON", "it is not JSON"),
        ("[1, 2]", "not an object", "expected a JSON object"),
        (said("<image>", image="../../x.png"), "path outside the folder", "leads out of"),
        (said("<image>", image="/etc/passwd"), "path outside the folder", "'/etc/passwd' leads out of"),
        (said("<image>", image="pics/9.png"), "missing image", "no file 'pics/9.png'"),
        (said("<image>", image="data.jsonl"), "unreadable image", "cannot be decoded"),
        (said("<image>", image="http://host/a.png"), "URL", "download it"),
        (said("<image><image>", image="pics/0.png"), "wrong number of images", "shows 2 image(s) but the record has 1"),
        (said("Hi", image="pics/0.png"), "wrong number of images", "--prepend-images"),
        ({"id": "bad", "conversations": [{"from": "alien", "value": "x"}]}, "unknown role", "'alien'"),
        ({"id": "bad", "conversations": TURNS[1:]}, "bad conversation", "no user turn"),
        ({"id": "bad", "conversations": None}, "no conversation", "expected a list of turns"),
        (said("x", videos=["a.mp4"]), "video or audio", "it has videos"),
        ('{"id": "bad", "conversations": [{"from": "human", "value": "\\ud800"}]}', "bad text", "surrogate"),
        (said("x", deep=nested(900)), "nested too deeply", "--drop"),
        (said(nested(900)), "bad part", "turn 0 has a part"),
        ({"id": "bad", "conversations": nested(900)}, "bad turn", "turn 0 is "),
        ("[" * 900 + "]" * 900, "not an object", "expected a JSON object"),
        ('{"id": "bad", "conversations": ' + "[" * 9000 + "]" * 9000 + "}", "not JSON", "recursion"),
    ],
)
def test_a_bad_record_is_named_and_left_out(reject_one: Any, bad: Any, kind: str, says: str) -> None:
    row = reject_one(bad)
    assert (row["kind"], row["id"]) == (kind, "bad" if "JSON" not in row["reason"] else None)
    assert says in row["reason"]


def test_a_message_shows_any_value() -> None:
    assert short(nested(100_000)) == "a deeply nested list"


def test_a_decompression_bomb_is_left_out(reject_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    row = reject_one(said("<image>", image={"bytes": None, "path": None, "url": _url(picture(size=(11, 11)))}))
    assert row["kind"] == "decompression bomb"


def _url(value: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(value).decode()


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "in" / "data.jsonl", [record(i) for i in range(5)])
    report = make(src, tmp_path / "out", samples_per_shard=2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["samples"] == 5
    assert [(s["name"], s["samples"]) for s in manifest["shards"]] == [
        (f"shard-00000{i}.tar", 2 - i // 2) for i in range(3)
    ]
    for shard in manifest["shards"]:
        content = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert report.bytes == sum(shard["bytes"] for shard in manifest["shards"])
    assert [shard.samples for shard in find_shards(tmp_path / "out")] == [2, 2, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "rejected.jsonl", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"
    ]  # fmt: skip


def test_shards_are_numbered_without_a_gap(tmp_path: Path) -> None:
    """A chunk of bad records alone makes no shard."""
    records = [record(0), record(1), "x", "x", record(4)]
    make(write_lines(tmp_path / "in" / "data.jsonl", records), tmp_path / "out", samples_per_shard=2, max_rejected=0.4)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["shard-000000.tar", "shard-000001.tar"]
    assert [sample["__key__"] for sample in read(tmp_path / "out")] == ["00000000", "00000001", "00000004"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many records with a few bad ones."""
    records: list[Any] = [record(i) for i in range(90)]
    for index in (3, 4, 50):
        records[index] = said("<image>", image="../x.png")
    return write_lines(tmp_path_factory.mktemp("mixed") / "in" / "data.jsonl", records)


@pytest.fixture(scope="module")
def whole(mixed: Path) -> dict[str, bytes]:
    """What converting them makes."""
    report = make(mixed, mixed.parents[1] / "whole", samples_per_shard=10)
    assert (report.samples, report.shards) == (87, 9)
    return contents(mixed.parents[1] / "whole")


def test_the_number_of_processes_changes_nothing(mixed: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    report = make(mixed, tmp_path / "out", samples_per_shard=10, workers=2)
    assert contents(tmp_path / "out") == whole
    assert report.reasons[0].startswith("3 × path outside the folder, first at ")
    assert f"{mixed}:4: " in report.reasons[0]


@pytest.mark.parametrize("overwrite", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_may_be_interrupted_between_any_two_steps(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Whatever was renamed or deleted last, readers get a whole set or none, and the same call ends it."""
    options = {"samples_per_shard": 30, "overwrite": overwrite}
    again = 0
    for stop in itertools.count():
        out = tmp_path / str(stop)
        if overwrite:
            make(mixed, out, samples_per_shard=20)
        with killed(monkeypatch, stop) as seen:
            make(mixed, out, **options)
        if not seen:
            break
        try:
            counts = [shard.samples for shard in find_shards(out)]
        except FileNotFoundError:
            counts = []
        assert counts in ([], [18, 20, 19, 20, 10][: 5 * overwrite], [28, 29, 30])
        if (out / "manifest.json").exists():
            assert len(read(out)) == sum(counts) == 87
        if not overwrite and counts and not (out / ".unfinished" / "plan.json").exists():
            again += 1
            with pytest.raises(FileExistsError):  # all was done but to say so
                make(mixed, out, **options)
        else:
            report = make(mixed, out, **options)
            assert (report.records, report.samples, report.shards, len(report.reasons)) == (90, 87, 3, 1)
        left = contents(out)
        assert {name: value for name, value in left.items() if not name.startswith(".")} == contents(
            _once(mixed, tmp_path)
        )
        assert not left.keys() & {".unfinished/plan.json", ".unfinished/publish.json"}
    assert stop > 20  # every rename of chunks, reports and shards was tried
    assert again <= 1  # nothing but an empty folder was left


def test_a_conversion_that_fails_leaves_what_another_published(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one was killed while its shards were moved; of these, all or none are there after the other."""
    bad = write_lines(tmp_path / "bad" / "data.jsonl", [record(0, image="x.png")])
    refused = 0
    for stop in itertools.count():
        out = tmp_path / str(stop)
        with killed(monkeypatch, stop) as seen:
            make(mixed, out, samples_per_shard=30)
        if not seen:
            break
        try:
            find_shards(out)
        except FileNotFoundError as error:
            refused += "moved" in str(error)
        with pytest.raises(ValueError, match="1 of 1 records are rejected"):
            make(bad, out, overwrite=True)
        if list(out.glob("*.tar")):
            assert [shard.samples for shard in find_shards(out)] == [28, 29, 30]
    assert refused >= 3


def test_another_conversion_ends_what_was_being_published(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _until(out / "shard-000001.tar"))
        with pytest.raises(Broken):
            make(mixed, out, samples_per_shard=30)
    with pytest.raises(FileExistsError, match=r"already holds 3 shard\(s\)"):
        make(mixed, out, samples_per_shard=20)
    assert contents(out) == contents(_once(mixed, tmp_path))


def test_shards_that_were_lost_while_they_were_moved_are_made_again(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _until(out / "shard-000001.tar"))
        with pytest.raises(Broken):
            make(mixed, out, samples_per_shard=30)
    (out / "shard-000000.tar").unlink()
    with pytest.raises(FileExistsError, match="some of them are gone since; pass"):
        make(mixed, out, samples_per_shard=30)
    make(mixed, out, samples_per_shard=30, overwrite=True)
    assert contents(out) == contents(_once(mixed, tmp_path))


def _until(target: Path, real: Any = os.replace) -> Any:
    def replace(source: Any, destination: Any) -> None:
        if Path(destination) == target:
            raise Broken
        real(source, destination)

    return replace


def _once(src: Path, tmp_path: Path) -> Path:
    if not (tmp_path / "once").exists():
        make(src, tmp_path / "once", samples_per_shard=30)
    return tmp_path / "once"


@pytest.mark.slow
def test_a_killed_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    (folder / "pics").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "pics" / "0.png", compress_level=1)
    rows = [{"id": f"{i}", "image": "pics/0.png", "conversations": TURNS} for i in range(300)]
    (folder / "data.json").write_text(json.dumps(rows, indent=1))
    program = (
        "from avar_lightning.conversion import ConvertConfig, convert\n"
        f"convert(ConvertConfig({str(folder)!r}, {str(tmp_path / 'out')!r}, samples_per_shard=10, workers=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, start_new_session=True)
    work = tmp_path / "out" / ".unfinished"
    _wait(lambda: len(list(work.glob("chunk-*.json"))) >= 2 or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait(lambda: not _alive(process.pid))  # its workers end with it
    assert not list((tmp_path / "out").glob("*.tar"))
    finished = {path.stem for path in work.glob("chunk-*.json")}
    converted = []
    real = chunks._fill
    monkeypatch.setattr(
        chunks, "_fill", lambda shard, job, chunk: converted.append(chunk.number) or real(shard, job, chunk)
    )
    make(folder, tmp_path / "out", samples_per_shard=10)
    assert {f"chunk-{number:06d}" for number in range(30)} - {f"chunk-{n:06d}" for n in converted} == finished
    make(folder, tmp_path / "clean", samples_per_shard=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def _wait(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def _alive(group: int) -> list[str]:
    """Processes of a group, without those that are dead and not yet collected."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(path.parent.name)
    return found


def test_ctrl_c_ends_soon_and_keeps_what_is_done(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out", itertools.count()
    real = pipeline.Tally.add

    def add(self: Any, other: Any) -> None:
        real(self, other)
        if next(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Tally, "add", add)
    with pytest.raises(KeyboardInterrupt):
        make(mixed, out, samples_per_shard=10, workers=2)
    assert len(list((out / ".unfinished").glob("chunk-*.json"))) >= 2
    assert not list(out.glob("*.tar"))


def test_two_conversions_do_not_share_a_folder(mixed: Path, tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out").alone(), pytest.raises(RuntimeError, match="another process converts into"):
        make(mixed, tmp_path / "out")
    assert make(mixed, tmp_path / "out").samples == 87


def test_another_conversion_is_not_mixed_in(mixed: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="are rejected"):
        make(mixed, out, samples_per_shard=10, max_rejected=0)
    with pytest.raises(ValueError, match=r"unfinished conversion with other samples_per_shard; .*--overwrite"):
        make(mixed, out, samples_per_shard=20)
    os.utime(mixed, (1, 1))
    with pytest.raises(ValueError, match="unfinished conversion with other input"):
        make(mixed, out, samples_per_shard=10)
    make(mixed, out, samples_per_shard=10, overwrite=True)
    assert contents(out) == whole


def test_too_many_rejections_leave_no_shards(mixed: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"3 of 90 records are rejected, more than max_rejected 0.01 allows.*data.jsonl:4"
    ):
        make(mixed, out, samples_per_shard=10, max_rejected=0.01)
    assert not list(out.glob("*.tar"))
    assert not (out / "manifest.json").exists()
    assert [row["where"] for row in rejected(out)] == [f"{mixed}:{line}" for line in (4, 5, 51)]
    make(mixed, out, samples_per_shard=10, max_rejected=0.04)  # nothing is done again
    assert contents(out) == whole


def test_images_that_were_mended_count_after_overwrite(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "in" / "data.jsonl", [record(0), record(1, image="late.png")])
    with pytest.raises(ValueError, match="1 of 2 records are rejected"):
        make(src, tmp_path / "out")
    (src.parent / "late.png").write_bytes(picture())
    assert make(src, tmp_path / "out", overwrite=True).samples == 2


def hopeless(path: Path, bad: int, good: int) -> Path:
    """A table, whose length is known before it is read, that begins with bad rows."""
    pyarrow.parquet.write_table(pyarrow.table({"question": [""] * bad + ["?"] * good}), path)
    return path


def test_a_limit_that_can_no_longer_be_kept_ends_early(tmp_path: Path) -> None:
    src, out = hopeless(tmp_path / "a.parquet", 40, 60), tmp_path / "out"
    with pytest.raises(ValueError, match="40 of 40 records are rejected"):
        make(src, out, samples_per_shard=10, max_rejected=0.39)
    with pytest.raises(ValueError, match="30 of 30 records are rejected"):
        make(src, tmp_path / "other", samples_per_shard=10, max_rejected=0.2)
    assert make(src, tmp_path / "other", samples_per_shard=10, max_rejected=0.4).samples == 60


def test_a_limit_ends_early_by_the_records_that_are_wanted(tmp_path: Path) -> None:
    rows = [record(index, image="x.png") for index in range(100)]
    src = write_lines(tmp_path / "in" / "data.jsonl", rows)
    with pytest.raises(ValueError, match="20 of 20 records are rejected"):
        make(src, tmp_path / "out", samples_per_shard=10, max_rejected=0.3, limit=50)
    with pytest.raises(ValueError, match="100 of 100 records are rejected"):  # how many there are is not known
        make(src, tmp_path / "other", samples_per_shard=10, max_rejected=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_bad_records_may_all_come_first(tmp_path: Path, kind: str) -> None:
    """The share counts, not the order."""
    src = tmp_path / f"a.{kind}"
    if kind == "parquet":
        hopeless(src, 1200, 24_000)
    else:
        src.write_text("x\n" * 1200 + '{"question": "?"}\n' * 24_000)
    report = make(src, tmp_path / "out", samples_per_shard=500, format="columns")
    assert (report.samples, sum(report.rejected.values())) == (24_000, 1200)


def test_shards_are_replaced_only_when_asked(mixed: Path, tmp_path: Path) -> None:
    make(mixed, tmp_path / "out", samples_per_shard=10)
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"already holds 9 shard\(s\); pass --overwrite"):
        make(mixed, tmp_path / "out", samples_per_shard=10)
    assert contents(tmp_path / "out") == before
    make(mixed, tmp_path / "out", overwrite=True, limit=25, max_rejected=0.1)
    assert len(read(tmp_path / "out")) == 23
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shard-000000.tar"]


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_no_record_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for format_ in ("auto", "sharegpt"):
        with pytest.raises(ValueError, match="holds no record"):
            make(tmp_path / "a.json", tmp_path / "out", format=format_)
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_the_shards_need_a_folder_of_their_own(mixed: Path) -> None:
    with pytest.raises(ValueError, match="a folder of their own"):
        make(mixed, mixed.parent)


MEMORY = """
import json, resource, sys
from avar_lightning.conversion import ConvertConfig, convert

peaks = []
for path in sys.argv[1:]:
    convert(ConvertConfig(path, path + ".out", samples_per_shard=20, workers=1), progress=False)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
print(json.dumps(peaks))
"""


def write_large(path: Path, count: int) -> None:
    """A JSON array, or a Parquet file with one row group, whose size grows with the file."""
    if path.suffix == ".json":
        turns = json.dumps({"conversations": [{"from": "human", "value": "x" * 200_000}]})
        path.write_text("[" + ",".join([turns] * count) + "]")
        return
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "BMP")
    rows = {"question": ["?"] * count, "image": [buffer.getvalue()] * count}
    pyarrow.parquet.write_table(
        pyarrow.table(rows), path, row_group_size=count, compression="none", use_dictionary=False
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """The peak after small files is the peak after large ones."""
    small, large = ([tmp_path / f"{count}.{kind}" for kind in ("json", "parquet")] for count in (100, 800))
    for path in (*small, *large):
        write_large(path, int(path.stem))
    command = [sys.executable, "-c", MEMORY, *map(str, [*small, *large])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, before, *after = json.loads(output.splitlines()[-1])
    for path, peak in zip(large, after):
        assert path.stat().st_size > 150e6
        assert peak - before < 30, f"peak memory grew from {before:.0f} to {peak:.0f} MB with {path.name}"
