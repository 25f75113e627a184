"""The folder of answers: one run at a time, today's columns, other pictures, and what never got out of its thinking."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from avar_lightning.benchmarks import registry
from avar_lightning.data.sample import Sample
from avar_lightning.data.writer import write_shards
from avar_lightning.evaluation import (
    AnswerBook,
    about_shards,
    answers,
    ask_judge,
    by_rules,
    open_folder,
    read_about,
    renew_columns,
)
from avar_lightning.evaluation.answers import SCORES
from avar_lightning.evaluation.prompts import fingerprint, opens_thinking, pictures_of
from avar_lightning.processing import load_processor
from tests.evaluation.samples import LETTERS

ABOUT = {"model": "m", "weights": "w"}


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "letters", LETTERS)
    monkeypatch.setattr(answers, "WAIT", 0.1)


def enter(folder: Path, **now: Any) -> ExitStack:
    return open_folder(folder, ABOUT | now, overwrite=False, how="overwrite")


def columns(index: int, answer: str = "a") -> dict[str, Any]:
    return {"benchmark": "letters", "id": str(index), "item": index, "answer": answer}


def row(index: int, **more: Any) -> dict[str, Any]:
    own = columns(index)
    return (
        {"benchmark": "letters", "id": str(index), "response": "a", "columns": own, "prompt_id": "p"}
        | dict.fromkeys(SCORES, 1.0)
        | more
    )


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Also from another process, and until it lets go or dies."""
    # What a run holds, without the seconds that its imports take.
    code = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another evaluation is at work in"):
            enter(tmp_path)
        other.kill()
    with enter(tmp_path), pytest.raises(ValueError, match="another evaluation is at work in"):
        enter(tmp_path)
    with pytest.raises(ValueError, match="its weights 'w', expected 'v'"):
        enter(tmp_path, weights="v")
    enter(tmp_path).close()  # what was refused holds nothing


def test_answers_get_the_columns_of_now(tmp_path: Path) -> None:
    with enter(tmp_path):
        first = AnswerBook(tmp_path, 0)
        assert first.missing([columns(index) for index in range(3)], ["p"] * 3) == {0: "p", 1: "p", 2: "p"}
        first.append(row(index) for index in range(3))
        first.close()
    before = (tmp_path / "answers_0.jsonl").read_text()
    with enter(tmp_path):
        # The first sample's right answer was mended; another process saw the second, and nobody the third.
        books = [AnswerBook(tmp_path, rank) for rank in range(2)]
        assert books[0].missing([columns(0, "b")], ["p"]) == {}
        assert books[1].missing([columns(1) | {"repeated": True}, columns(1)], ["p", "p"]) == {}
        for book in books:
            book.close()
        rows = books[0].joined(book.seen for book in books)
        assert [each["columns"]["answer"] for each in rows] == ["b", "a", "a"]
        renew_columns(tmp_path, rows)
    after = (tmp_path / "answers_0.jsonl").read_text()
    assert after.splitlines()[1:] == before.splitlines()[1:]
    assert json.loads(after.splitlines()[0])["columns"]["answer"] == "b"
    # So a run on other shards knows of it, too.
    [mended, *_] = AnswerBook(tmp_path, 0).joined([])
    assert mended["columns"]["answer"] == "b"


def test_a_sample_that_is_there_twice(tmp_path: Path) -> None:
    books = [AnswerBook(tmp_path, rank) for rank in range(2)]
    with pytest.raises(ValueError, match="'0' of letters is there twice"):
        books[0].missing([columns(0), columns(0)], ["p", "p"])
    books[0].append([row(0)])
    books[1].missing([columns(0)], ["p"])
    books[1].append([row(0)])
    with pytest.raises(ValueError, match="'0' of letters is there twice"):
        books[0].joined(book.seen for book in books)


def test_line_separators_within_responses(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x1c\r\nfour"
    with enter(tmp_path):
        book = AnswerBook(tmp_path, 0)
        book.append([row(0, response=text), row(1)])
        book.close()
        assert [each["response"] for each in AnswerBook(tmp_path, 0).joined([])] == [text, "a"]


def test_other_pictures_are_another_prompt() -> None:
    ids = torch.tensor([1, 2, 3])
    image = Image.effect_noise((8, 8), 90)
    other = image.copy()
    other.putpixel((3, 3), (other.getpixel((3, 3)) + 1) % 256)
    wide = Image.frombytes("L", (16, 4), image.tobytes())
    prints = {fingerprint(ids, images) for images in ([], [image], [other], [wide], [image, image])}
    assert len(prints) == 5
    assert fingerprint(ids, [image.copy()]) in prints
    assert pictures_of({"images": [[image], []]}, 2) == [[image], []]
    assert pictures_of({"images": torch.zeros(2)}, 2) == pictures_of({}, 2) == [[], []]


def test_thinking_that_the_prompt_opened() -> None:
    processor = load_processor("demo")

    def opened(text: str) -> bool:
        return opens_thinking(torch.tensor(processor.tokenizer(text)["input_ids"]), processor)

    assert opened("What is it? assistant\n<think>\n")
    assert not opened("What is <think> it?")
    assert not opened("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("response", "thinking", "read"),
    [
        ("It may be A. The answer is (B).", True, None),  # cut before it said so
        ("It may be A.</think>The answer is (B).", True, "B"),
        ("The answer is (B).", False, "B"),
        ("<think>The answer is (B).", False, None),
    ],
)
def test_unfinished_thinking_is_neither_read_nor_judged(response: str, thinking: bool, read: str | None) -> None:
    own = {"benchmark": "mmstar", "id": "1", "question": "Which?", "options": {"A": "1", "B": "2"}, "answer": "B"}
    answered = {"benchmark": "mmstar", "id": "1", "response": response, "thinking": thinking, "columns": own}
    answered |= by_rules(answered)
    assert answered["extracted"] == read

    class Nobody:
        def ask(self, prompts: list[str]) -> Mapping[str, str]:
            assert prompts == []
            return {}

    ask_judge(Nobody(), [answered])  # type: ignore[arg-type]
    assert answered["extracted_by"] == ("nobody" if read is None else "rules")


def test_what_is_known_of_the_data_stays(tmp_path: Path) -> None:
    """Benchmarks may come one after the other."""
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        write_shards([Sample([{"role": "user", "content": "?"}], [], id="0")], folder)
    for folder, commit in zip(folders[:2], "ab", strict=True):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"hub": {"commit": commit}}))
    for folder in folders:
        with enter(tmp_path / "out", data=about_shards([f"{folder}/*.tar"])):
            pass
    known = {str(folder): {"hub": {"commit": commit}} for folder, commit in zip(folders[:2], "ab", strict=True)}
    assert read_about(tmp_path / "out") == ABOUT | {"data": known}
