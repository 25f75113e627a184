"""The fields of one record: which are which, and which are left for columns."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Mapping
from typing import Any

from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.rejecting import BadRecord, short
from avar_lightning.files import finite

_NUMBERED = [f"image{bar}{number}" for bar in ("_", "") for number in range(1, 21)]
_OTHER_MEDIA = ("videos", "video", "audios", "audio")
_SCHEMA = ("messages", "answer", "id", "source")


class Fields:
    """A record whose fields are taken one by one; what nobody took becomes columns.

    Args:
        record: The record as the input has it.
        config: Names that differ from the usual ones, and fields to drop.
    """

    def __init__(self, record: Mapping[str, Any], config: ConvertConfig) -> None:
        self._record = {name: value for name, value in record.items() if name not in config.drop}
        self._config = config
        self._taken: set[str] = set()

    def take(self, ours: str, *, usual: bool = True) -> Any:
        """The value of one of our fields; None where there is none.

        Args:
            ours: The field.
            usual: Look under all its usual names where none was given, and not only under its own.
        """
        names = self._config.names(ours) if usual or ours in self._config.columns else (ours,)
        for name in names:
            value = self._record.get(name)
            if value is not None:
                self._taken.add(name)
                return value
        self._taken.update(names)  # a null is no column
        return None

    def text(self, ours: str) -> str | None:
        """As :meth:`take`, for a field that must be text; numbers are.

        Raises:
            BadRecord: When it is something else.
        """
        value = self.take(ours)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is None or isinstance(value, str):
            return value
        raise BadRecord("not text", f"{ours} is {short(value)}; expected text")

    def images(self) -> list[Any]:
        """References to images: ``images``, ``image``, or ``image_1``, ``image_2``, …"""
        value = self.take("images")
        if value is None and "images" not in self._config.columns and "image" not in self._config.columns:
            numbered = [name for name in _NUMBERED if self._record.get(name) is not None]
            self._taken.update(name for name in _NUMBERED if name in self._record)
            return [self._record[name] for name in numbered]
        if value is None or value == "":
            return []
        return list(value) if isinstance(value, list | tuple) else [value]

    def refuse_other_media(self) -> None:
        """Raise BadRecord for videos, audio and tools, which a shard cannot hold."""
        for name in _OTHER_MEDIA:
            if self._record.get(name):
                raise BadRecord("video or audio", f"it has {name}; expected images and text alone")
            self._taken.add(name)
        if self._record.get("tools"):
            raise BadRecord("tools", "it has tools; expected turns of system, user and assistant alone")
        self._taken.add("tools")

    def columns(self, **ours: Any) -> dict[str, Any]:
        """Every field that nobody took, as JSON has it, and ``ours``.

        A field whose name the schema needs for another one is kept as ``original_NAME``.

        Raises:
            BadRecord: When one holds bytes.
        """
        columns = {}
        for name, value in self._record.items():
            if name not in self._taken:
                clash = name in _SCHEMA or name in ours
                columns[f"original_{name}" if clash else name] = plain(value, name)
        return columns | ours


def plain(value: Any, name: str) -> Any:
    """The value as JSON has it; dates and decimal numbers become text, and what is not finite null.

    Raises:
        BadRecord: When it holds bytes.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item, name) for item in value]
    if isinstance(value, bytes | bytearray):
        raise BadRecord(
            "bytes in a column",
            f"field {name!r} holds bytes, which JSON cannot; if it is the image pass --column image={name}, else "
            f"leave it out with --drop {name}",
        )
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    return finite(value)
