"""One training sample: its schema, and the checks that tell a good one from a bad one.

A sample is a conversation with its images. In a shard it is ``KEY.json`` beside ``KEY.0.png``,
``KEY.1.jpg``, … in the order in which the messages show them; see :mod:`avar_lightning.data.shards`.
"""

import io
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageOps

ROLES = ("system", "user", "assistant")
# What an image of a shard may be, by Pillow's names, and the suffix that a writer gives it. JPEG covers the MPO of
# phones. No other format is opened: some of Pillow's run other programs (EPS) whatever the name of the file.
IMAGE_FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tiff"}
_IMAGE_MEMBER = re.compile(r"(\d+)\.(png|jpg|jpeg|webp|bmp|gif|tif|tiff)")


class SampleError(ValueError):
    """A sample that cannot be used; the message names its shard, its key and what is wrong with it."""


@dataclass
class Sample:
    """A conversation, its images, and what else is known about it.

    Attributes:
        messages: Hugging Face chat messages; ``content`` is a string or a list of ``{"type": "image"}`` and
            ``{"type": "text", "text": …}`` parts.
        images: RGB images, in the order of the image parts.
        answer: What a reward or a scorer compares a completion with.
        id: The sample's name in its source; its key where the JSON has none.
        source: The data set that it comes from.
        columns: Every other field of the JSON, carried through to rewards and reports.
        key: Its name inside the shard, as in ``KEY.json``, without a dot; a writer numbers samples that
            have none.
        shard: Where it was read from.
    """

    messages: list[dict[str, Any]]
    images: list[Image.Image] = field(default_factory=list)
    answer: Any = None
    id: str = ""
    source: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    shard: str = ""

    def fields(self) -> dict[str, Any]:
        """All that is known beside messages and images: ``answer``, ``id``, ``source`` and every column."""
        return {"answer": self.answer, "id": self.id, "source": self.source, **self.columns}


def check_messages(messages: Any, num_images: int) -> None:
    """Check that messages are a conversation which shows exactly ``num_images`` images.

    Args:
        messages: What the field ``messages`` of a sample holds.
        num_images: Number of image files that come with it.

    Raises:
        ValueError: With one sentence that says what is wrong and what was expected.

    >>> check_messages([{"role": "assistant", "content": "Red."}], 0)
    Traceback (most recent call last):
    ...
    ValueError: the message list has no user turn; expected at least one message with role 'user'
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' is {_short(messages)}; expected a non-empty list of chat messages")
    shown = 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {index} has role {_short(role)}; expected one of {', '.join(ROLES)}")
        shown += _count_images(message.get("content"), index)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the message list has no user turn; expected at least one message with role 'user'")
    if shown != num_images:
        raise ValueError(
            f"the messages show {shown} image(s) but the sample has {num_images} image file(s); "
            'write one {"type": "image"} part for each file'
        )


def parse_sample(raw: Mapping[str, Any]) -> Sample:
    """Turn the files of one sample, as WebDataset groups them, into a checked :class:`Sample`.

    Args:
        raw: ``__key__``, ``__url__`` and the files' bytes by what follows the key: ``json``, ``0.png``, …

    Returns:
        The sample, its images decoded, upright (EXIF orientation applied) and RGB.

    Raises:
        SampleError: When the sample breaks the schema or an image cannot be decoded or is beyond Pillow's
            decompression limit.
    """
    key, shard = str(raw.get("__key__", "")), str(raw.get("__url__", ""))
    files = {name: value for name, value in raw.items() if not name.startswith("__")}
    try:
        document = _load_json(files.pop("json", None))
        names = _image_names(files)
        check_messages(document.get("messages"), len(names))
        images = [decode_image(f"KEY.{name}", files[name]) for name in names]
    except RecursionError as error:
        raise SampleError(f"{shard}: sample {key!r}: its JSON is nested too deeply to be read; flatten it") from error
    except ValueError as error:
        raise SampleError(f"{shard}: sample {key!r}: {error}") from error
    known = {name: document.pop(name, None) for name in ("messages", "answer", "id", "source")}
    return Sample(
        messages=known["messages"],
        images=images,
        answer=known["answer"],
        id=key if known["id"] is None else str(known["id"]),
        source=known["source"],
        columns=document,
        key=key,
        shard=shard,
    )


def _count_images(content: Any, index: int) -> int:
    """Number of image parts in a message's content, once that is known to be well formed."""
    if isinstance(content, str):
        return 0
    if not isinstance(content, Sequence):
        raise ValueError(f"message {index} has content {_short(content)}; expected a string or a list of parts")
    images = 0
    for part in content:
        # Arrow-made JSON fills the fields that a part lacks with null.
        given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        kind = given.pop("type", None)
        if kind == "image" and not given:
            images += 1
        elif kind != "text" or not isinstance(given.get("text"), str):
            raise ValueError(
                f"message {index} has the part {_short(part)}; expected "
                '{"type": "image"} (its file beside the JSON) or {"type": "text", "text": "…"}'
            )
    return images


def _load_json(value: bytes | None) -> dict[str, Any]:
    if value is None:
        raise ValueError("there is no KEY.json beside its files; expected one JSON object a sample")
    try:
        document = json.loads(value)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its JSON cannot be read ({error}); expected one JSON object in UTF-8") from error
    if not isinstance(document, dict):
        raise ValueError(f"its JSON is {_short(document)}; expected an object with the field 'messages'")
    return document


def _image_names(files: Mapping[str, bytes]) -> list[str]:
    """Names of the image files in the order of their index, which must run from 0 without a gap."""
    indices: dict[int, str] = {}
    for name in files:
        match = _IMAGE_MEMBER.fullmatch(name)
        if match is None:
            raise ValueError(f"unexpected file KEY.{name}; expected KEY.json and images KEY.0.png, KEY.1.jpg, …")
        if indices.setdefault(int(match[1]), name) != name:
            raise ValueError(f"two files, KEY.{indices[int(match[1])]} and KEY.{name}, for image {match[1]}")
    if sorted(indices) != list(range(len(indices))):
        raise ValueError(f"its images are numbered {sorted(indices)}; expected 0 to {len(indices) - 1}")
    return [indices[index] for index in range(len(indices))]


def decode_image(name: str, value: bytes, *, formats: Iterable[str] = IMAGE_FORMATS) -> Image.Image:
    """Decode an image as every reader of shards does: upright, RGB, within Pillow's limit for decompression.

    Args:
        name: What a message calls it.
        value: The encoded image.
        formats: Pillow's names of the formats that are tried, whatever the name says.

    Raises:
        ValueError: When it cannot be decoded or is none of these; its cause is Pillow's error.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; such an image is refused as well.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(value), formats=tuple(formats)) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error on bad bytes
        raise ValueError(f"image {name} cannot be decoded ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency laid on white: charts are often drawn in black on nothing."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"
