"""The answers of one run: those that its folder held, and those that its processes add."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from avar_lightning.benchmarks import benchmark_of
from avar_lightning.evaluation.answers import Key, in_order, key_of, read_answers, twice
from avar_lightning.files import json_line

Row = dict[str, Any]


class AnswerBook:
    """A process's view of the folder, and its own file there, to which answers are appended.

    Args:
        folder: Of `open_folder`, to which no process adds before every one has its book.
        rank: Of the process.

    Attributes:
        num_old: Answers that were there.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._answers = read_answers(folder)
        self._old = set(self._answers)
        self._seen: dict[Key, None] = {}
        self._file = (folder / f"answers_{rank}.jsonl").open("a")
        self.num_old = len(self._old)

    def missing(self, columns: Sequence[Mapping[str, Any]], prompt_ids: Sequence[str]) -> dict[int, str]:
        """Samples of a batch without an answer, with their prompts' ids; those that fill it up are of another batch.

        Answers that are there get the columns of now: a right answer may have been mended.

        Raises:
            ValueError: A sample names no benchmark, came before, or has an answer to another prompt.
        """
        missing = {}
        for index, (own, prompt_id) in enumerate(zip(columns, prompt_ids, strict=True)):
            if own.get("repeated"):
                continue
            key = benchmark_of(own.get("benchmark")).name, str(own["id"])
            if key in self._seen:
                raise ValueError(twice(key))
            self._seen[key] = None
            before = self._answers.get(key)
            if before is None:
                missing[index] = prompt_id
            elif before["prompt_id"] != prompt_id:
                raise ValueError(
                    f"{self.folder} holds an answer to another prompt for sample {key[1]!r} of {key[0]}, expected the "
                    "same text, number of image tokens and pictures; give another output, or set overwrite: true."
                )
            else:
                before["columns"] = dict(own)
        return missing

    def append(self, rows: Iterable[Row]) -> None:
        """Take answers; they are on disk on return."""
        rows = list(rows)
        self._answers |= {key_of(row): row for row in rows}
        if rows:
            self._file.write("".join(map(json_line, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def seen(self) -> dict[Key, Row]:
        """Answers to the samples that this process saw, new and old."""
        return {key: self._answers[key] for key in self._seen}

    def joined(self, parts: Iterable[Mapping[Key, Row]]) -> list[Row]:
        """Every answer in the folder, in an order that does not depend on who made it.

        Args:
            parts: What each process has seen.

        Raises:
            ValueError: Two of them saw the same sample.
        """
        answers = {key: self._answers[key] for key in self._old}
        seen: set[Key] = set()
        for part in parts:
            if both := seen & part.keys():
                raise ValueError(twice(min(both)))
            seen |= part.keys()
            answers |= part
        return in_order(answers)

    def is_old(self, row: Mapping[str, Any]) -> bool:
        """Whether an answer was there before the run."""
        return key_of(row) in self._old

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
