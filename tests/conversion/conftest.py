"""Small inputs of every kind, and shards read back with webdataset's own reader."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from PIL import Image

from avar_lightning.conversion import ConversionReport, ConvertConfig, convert
from avar_lightning.data.sample import parse_sample

TURNS = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]


def picture(colour: Any = "red", kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def record(index: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{index}", "image": f"pics/{index % 4}.png", "conversations": TURNS, **more}


def add_pictures(folder: Path) -> Path:
    (folder / "pics").mkdir(parents=True, exist_ok=True)
    for index in range(4):
        (folder / "pics" / f"{index}.png").write_bytes(picture((60 * index, 0, 0)))
    return folder


def write_lines(path: Path, records: list[Any]) -> Path:
    """A line for each record; what is text already is written as it is."""
    add_pictures(path.parent)
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records))
    return path


def make(src: Path, dst: Path, **options: Any) -> ConversionReport:
    return convert(ConvertConfig(src, dst, **{"workers": 1, **options}), progress=False)


def read(folder: Path) -> list[dict[str, Any]]:
    """The samples of a folder of shards, without any code of ours."""
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(wds.WebDataset(paths, shardshuffle=False, empty_check=False)) if paths else []
    for sample in samples:
        sample["json"] = json.loads(sample["json"])
    return samples


def shown(sample: dict[str, Any]) -> list[Image.Image]:
    """The images of a sample that :func:`read` gave, as training sees them."""
    return parse_sample({**sample, "json": json.dumps(sample["json"]).encode()}).images


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def reject_one(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What `rejected.jsonl` says of one bad record among good ones, of which none may be lost."""

    def run(bad: Any, **options: Any) -> dict[str, Any]:
        src = write_lines(tmp_path / "in" / "data.jsonl", [record(0), bad, record(2)])
        report = make(src, tmp_path / "out", max_rejected=0.5, **options)
        assert [sample["json"]["id"] for sample in read(tmp_path / "out")] == ["r0", "r2"]
        (row,) = rejected(tmp_path / "out")
        assert report.rejected == {row["kind"]: 1}
        assert row["where"] == f"{src}:2"
        return row

    return run
