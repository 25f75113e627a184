"""Turns of a conversation into chat messages, each image in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from avar_lightning.conversion.fields import plain
from avar_lightning.conversion.rejecting import BadRecord, short

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TOOL_ROLES = ("tool", "function", "function_call", "observation")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64")


@dataclass
class Turn:
    """One turn as the input has it.

    Attributes:
        role: system, user or assistant.
        content: Text, in which ``<image>`` marks images, or a list of parts.
        more: Other fields of the message, which a chat template may know.
    """

    role: str
    content: Any
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, turn: Any, index: int) -> Turn:
        """Read ``{"from": …, "value": …}`` or ``{"role": …, "content": …}``.

        Raises:
            BadRecord: When it is neither, or its role is unknown.
        """
        if not isinstance(turn, Mapping):
            raise BadRecord("bad turn", f"turn {index} is {short(turn)}; expected an object with role and content")
        given = {name: value for name, value in turn.items() if value is not None}
        who, what = ("role", "content") if "role" in given else ("from", "value")
        role, content = given.pop(who, None), given.pop(what, None)
        if given.pop("tool_calls", None) or (isinstance(role, str) and role in _TOOL_ROLES):
            raise BadRecord("tool turns", f"turn {index} is from {role!r} with tools; expected system, user, assistant")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRecord(
                "unknown role",
                f"turn {index} is from {short(role)}; expected one of {', '.join(dict.fromkeys(_ROLES))}",
            )
        return cls(_ROLES[role], content, plain(given, f"turn {index}"))


def build_messages(
    turns: list[Turn], images: list[Any], *, prepend: bool = False
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Chat messages with a part for each image, and the images in the order of these parts.

    Args:
        turns: The conversation.
        images: References beside the conversation; parts that hold no reference of their own show these in order.
        prepend: Where no turn shows an image, show them all before the first question.

    Raises:
        BadRecord: When the turns show more or fewer images than there are.

    >>> build_messages([Turn("user", "Is <image> like <image>?")], ["a.png", "b.png"])[0][0]["content"][:3]
    [{'type': 'text', 'text': 'Is '}, {'type': 'image'}, {'type': 'text', 'text': ' like '}]
    """
    contents = [_parts(turn.content, index) for index, turn in enumerate(turns)]
    shown = [part for parts in contents for part in parts if part["type"] == "image"]
    waiting = sum("reference" not in part for part in shown)
    if not shown and images and prepend:
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            shown = [{"type": "image"} for _ in images]
            contents[first] = shown + contents[first]
            waiting = len(images)
    if waiting != len(images):
        raise BadRecord(
            "wrong number of images",
            f"the text shows {waiting} image(s) but the record has {len(images)}"
            + (
                f"; write {PLACEHOLDER} for each, or pass --prepend-images to show them before the first question"
                if not shown
                else f"; expected one {PLACEHOLDER} or image part for each"
            ),
        )
    others = iter(images)
    references = [part["reference"] if "reference" in part else next(others) for part in shown]
    messages = []
    for turn, parts in zip(turns, contents):
        content: Any = [{"type": "image"} if part["type"] == "image" else part for part in parts]
        if isinstance(turn.content, str) and not any(part["type"] == "image" for part in parts):
            content = turn.content
        messages.append({"role": turn.role, "content": content, **turn.more})
    return messages, references


def _parts(content: Any, index: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise BadRecord("bad turn", f"turn {index} says {short(content)}; expected text or a list of parts")
    return [_part(part, index) for part in content]


def _split(text: str) -> list[dict[str, Any]]:
    """Text at its placeholders; the line break that usually stands between an image and the text goes with it."""
    pieces = text.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _part(part: Any, index: int) -> dict[str, Any]:
    """A part of a message; an image part may hold its reference under one of several names."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = given.get("type", "text" if "text" in given else "image" if "image" in given else None)
    if kind == "text" and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    if kind in ("image", "image_url", "input_image"):
        key = next((name for name in _IMAGE_KEYS if name in given), None)
        if key is None:
            return {"type": "image"}
        value = given[key]
        if key == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        return {"type": "image", "reference": f"data:;base64,{value}" if key == "base64" else value}
    raise BadRecord("bad part", f"turn {index} has a part {short(part)}; expected an image or text")
