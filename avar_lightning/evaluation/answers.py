"""The folder of an evaluation: whose answers it holds, and the lines in which they are kept.

Each process writes `answers_<rank>.jsonl`, one line a sample. A line counts once it has its end, so a process may be
killed at any moment: the next run drops the half line and answers what is missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from avar_lightning.data.publishing import alone
from avar_lightning.files import drop_half_line, json_line, whole_lines, write_json, write_jsonl
from avar_lightning.interventions import METRICS

ABOUT = "evaluation.json"
SCORES = tuple(name for name in METRICS if name != "accuracy")
"""Of each answer: VAS of the prompt's user tokens and of the answer itself, both reductions; null where undefined."""
NOT_COMPARED = ("model", "data")
"""One name may be another's folder, and the weights tell them apart; benchmarks may come one after the other."""
WAIT = 10.0
"""Seconds for which a folder may still be held by the data loader's workers of a run that was killed."""
Key = tuple[str, str]
"""Benchmark and id of a sample."""


def key_of(row: Mapping[str, Any]) -> Key:
    """By which a sample is known."""
    return str(row["benchmark"]), str(row["id"])


def open_folder(folder: Path, now: Mapping[str, Any], *, overwrite: bool, how: str) -> ExitStack:
    """Make the folder ready for answers of one model; for one process of a run, before any of them adds to it.

    Args:
        folder: Made where it is missing.
        now: Of `about_model`, and `data` of `about_shards`, which adds to what is there.
        overwrite: Delete answers that are there.
        how: How somebody who wants that says it.

    Returns:
        What keeps other runs out until it is closed.

    Raises:
        ValueError: Another run is at work there, or the folder holds answers that were made otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(alone(folder, seconds=WAIT))
        except RuntimeError as error:
            raise ValueError(
                f"another evaluation is at work in {folder}, expected one at a time; wait for it, or give another "
                "output."
            ) from error
        _prepare(folder, json.loads(json.dumps(now)), overwrite=overwrite, how=how)
        return held.pop_all()


def _prepare(folder: Path, now: dict[str, Any], *, overwrite: bool, how: str) -> None:
    before = read_about(folder) if (folder / ABOUT).is_file() and not overwrite else {}
    if overwrite:
        for path in answer_files(folder):
            path.unlink()
    elif before:
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
    write_json(folder / ABOUT, now | {"data": before.get("data", {}) | now.get("data", {})})
    for path in answer_files(folder):
        drop_half_line(path)


def read_about(folder: Path) -> dict[str, Any]:
    """Whose answers a folder holds, and of which data."""
    return dict(json.loads((folder / ABOUT).read_text()))


def answer_files(folder: Path) -> list[Path]:
    """Files of answers, one for each process of any run."""
    return sorted(folder.glob("answers_*.jsonl"))


def read_answers(folder: Path) -> dict[Key, dict[str, Any]]:
    """Every answer in a folder, NaN for a VAS that is undefined.

    Raises:
        ValueError: A line is none of ours, or a sample was answered twice.
    """
    found: dict[Key, dict[str, Any]] = {}
    for path in answer_files(folder):
        for number, line in enumerate(whole_lines(path), 1):
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


def renew_columns(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put the columns of `rows` into the files of answers, where these were kept with others; alone in the folder."""
    now = {key_of(row): row["columns"] for row in rows}
    for path in answer_files(folder):
        kept = [json.loads(line) for line in whole_lines(path)]
        renewed = [row | {"columns": now.get(key_of(row), row["columns"])} for row in kept]
        if list(map(json_line, renewed)) != list(map(json_line, kept)):
            write_jsonl(path, renewed)


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
