"""Drafts of samples from records of a benchmark: the prompt with images in place, and columns for its scorer."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from avar_lightning.conversion.config import ConvertConfig
from avar_lightning.conversion.fields import plain
from avar_lightning.conversion.formats import Draft
from avar_lightning.conversion.rejecting import BadRecord, short

_MARKER = re.compile(r"<image (\d+)>")
MAX_LITERAL = 20_000  # characters


def draft(
    record: Mapping[str, Any],
    config: ConvertConfig,
    *,
    benchmark: str,
    source: str,
    id: Any,
    answer: Any,
    prompt: str,
    images: Sequence[Any] = (),
    numbered: Mapping[int, Any] | None = None,
    **columns: Any,
) -> Draft:
    """A prompt without a response.

    Args:
        record: The record, for messages.
        config: What the conversion was asked for: a system prompt.
        benchmark: Column of that name.
        source: The dataset on the Hub.
        id: The record's own name.
        answer: The right answer.
        prompt: The user turn.
        images: References that stand before the prompt.
        numbered: References by number; they stand where the prompt says `<image 1>`.
        columns: Further columns, for the scorer and by category.

    Raises:
        BadRecord: The prompt is empty, there is no right answer, or a marker names an image that is not there.
    """
    if not prompt.strip():
        raise BadRecord("no question", f"the question of record {short(id)} is empty; expected text")
    if answer is None or answer == "":
        raise BadRecord(
            "no answer", f"record {short(id)} of {benchmark} has no right answer; expected the labelled split"
        )
    parts, references = place_images(prompt, numbered) if numbered else ([text_part(prompt)], [])
    content = [*({"type": "image"} for _ in images), *parts]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if config.system:
        messages.insert(0, {"role": "system", "content": config.system})
    return Draft(
        messages=messages,
        images=[*images, *references],
        answer=plain(answer, "answer"),
        id=str(id),
        source=source,
        columns={"benchmark": benchmark, **{name: plain(value, name) for name, value in columns.items()}},
    )


def place_images(text: str, numbered: Mapping[int, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Text parts and image parts of a text with `<image 1>` in it, and the references in the order of their parts.

    An image that is marked twice is shown twice. One that nothing marks belongs to the explanation and is left out, but
    where there is no marker at all, all images stand before the text.

    Raises:
        BadRecord: A marker names an image that is not there.

    >>> place_images("<image 2> or <image 1>?", {1: "a.png", 2: "b.png"})
    ([{'type': 'image'}, {'type': 'text', 'text': ' or '}, {'type': 'image'}, {'type': 'text', 'text': '?'}], \
['b.png', 'a.png'])
    """
    pieces = _MARKER.split(text)  # text, number, text, number, …, text
    numbers = [int(number) for number in pieces[1::2]]
    missing = [number for number in numbers if numbered.get(number) is None]
    if missing:
        raise BadRecord("missing image", f"the text shows <image {missing[0]}>, but image_{missing[0]} is empty")
    if not numbers:
        references = [numbered[number] for number in sorted(numbered) if numbered[number] is not None]
        return [*({"type": "image"} for _ in references), text_part(text)], references
    parts = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append({"type": "image"})
        elif piece:
            parts.append(text_part(piece))
    return parts, [numbered[number] for number in numbers]


def text_part(text: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "text", "text": text}


def need(record: Mapping[str, Any], name: str) -> Any:
    """A field that every record of a benchmark has.

    Raises:
        BadRecord: It has none of this name, or null.
    """
    value = record.get(name)
    if value is None:
        raise BadRecord(
            f"no {name}", f"the record has no {name!r} but {short(sorted(record))}; expected the hub's own file"
        )
    return value


def literal_list(record: Mapping[str, Any], name: str) -> list[str]:
    """A list, or a string that is one in Python's notation, as MMMU writes its options; empty for neither or null.

    Raises:
        BadRecord: The string begins like a list but is none.
    """
    value = record.get(name)
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    text = str(value or "").strip()
    if not text.startswith("["):
        return []
    try:
        found = ast.literal_eval(text) if len(text) < MAX_LITERAL else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list):
        raise BadRecord(f"bad {name}", f"{name} is {short(text)}; expected a list in Python's notation")
    return [str(item) for item in found]
