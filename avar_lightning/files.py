"""Files that are whole or not there, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a file and its folder; a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON: null for NaN and infinity, text for what JSON does not know."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one strict JSON object a line."""
    write_text(path, "".join(json_line(row) for row in rows))


def drop_half_line(path: Path) -> None:
    """Cut off what a process that was killed while it appended left of a last line."""
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def whole_lines(path: Path) -> list[str]:
    """Lines that have their end.

    Not those of `splitlines`: texts hold other line separators, which JSON leaves as they are (U+2028, U+0085).
    """
    return path.read_text().split("\n")[:-1]


def json_line(row: Mapping[str, Any]) -> str:
    """One strict JSON object with its line end."""
    return json.dumps(finite(row), allow_nan=False, ensure_ascii=False, default=str) + "\n"


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, however deep.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
