"""Images that records name or hold: found inside their folder, checked by decoding, stored as they are."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from avar_lightning.conversion.rejecting import BadRecord, short
from avar_lightning.data.sample import IMAGE_FORMATS, decode_image

MAX_BYTES = 1 << 28  # of one encoded image
_KEPT = {**IMAGE_FORMATS, "MPO": IMAGE_FORMATS["JPEG"]}  # stored as they are; the rest is encoded anew
_FORMATS = (*IMAGE_FORMATS, "AVIF", "ICO", "JPEG2000", "PPM", "TGA")  # no other one is opened, as in shards
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


class ImageFolder:
    """Where the paths of images begin, and what they must not leave.

    Args:
        folder: An existing folder; links that it holds may not point out of it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()

    def load(self, reference: Any) -> tuple[str, bytes]:
        """The suffix and the bytes of an image, once it is known to decode.

        Args:
            reference: A path, a ``data:`` URL, bytes, or a dictionary with ``bytes``, ``path`` or ``url``.

        Raises:
            BadRecord: When it is none of these, leaves the folder, is missing, or cannot be decoded within Pillow's
                limit for decompression.
        """
        if isinstance(reference, dict):
            parts = [reference.get(name) for name in ("bytes", "path", "url")]
            reference = next((part for part in parts if part), None)
        if isinstance(reference, str) and _DATA.match(reference):
            return check_image(_decode_base64(reference[reference.index(",") + 1 :]), "the data: URL")
        if isinstance(reference, str) and reference:
            return check_image(_read(self.find(reference), reference), short(reference))
        if isinstance(reference, bytes | bytearray) and reference:
            return check_image(bytes(reference), "the image")
        raise BadRecord("no image given", f"an image is {short(reference)}; expected a path, bytes or a data: URL")

    def find(self, reference: str) -> Path:
        """The file that a path names.

        Raises:
            BadRecord: When it is a URL, leads out of the folder, or is no readable file.
        """
        url = _URL.match(reference)
        if url is not None and url[1].lower() != "file":
            raise BadRecord("URL", f"image {short(reference)} is a URL; download it and give its path")
        try:
            path = Path(unquote(reference[len(url[0]) :]) if url else reference)
            found = (self.folder / path).resolve()
            if not found.is_relative_to(self.folder):
                raise BadRecord(
                    "path outside the folder",
                    f"image {short(reference)} leads out of {self.folder}; expected a path inside "
                    "(--images names the folder that paths begin at)",
                )
            if not found.is_file():
                raise BadRecord(
                    "missing image",
                    f"there is no file {short(reference)} in {self.folder} (--images names the folder)",
                )
            if found.stat().st_size > MAX_BYTES:
                raise BadRecord("image too large", f"image {short(reference)} has more than {MAX_BYTES} bytes")
        except (OSError, ValueError, RuntimeError) as error:  # NUL, a name that is too long, a circle of links
            if isinstance(error, BadRecord):
                raise
            raise BadRecord("bad path", f"image {short(reference)} is no path of a file ({error})") from error
        return found


def check_image(value: bytes, name: str) -> tuple[str, bytes]:
    """The suffix under which a shard stores an image, and its bytes: its own where the reader knows the format.

    Args:
        value: The encoded image.
        name: What a message calls it.

    Raises:
        BadRecord: When it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decoding refuses it in so many words
            with Image.open(io.BytesIO(value), formats=_FORMATS) as image:
                kind = image.format or ""
    except Image.DecompressionBombError as error:
        raise BadRecord("decompression bomb", f"image {name} is refused ({error})") from error
    except Exception as error:  # Pillow's plugins raise anything on bad bytes
        raise BadRecord(
            "unreadable image",
            f"image {name} cannot be decoded ({type(error).__name__}); expected one of {', '.join(_FORMATS)}",
        ) from error
    try:
        decoded = decode_image(name, value, formats=_FORMATS)
    except ValueError as error:
        bomb = isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning)
        raise BadRecord("decompression bomb" if bomb else "unreadable image", str(error)) from error
    if kind in _KEPT:
        return _KEPT[kind], value
    buffer = io.BytesIO()
    decoded.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _read(path: Path, reference: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRecord("unreadable image", f"image {short(reference)} cannot be read ({error.strerror})") from error


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("unreadable image", f"the data: URL is not base64 ({error}): {short(text)}") from error
