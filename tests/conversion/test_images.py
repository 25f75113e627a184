"""Images: found inside their folder and nowhere else, decoded before they are believed, stored as they are."""

from __future__ import annotations

import base64
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from avar_lightning.conversion import images
from avar_lightning.conversion.images import ImageFolder, check_image
from avar_lightning.conversion.rejecting import BadRecord
from avar_lightning.data.sample import decode_image
from tests.conversion.conftest import add_pictures, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in `in`, and one beside it that no path may reach."""
    (tmp_path / "secret.png").write_bytes(picture("blue"))
    (tmp_path / "in-too").mkdir()
    (tmp_path / "in-too" / "secret.png").write_bytes(picture("blue"))
    folder = add_pictures(tmp_path / "in")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "pics" / "1.png")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("../secret.png", "path outside the folder"),
        ("pics/../../secret.png", "path outside the folder"),
        ("../in-too/secret.png", "path outside the folder"),
        ("/etc/passwd", "path outside the folder"),
        ("file:///etc/passwd", "path outside the folder"),
        ("file://%2e%2e/secret.png", "path outside the folder"),
        ("link.png", "path outside the folder"),
        ("linked/secret.png", "path outside the folder"),
        ("circle", "bad path"),
        ("pics/\0.png", "bad path"),
        ("x" * 5000, "bad path"),
        ("\ud800.png", "bad path"),
        ("nothing.png", "missing image"),
        ("pics", "missing image"),
        ("pipe.png", "missing image"),
        ("https://host/a.png", "URL"),
        ("s3://bucket/a.png", "URL"),
        ("text.png", "unreadable image"),
        ("empty.png", "unreadable image"),
        ("data:image/png;base64,!!!!", "unreadable image"),
        ("data:image/png;base64,AAAA", "unreadable image"),
        ("", "no image given"),
        (None, "no image given"),
        (7, "no image given"),
        ({"bytes": None, "path": None}, "no image given"),
        ({"bytes": b"no image", "path": "pics/1.png"}, "unreadable image"),
        ({"path": "../secret.png"}, "path outside the folder"),
    ],
)
def test_what_is_refused(folder: Path, reference: Any, kind: str) -> None:
    with pytest.raises(BadRecord) as caught:
        ImageFolder(folder).load(reference)
    assert caught.value.kind == kind
    assert "expected" in str(caught.value) or kind not in ("no image given", "path outside the folder")


def test_what_is_taken(folder: Path) -> None:
    path = folder / "pics" / "1.png"
    content = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    ways = [
        "pics/1.png",
        "./pics//1.png",
        "pics/../pics/1.png",
        str(path),
        f"file://{path}",
        "inside.png",
        url,
        content,
    ]
    ways += [{"bytes": content, "path": "/elsewhere.png"}, {"bytes": None, "path": "pics/1.png"}, {"url": url}]
    for way in ways:
        assert ImageFolder(folder).load(way) == ("png", content), way


@pytest.mark.parametrize(
    ("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp"), ("GIF", "gif"),
                         ("TIFF", "tiff"), ("MPO", "jpg")]
)  # fmt: skip
def test_bytes_are_kept_where_the_reader_knows_the_format(kind: str, suffix: str) -> None:
    value = picture("red", kind)
    assert check_image(value, "x") == (suffix, value)


def test_another_format_is_encoded_anew_without_loss() -> None:
    suffix, value = check_image(picture((1, 2, 3), "PPM"), "x")
    assert suffix == "png"
    assert decode_image("x", value).getpixel((0, 0)) == (1, 2, 3)


def test_a_format_that_runs_programs_is_not_opened() -> None:
    with pytest.raises(BadRecord, match="cannot be decoded"):
        check_image(picture("red", "EPS"), "x")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_half_an_image(kind: str, share: float) -> None:
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    whole = images.io.BytesIO()
    noise.save(whole, kind)
    with pytest.raises(BadRecord) as caught:
        check_image(whole.getvalue()[: int(len(whole.getvalue()) * share)], "x")
    assert caught.value.kind == "unreadable image"


def png_header(width: int, height: int) -> bytes:
    """A small file that says that it is a huge image."""

    def part(name: bytes, value: bytes) -> bytes:
        return struct.pack(">I", len(value)) + name + value + struct.pack(">I", zlib.crc32(name + value))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 1000)) + part(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])
def test_decompression_bombs(side: int) -> None:
    """Between Pillow's limit and twice that it warns, beyond it raises: neither is let in."""
    with pytest.raises(BadRecord) as caught:
        check_image(png_header(side, side), "x")
    assert caught.value.kind == "decompression bomb"


def test_a_file_beyond_all_measure_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(BadRecord, match="more than 10 bytes"):
        ImageFolder(folder).load("pics/1.png")
