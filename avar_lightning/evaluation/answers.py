"""The folder of an evaluation: whose answers it holds, and every answer on disk as soon as it is there.

Each process writes `answers_<rank>.jsonl`, one line a sample. A line counts once it has its end, so a process may be
killed at any moment: the next run drops the half line and answers what is missing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from avar_lightning.files import json_line, write_json
from avar_lightning.interventions import METRICS

ABOUT = "evaluation.json"
SCORES = tuple(name for name in METRICS if name != "accuracy")
"""Of each answer: VAS of the prompt's user tokens and of the answer itself, both reductions; null where undefined."""
NOT_COMPARED = ("model",)
"""Of what is known of the model: one name may be another's folder, and the weights tell them apart."""
Key = tuple[str, str]
"""Benchmark and id of a sample."""


def key_of(row: Mapping[str, Any]) -> Key:
    """By which a sample is known."""
    return str(row["benchmark"]), str(row["id"])


def open_folder(folder: Path, now: Mapping[str, Any], *, overwrite: bool, how: str) -> None:
    """Make the folder ready for answers of one model; for one process alone, while no other one writes there.

    Args:
        folder: Made where it is missing.
        now: Of `about_model`.
        overwrite: Delete answers that are there.
        how: How somebody who wants that says it.

    Raises:
        ValueError: The folder holds answers that were made otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about, now = folder / ABOUT, json.loads(json.dumps(now))
    if overwrite:
        for path in answer_files(folder):
            path.unlink()
    elif about.is_file():
        before = json.loads(about.read_text())
        other = [name for name, value in now.items() if name not in NOT_COMPARED and before.get(name) != value]
        if other:
            first = f"{other[0]} {before.get(other[0])!r}, expected {now[other[0]]!r}"
            raise ValueError(
                f"{folder} holds answers of another evaluation ({before.get('model')}; its {first}"
                f"{', and other ' + ', '.join(other[1:]) if other[1:] else ''}); give another output, or {how} to "
                "delete them."
            )
    elif answer_files(folder):
        raise ValueError(f"{folder} holds answers without {ABOUT}, expected both; give another output, or {how}.")
    write_json(about, now)
    for path in answer_files(folder):
        _drop_half_line(path)


def answer_files(folder: Path) -> list[Path]:
    """Files of answers, one for each process of any run."""
    return sorted(folder.glob("answers_*.jsonl"))


def _drop_half_line(path: Path) -> None:
    """A process that was killed while it wrote leaves a line without its end."""
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def read_answers(folder: Path) -> dict[Key, dict[str, Any]]:
    """Every answer in a folder, NaN for a VAS that is undefined.

    Raises:
        ValueError: A line is none of ours, or a sample was answered twice.
    """
    found: dict[Key, dict[str, Any]] = {}
    for path in answer_files(folder):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row: dict[str, Any] = json.loads(line)
                row |= {name: math.nan for name in SCORES if row[name] is None}
                key = key_of(row)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is no answer of an evaluation ({type(error).__name__}: {error}), expected one "
                    "JSON object a line; delete the line, and its sample is answered again."
                ) from error
            if key in found:
                raise ValueError(twice(key))
            found[key] = row
    return found


def twice(key: Key) -> str:
    """What is wrong with samples that share benchmark and id."""
    return (
        f"sample {key[1]!r} of {key[0]} is there twice, expected an id of its own for each sample; check that no shard "
        "is given twice, or write the shards again with avar convert --benchmark."
    )


def in_order(answers: Mapping[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers by benchmark, then by id with its numbers as numbers: an order that does not depend on who made them."""

    def place(key: Key) -> tuple[str, list[tuple[int, str]]]:
        parts = re.split(r"([0-9]+)", key[1])
        return key[0], [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)]

    return [answers[key] for key in sorted(answers, key=place)]


class AnswerFile:
    """A process's own file, to which answers are appended."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = (folder / f"answers_{rank}.jsonl").open("a")

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write lines; they are on disk on return."""
        if lines := "".join(map(json_line, rows)):
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
