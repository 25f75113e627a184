"""`avar convert`: its exit status, what it prints, and errors in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avar_lightning.commands import main
from avar_lightning.conversion import pipeline
from tests.conversion.conftest import contents, read, record, rejected, write_lines


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in" / "data.jsonl", [record(i) for i in range(30)])


def test_convert_and_validate(src: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(src), str(out), "--samples-per-shard", "10", "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("30 records (sharegpt): 30 samples in 3 shard(s), ")
    assert "samples/s" in said.out
    assert f"converting {src}: 100%" in said.err
    assert main(["convert", str(out), "--validate", "--workers", "1"]) == 0
    assert capsys.readouterr().out == "30 samples in 3 shard(s), all good\n"
    (out / "shard-000001.tar").unlink()
    assert main(["convert", str(out), "--validate", "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == f"{out}/shard-000001.tar: manifest.json lists it, but there is no such file\n"
    assert said.err.endswith(f"error: {out}: 1 problem(s) in 20 samples in 2 shard(s), each named above\n")


def test_every_option(tmp_path: Path, capsys: Any) -> None:
    rows = [{"ask": "Q?", "photo": f"{i}.png", "gold": "x", "big": "drop me"} for i in range(4)]
    src = write_lines(tmp_path / "in" / "train.jsonl", [*rows, "no JSON"])
    options = ["--format", "columns", "--images", str(src.parent / "pics"), "--column", "question=ask"]
    options += ["--column", "image=photo", "--column", "answer=gold", "--drop", "big", "--split", "train"]
    options += ["--system", "Be brief.", "--source", "mine", "--samples-per-shard", "2", "--workers", "1"]
    out = tmp_path / "out"
    assert main(["convert", str(src.parent), str(out), *options, "--max-rejected", "0.3"]) == 0
    assert "1 × not JSON, first at" in capsys.readouterr().out
    assert [row["where"] for row in rejected(out)] == [f"{src}:5"]
    samples = read(out)
    assert [len(list(out.glob("*.tar"))), len(samples)] == [2, 4]
    assert samples[0]["json"] == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]},
        ],
        "answer": "x",
        "id": "00000000",
        "source": "mine",
    }
    assert main(["convert", str(src.parent), str(out), *options, "--limit", "3", "--overwrite"]) == 0
    assert len(read(out)) == 3


def test_prepended_images(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    src = write_lines(tmp_path / "in" / "a.jsonl", [{"messages": turns, "images": ["pics/0.png"]}])
    assert main(["convert", str(src), str(tmp_path / "out"), "--prepend-images"]) == 0
    assert read(tmp_path / "out")[0]["json"]["messages"][0]["content"][0] == {"type": "image"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/no/such/file", "OUT"], "no such file or folder: /no/such/file"),
        (["SRC", "OUT", "--images", "/no/such/folder"], "images is '/no/such/folder'; expected an existing folder"),
        (["SRC", "OUT", "--samples-per-shard", "0"], "samples_per_shard is 0; expected at least 1"),
        (["SRC", "OUT", "--workers", "0"], "workers is 0; expected at least 1"),
        (["SRC", "OUT", "--limit", "0"], "limit is 0; expected at least 1"),
        (["SRC", "OUT", "--max-rejected", "5"], "max_rejected is 5.0; expected a share from 0 to 1"),
        (["SRC", "OUT", "--split", "train"], "leave split out"),
        (["SRC", "OUT", "--format", "alpaca"], "30 of 30 records are rejected"),
        (["SRC", "OUT", "--column", "messages=none"], "have the fields conversations, id, image, which fit no format"),
        (["SRC", "SRC"], "is a file; expected a folder for the shards"),
        (["/no/such/shards", "--validate"], "no such shard: /no/such/shards"),
    ],
)
def test_bad_input_gets_one_sentence(src: Path, tmp_path: Path, capsys: Any, arguments: list[str], says: str) -> None:
    places = {"SRC": str(src), "OUT": str(tmp_path / "out")}
    assert main(["convert", *(places.get(word, word) for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/*.tar"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["SRC"],
        [],
        ["SRC", "OUT", "--validate"],
        ["SRC", "OUT", "--format", "swoop"],
        ["SRC", "OUT", "--column", "ask"],
        ["SRC", "OUT", "--column", "whim=ask"],
        ["SRC", "OUT", "--workers", "many"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *arguments])
    assert stop.value.code == 2


def test_ctrl_c_says_how_to_go_on(src: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["convert", str(src), str(tmp_path / "out"), "--samples-per-shard", "10", "--workers", "1"]
    real, calls = pipeline.Tally.add, []

    def add(self: Any, other: Any) -> None:
        calls.append(other)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Tally, "add", add)
        assert main(command) == 130
    assert "call the same command again to go on" in capsys.readouterr().err
    assert main(command) == 0
    assert main([*command[:2], str(tmp_path / "clean"), *command[3:]]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_a_full_disk_is_one_sentence(src: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("avar_lightning.data.writer.ShardFile.write", full)
    assert main(["convert", str(src), str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "the conversion stopped ([Errno 28] No space left on device); call it again" in capsys.readouterr().err


def test_reasons_reach_the_file_as_json(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "in" / "a.jsonl", [record(0), '{"id": "\\ud800", "conversations": []}'])
    assert main(["convert", str(src), str(tmp_path / "out"), "--max-rejected", "0.5", "--workers", "1"]) == 0
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["where", "kind", "reason", "id"]


def test_help_says_what_validating_does_not_check(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "not whether a model's chat template" in " ".join(capsys.readouterr().out.split())
