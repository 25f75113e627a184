"""The journal of a synthesis: every request that was sent and every answer that came, on disk before it is used.

One JSON object a line: `sent` before a request leaves, then `failed` or `answer`; `refused` when a call is given up.
What was sent and has neither was on its way when the process ended; it counts as spent, and is asked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from avar_lightning.files import json_line
from avar_lightning.synthesis.stages import Answer, Call, Stage

VERSION = 1
_ANSWER = tuple(each.name for each in fields(Answer))


@dataclass
class Spent:
    """What a stage has taken.

    Attributes:
        requests: Sent, each try counted.
        answers: That came whole.
        prompt_tokens: Read for these.
        completion_tokens: Generated for these.
        estimated: Answers whose tokens the server did not count.
        lost_tokens: Counted as spent for requests whose answer did not arrive, as many as they may have taken.
    """

    requests: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0
    lost_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All together."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens


def key_of(call: Call, seed: int | None) -> str:
    """The same for the same question to the same model, wherever it is served."""
    config = call.stage.config
    asked = [VERSION, call.stage.name, config.model, call.prompt, call.item.prints if call.stage.sends_image else [],
             config.temperature, config.top_p, config.max_tokens, config.extra, seed]  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def settings_of(stage: Stage) -> str:
    """The same for requests that a server understands alike, wherever it is."""
    config = stage.config
    sent = [stage.name, config.model, config.temperature, config.top_p, config.max_tokens, config.max_tokens_field,
            config.extra, stage.sends_image]  # fmt: skip
    return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An append-only file that one process may write.

    Answers and refusals stay on disk; only where they are is kept in memory.

    Args:
        path: Of the file; made if missing.
        source: What the calls are about; a journal of another input is refused.
        other_input: Take it over all the same.
        retry_refused: Forget the refusals of earlier runs.

    Raises:
        RuntimeError: Another process writes it, or it cannot be written; this one also from all that writes.
        ValueError: It is no journal, or one of another input.
    """

    def __init__(
        self, path: str | Path, source: str, *, other_input: bool = False, retry_refused: bool = False
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.spent: dict[str, Spent] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._open: dict[int, tuple[str, int]] = {}
        self._empty: dict[str, tuple[int, str]] = {}
        self._understood: set[str] = set()
        self._retry_refused, self._broken = retry_refused, ""
        self._count = 0
        try:
            self._lock()
            self._load(source, other_input)
        except BaseException:
            self.close()
            raise
        for stage, tokens in self._open.values():
            self._of(stage).lost_tokens += tokens
        self._open.clear()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def find(self, key: str) -> Answer | None:
        """The answer to a call, or its refusal, if there is one."""
        place = self._places.get(key)
        if place is None:
            return None
        line = json.loads(os.pread(self._file, place[1], place[0]))
        return Answer(**{name: line[name] for name in _ANSWER if name in line})

    def sent(self, stage: str, tokens: int) -> int:
        """Note a request before it leaves; returns its number. `tokens` are the most that it may take."""
        self._count += 1
        self._append({"sent": self._count, "stage": stage, "tokens": tokens})
        self._of(stage).requests += 1
        self._open[self._count] = stage, tokens
        return self._count

    def failed(self, number: int, why: str, tokens: int | None = None, *, empty: str = "") -> None:
        """Note that no answer came, and the tokens that it cost; all that it may have taken when unset.

        `empty` is the key of a call that was answered, with nothing.
        """
        stage, reserved = self._open.pop(number)
        lost = reserved if tokens is None else tokens
        row = {"failed": number, "stage": stage, "tokens": lost, "why": why}
        self._append(row | ({"empty": empty} if empty else {}), sync=bool(empty))
        self._of(stage).lost_tokens += lost
        self._count_empty(empty, why)

    def empty(self, key: str) -> tuple[int, str]:
        """How many answers to a call held nothing, and what the last was; from anew when its refusal is retried."""
        return self._empty.get(key, (0, ""))

    def refused(self, stage: str, key: str, why: str) -> None:
        """Keep that a call is not answered: on disk when this returns."""
        self._places[key] = self._append({"refused": why, "stage": stage, "key": key}, sync=True)

    def answered(self, number: int, key: str, answer: Answer, settings: str = "") -> None:
        """Keep an answer: on disk when this returns. `settings` are those of `settings_of`."""
        stage, _ = self._open.pop(number)
        line = {"answer": number, "stage": stage, "key": key, "settings": settings, **asdict(answer)}
        self._places[key] = self._append(line, sync=True)
        self._understood.add(settings)
        self._count_answer(stage, answer)

    def has_answered(self, settings: str) -> bool:
        """Whether a request with these settings was ever answered."""
        return settings in self._understood

    @property
    def reserved(self) -> int:
        """Tokens that requests on their way may take."""
        return sum(tokens for _, tokens in self._open.values())

    @property
    def in_flight(self) -> int:
        """Requests on their way."""
        return len(self._open)

    @property
    def total(self) -> Spent:
        """Of all stages."""
        return Spent(**{each.name: sum(getattr(spent, each.name) for spent in self.spent.values())
                        for each in fields(Spent)})  # fmt: skip

    def _of(self, stage: str) -> Spent:
        return self.spent.setdefault(stage, Spent())

    def _count_answer(self, stage: str, answer: Answer) -> None:
        spent = self._of(stage)
        spent.answers += 1
        spent.prompt_tokens += answer.prompt_tokens
        spent.completion_tokens += answer.completion_tokens
        spent.estimated += answer.estimated

    def _count_empty(self, key: str, why: str) -> None:
        if key:
            self._empty[key] = self.empty(key)[0] + 1, why

    def _append(self, row: dict[str, Any], *, sync: bool = False) -> tuple[int, int]:
        line = json_line(row).encode("utf-8", "surrogatepass")
        start, left = self._end, memoryview(line)
        try:
            while left and not self._broken:  # the system may take less at a time
                left = left[os.write(self._file, left) :]
            if sync and not self._broken:
                os.fsync(self._file)
        except OSError as error:
            self._broken = error.strerror or str(error)
            with suppress(OSError):  # else the next to open it does so
                os.ftruncate(self._file, start)
        if self._broken:  # also later: after a lost line the book would be wrong
            raise RuntimeError(
                f"{self.path} cannot be written ({self._broken}); make room, and run the same command again: what it "
                "holds is not asked again."
            )
        self._end += len(line)
        return start, len(line)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"{self.path} is being written by another process; wait for it, or give another output."
            ) from error

    def _load(self, source: str, other_input: bool) -> None:
        self._end = 0
        for number, line in enumerate(_whole_lines(self._file), start=1):
            try:
                self._take(json.loads(line), len(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is none of a journal ({type(error).__name__}: {error}); delete that "
                    "line, and what it answered is asked again."
                ) from error
            if number == 1 and self._head[0] != VERSION:
                raise ValueError(f"{self.path} has version {self._head[0]}, expected {VERSION}; give another output.")
            if number == 1 and self._head[1] != source and not other_input:
                raise ValueError(
                    f"{self.path} is of the input {self._head[1]!r}, not of {source!r}; give another output, or "
                    "--overwrite=true to replace its shards and keep its answers."
                )
        os.ftruncate(self._file, self._end)  # a last line that was cut off when the process ended
        if self._end == 0:
            self._append({"journal": VERSION, "input": source}, sync=True)

    def _take(self, row: dict[str, Any], length: int) -> None:
        if self._end == 0:
            self._head = row["journal"], row["input"]
        elif "sent" in row:
            self._count = max(self._count, row["sent"])
            self._open[row["sent"]] = row["stage"], row["tokens"]
            self._of(row["stage"]).requests += 1
        elif "failed" in row:
            self._open.pop(row["failed"], None)
            self._of(row["stage"]).lost_tokens += row["tokens"]
            self._count_empty(row.get("empty", ""), row["why"])
        elif "refused" in row and "answer" not in row:
            self._empty.pop(row["key"], None)
            if not self._retry_refused:
                self._places[row["key"]] = self._end, length
        else:
            self._open.pop(row["answer"], None)
            self._places[row["key"]] = self._end, length
            self._understood.add(row.get("settings", ""))
            self._count_answer(row["stage"], Answer(**{name: row[name] for name in _ANSWER if name in row}))
        self._end += length


def _whole_lines(file: int) -> Iterator[bytes]:
    with os.fdopen(os.dup(file), "rb") as reader:
        reader.seek(0)
        yield from (line for line in reader if line.endswith(b"\n"))


def by_stage(spent: dict[str, Spent], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """For a report: each stage's numbers, in their order."""
    return {name: asdict(spent.get(name, Spent())) for name in names}
