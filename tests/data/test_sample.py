"""Samples: what is accepted, and what each kind of bad sample is told."""

import io
import json

import pytest
from PIL import EpsImagePlugin, Image

from avar_lightning.data.sample import IMAGE_FORMATS, SampleError, check_messages, decode_image, parse_sample
from tests.data.conftest import Files, make_sample, sample_files

USER = {"role": "user", "content": "What is it?"}


def raw(files: Files) -> dict[str, object]:
    return {"__key__": "k7", "__url__": "some.tar", **files}


def document(**changes: object) -> bytes:
    return json.dumps({"messages": [USER], **changes}).encode()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_good_sample_keeps_every_field():
    sample = parse_sample(raw(sample_files(make_sample(3, images=2))))
    assert (sample.id, sample.answer, sample.source, sample.columns) == ("s3", "red", None, {"index": 3})
    assert (sample.key, sample.shard) == ("k7", "some.tar")
    assert [image.getpixel((0, 0)) for image in sample.images] == [(3, 0, 0), (3, 10, 0)]
    assert sample.fields() == {"answer": "red", "id": "s3", "source": None, "index": 3}


def test_id_defaults_to_the_key():
    assert parse_sample(raw({"json": document()})).id == "k7"


def test_images_come_in_the_order_of_their_number():
    pictures = {f"{n}.png": encoded(Image.new("RGB", (4, 4), (n, 0, 0))) for n in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    messages = [{"role": "user", "content": [{"type": "image", "text": None}] * 11}]
    sample = parse_sample(raw({"json": document(messages=messages), **pictures}))
    assert [image.getpixel((0, 0))[0] for image in sample.images] == list(range(11))


ONE_IMAGE = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
PNG = encoded(Image.new("RGB", (64, 64), "red"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"0.png": PNG}, "no KEY.json"),
        ({"json": b"{"}, "JSON cannot be read"),
        ({"json": b"\xff\xfe{}"}, "JSON cannot be read"),
        ({"json": b"[1]"}, "expected an object"),
        ({"json": b"[" * 700 + b"]" * 700}, "its JSON is "),
        ({"json": b'{"x":' + b"[" * 3000 + b"]" * 3000 + b"}"}, "its JSON is nested too deeply"),
        ({"json": b"{}"}, "'messages' is None"),
        ({"json": document(messages=[])}, "non-empty list"),
        ({"json": document(messages=["hello"])}, "message 0 has role 'hello'"),
        ({"json": document(messages=[{"role": "tool", "content": ""}])}, "expected one of system, user, assistant"),
        ({"json": document(messages=[{"role": "assistant", "content": "Red."}])}, "has no user turn"),
        ({"json": document(messages=[{"role": "user"}])}, "message 0 has content None"),
        ({"json": document(messages=[{"role": "user", "content": [{"type": "video"}]}])}, "has the part"),
        ({"json": document(messages=[{"role": "user", "content": [{"type": "text"}]}])}, "has the part"),
        ({"json": document(messages=[{"role": "user", "content": [{"type": "image", "url": "x"}]}])}, "has the part"),
        ({"json": document(messages=[{"role": "user", "content": ["x"]}])}, "has the part"),
        ({"json": document(), "0.png": PNG}, r"show 0 image\(s\) but the sample has 1 image file\(s\)"),
        ({"json": document(**ONE_IMAGE)}, r"show 1 image\(s\) but the sample has 0"),
        ({"json": document(**ONE_IMAGE), "1.png": PNG}, r"numbered \[1\]; expected 0 to 0"),
        ({"json": document(**ONE_IMAGE), "0.png": PNG, "0.jpg": PNG}, "two files, KEY.0.png and KEY.0.jpg"),
        ({"json": document(**ONE_IMAGE), "png": PNG}, "unexpected file KEY.png"),
        ({"json": document(**ONE_IMAGE), "0.png": b""}, "image KEY.0.png cannot be decoded"),
        ({"json": document(**ONE_IMAGE), "0.png": encoded(Image.new("RGB", (4, 4)), "EPS")}, "cannot be decoded"),
        ({"json": document(**ONE_IMAGE), "0.png": encoded(Image.new("RGB", (4, 4)), "PPM")}, "cannot be decoded"),
        ({"json": document(**ONE_IMAGE), "0.png": PNG[: len(PNG) // 2]}, "image KEY.0.png cannot be decoded"),
        ({"json": document(**ONE_IMAGE), "0.png": PNG[:60] + b"\0" * 30 + PNG[90:]}, "cannot be decoded"),
    ],
)
def test_a_bad_sample_is_told_what_is_wrong_with_shard_and_key(files: Files, says: str):
    with pytest.raises(SampleError, match=says) as caught:
        parse_sample(raw(files))
    assert str(caught.value).startswith("some.tar: sample 'k7': ")


@pytest.mark.parametrize(
    "limit", [64 * 64 - 1, 64 * 64 // 2 - 1]
)  # Pillow warns above the limit, raises above twice that
def test_decompression_limits_stay_on(monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(SampleError, match="DecompressionBomb"):
        parse_sample(raw({"json": document(**ONE_IMAGE), "0.png": PNG}))


@pytest.mark.parametrize("kind", [*IMAGE_FORMATS, "MPO"])
def test_every_format_of_shards_is_decoded(kind: str):
    """By what the bytes are, and not by their name."""
    sample = parse_sample(raw({"json": document(**ONE_IMAGE), "0.png": encoded(Image.new("RGB", (4, 4)), kind)}))
    assert sample.images[0].size == (4, 4)


def test_a_format_that_runs_programs_is_not_opened(monkeypatch: pytest.MonkeyPatch):
    def ghostscript(*_: object, **__: object) -> None:
        pytest.fail("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    monkeypatch.setattr(EpsImagePlugin, "EpsImageFile", ghostscript)
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        decode_image("KEY.0.png", encoded(Image.new("RGB", (4, 4)), "EPS"))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    sample = parse_sample(raw({"json": document(**ONE_IMAGE), "0.jpg": encoded(image, "JPEG", exif=exif)}))
    assert sample.images[0].size == (16, 8)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    name = "0.tif" if mode == "CMYK" else "0.png"
    sample = parse_sample(raw({"json": document(**ONE_IMAGE), name: encoded(Image.new(mode, (4, 4)), kind)}))
    assert sample.images[0].mode == "RGB"


def test_transparency_lies_on_white():
    clear = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    sample = parse_sample(raw({"json": document(**ONE_IMAGE), "0.png": clear}))
    assert sample.images[0].getpixel((0, 0)) == (255, 255, 255)


def test_check_messages_accepts_a_system_turn_and_several_images():
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    check_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], 2)
