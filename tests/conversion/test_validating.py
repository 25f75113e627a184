"""Checking shards: whatever is wrong with a set is named, and a good one is good."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avar_lightning.conversion import ValidationReport, validate
from tests.conversion.conftest import make, picture, record, write_lines
from tests.data.conftest import write_tar


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make(write_lines(folder / "in" / "a.jsonl", [record(i) for i in range(9)]), folder / "out", samples_per_shard=3)
    return folder / "out"


@pytest.fixture
def check(good: Path, tmp_path: Path) -> Callable[..., tuple[ValidationReport, str]]:
    """Spoil a copy of a good set, and say what is found in it."""

    def run(spoil: Callable[[Path], Any], spec: str = "", **options: Any) -> tuple[ValidationReport, str]:
        folder = tmp_path / "shards"
        shutil.copytree(good, folder)
        spoil(folder)
        said: list[str] = []
        report = validate(str(folder / spec) if spec else folder, progress=False, tell=said.append, **options)
        assert report.num_problems == len(said)
        return report, "\n".join(said).replace(str(folder), "DIR")

    return run


def sample(**more: Any) -> dict[str, bytes]:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    return {"json": json.dumps({"messages": [message], **more}).encode(), "0.png": picture()}


def rewrite(folder: Path, samples: dict[str, dict[str, bytes]], name: str = "shard-000001.tar") -> None:
    """Another tar under the name of one, which its manifest knows."""
    content = write_tar(folder / name, samples).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"]:
        if entry["name"] == name:
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "samples": len(samples)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spec", "workers"),
    [("", 1), ("", 2), ("manifest.json", 1), ("shard-*.tar", 1), ("shard-{000000..000002}.tar", 1)],
)
def test_a_good_set(check: Any, spec: str, workers: int) -> None:
    report, said = check(lambda folder: None, spec, workers=workers)
    assert (said, report.samples, report.shards, report.manifest) == ("", 9, 3, True)


def test_a_pipe(check: Any, good: Path) -> None:
    said: list[str] = []
    report = validate(f"pipe:cat {good}/shard-000001.tar", progress=False, tell=said.append)
    assert (said, report.samples, report.manifest) == ([], 3, False)


def test_a_flipped_byte(check: Any) -> None:
    def flip(folder: Path) -> None:
        path = folder / "shard-000001.tar"
        with tarfile.open(path) as tar:
            place = tar.getmember("00000004.0.png").offset_data + 44
        content = bytearray(path.read_bytes())
        content[place] ^= 0xFF
        path.write_bytes(content)

    report, said = check(flip)
    assert "DIR/shard-000001.tar: sample '00000004': image KEY.0.png cannot be decoded" in said
    assert "DIR/shard-000001.tar: manifest.json says sha256" in said
    assert (report.num_problems, report.samples) == (2, 9)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.9])
def test_a_tar_that_breaks_off(check: Any, share: float) -> None:
    def cut(folder: Path) -> None:
        path = folder / "shard-000001.tar"
        with tarfile.open(path) as tar:
            end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size
        path.write_bytes(path.read_bytes()[: int(end * share)])

    report, said = check(cut)
    assert "DIR/shard-000001.tar: the shard " in said
    assert "says bytes" in said or share == 0.0
    assert report.samples < 9 or "sample '00000005': " in said


def test_a_damaged_header_in_the_middle(check: Any) -> None:
    def damage(folder: Path) -> None:
        path = folder / "shard-000001.tar"
        with tarfile.open(path) as tar:
            place = tar.getmember("00000004.0.png").offset
        content = bytearray(path.read_bytes())
        content[place : place + 100] = b"\xff" * 100
        path.write_bytes(content)

    _, said = check(damage)
    assert "DIR/shard-000001.tar: the shard breaks off after 1 sample(s) (" in said


def test_a_missing_shard(check: Any) -> None:
    report, said = check(lambda folder: (folder / "shard-000001.tar").unlink())
    assert said == "DIR/shard-000001.tar: manifest.json lists it, but there is no such file"
    assert report.samples == 6


def test_a_missing_shard_of_a_manifest(check: Any) -> None:
    _, said = check(lambda folder: (folder / "shard-000001.tar").unlink(), "manifest.json")
    assert "DIR/shard-000001.tar: the shard cannot be read" in said


def test_a_shard_too_many(check: Any) -> None:
    _, said = check(lambda folder: write_tar(folder / "more.tar", {"x": sample()}))
    assert said == "DIR/more.tar: manifest.json does not list it"


def test_a_wrong_count(check: Any) -> None:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"samples": 3', '"samples": 4', 1))

    _, said = check(change)
    assert said == "DIR/shard-000000.tar: manifest.json says samples 4, but it is 3"


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"a": {"json": sample()["json"]}}, "'a': the messages show 1 image(s) but the sample has 0 image file(s)"),
        ({"a": sample() | {"1.png": picture()}}, "'a': the messages show 1 image(s) but the sample has 2"),
        ({"a": {"0.png": picture()}}, "'a': there is no KEY.json"),
        ({"a": {"json": b"{", "0.png": picture()}}, "'a': its JSON cannot be read"),
        ({"a": sample() | {"0.png": b"x"}}, "'a': image KEY.0.png cannot be decoded"),
        ({"a": sample() | {"0.PNG": picture()}}, "'a': unexpected file KEY.0.png (again)"),
        ({"a": sample() | {"txt": b"x"}}, "'a': unexpected file KEY.txt"),
        ({"a": sample(), "b": sample(), "../a": sample()}, None),
    ],
)
def test_bad_samples_are_named(check: Any, samples: Any, says: str | None) -> None:
    _, said = check(lambda folder: rewrite(folder, {"z": sample(), **samples}))
    assert said == "" if says is None else f"DIR/shard-000001.tar: sample {says}" in said
    assert len(said.splitlines()) == (says is not None)


def test_a_key_twice_in_a_shard(check: Any, tmp_path: Path) -> None:
    def twice(folder: Path) -> None:
        path = write_tar(folder / "shard-000001.tar", {"a": sample(), "b": sample()})
        with tarfile.open(path, "a") as tar:
            for name, value in sample().items():
                info = tarfile.TarInfo(f"a.{name}")
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
        (folder / "manifest.json").unlink()

    report, said = check(twice)
    assert said == "DIR/shard-000001.tar: sample 'a': its key was used before in this shard"
    assert (report.samples, report.manifest) == (9, False)


def test_a_key_in_two_shards(check: Any) -> None:
    _, said = check(lambda folder: rewrite(folder, {"00000001": sample(), "x": sample()}))
    assert said == "DIR/shard-000001.tar: sample '00000001': its key is used in DIR/shard-000000.tar as well"


def test_a_conversion_that_was_interrupted(check: Any) -> None:
    def leave(folder: Path) -> None:
        (folder / ".unfinished").mkdir()
        (folder / ".unfinished" / "plan.json").write_text("{}")

    assert check(leave)[1] == "DIR: a conversion into it was interrupted; call it again to go on"


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": [{"name": "x"}]}', '{"shards": 3}'])
def test_a_manifest_that_is_none(check: Any, content: str) -> None:
    with pytest.raises(ValueError, match=r"manifest.json is no manifest \("):
        check(lambda folder: (folder / "manifest.json").write_text(content))


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no shard in the folder"):
        validate(tmp_path, progress=False)
