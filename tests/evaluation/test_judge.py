"""The judge against a real server on loopback: its replies, its faults, its key, and what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avar_lightning.benchmarks import registry
from avar_lightning.evaluation import Judge, JudgeConfig, ask_judge, judge
from tests.evaluation.samples import LETTERS
from tests.synthesis.server import ScriptedServer

KEY = "sk-0123456789abcdef"
QUESTIONS = [f"Item {item}: what is it?" for item in range(6)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(judge, "MAX_WAIT", 0.02)
    monkeypatch.setitem(registry.BENCHMARKS, "letters", LETTERS)
    server = ScriptedServer(key=KEY)
    yield server
    server.stop()


def config(server: ScriptedServer, **options: Any) -> JudgeConfig:
    known = {"model": "reason", "base_url": server.url, "api_key_variable": "JUDGE_KEY", "patience": 5.0}
    return JudgeConfig(**known | options)


def expected(item: int) -> str:
    return f"There are {item} dots"


def test_each_question_is_asked_once(server: ScriptedServer, tmp_path: Path) -> None:
    first = Judge(config(server), tmp_path)
    replies = first.ask([*QUESTIONS, QUESTIONS[0]])
    assert {prompt: reply[: len(expected(0))] for prompt, reply in replies.items()} == {
        prompt: expected(item) for item, prompt in enumerate(QUESTIONS)
    }
    body = server.requests[0]
    assert (body["temperature"], body["max_tokens"]) == (0.0, 512)
    assert body["headers"]["authorization"] == f"Bearer {KEY}"
    assert (first.num_asked, first.num_cached, first.num_open, first.trouble) == (6, 0, 0, "")
    again = Judge(config(server), tmp_path)
    assert again.ask(QUESTIONS) == replies
    assert (again.num_asked, again.num_cached) == (0, 6)
    assert len(server.requests) == 6
    # Another judge's opinion is another, and so is one that was asked otherwise.
    others = ({"model": "describe"}, {"temperature": None}, {"max_tokens": None}, {"extra": {"seed": 1}})
    for number, options in enumerate(others, 7):
        for _ in range(2):
            assert len(Judge(config(server, **options), tmp_path).ask(QUESTIONS[:1])) == 1
            assert len(server.requests) == number
    assert ["temperature" in body for body in server.requests[6:]] == [True, False, True, True]
    assert ["max_tokens" in body for body in server.requests[6:]] == [True, True, False, True]
    assert server.requests[-1]["seed"] == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY in path.read_text()]


def test_faults_are_tried_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.faults["reason"].extend(
        [(429, {"Retry-After": "0.3"}, "slow down"), 500, 503, "drop", "half", "bad json", "list", "empty choices",
         "null choice", "no content", lambda body: "   "]
    )  # fmt: skip
    asking = Judge(config(server, concurrency=1), tmp_path)
    assert len(asking.ask(QUESTIONS)) == 6
    assert asking.trouble == ""
    assert len(server.requests) == 6 + 11
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 0.3  # as it asked


def test_a_server_that_goes_away(server: ScriptedServer, tmp_path: Path) -> None:
    Judge(config(server), tmp_path).ask(QUESTIONS[:2])
    server.faults["reason"].extend([500] * 1000)
    away = Judge(config(server, patience=0.2, concurrency=2), tmp_path)
    assert away.ask(QUESTIONS).keys() == set(QUESTIONS[:2])
    assert "gave no reply in 0.2 s (last: status 500: " in away.trouble
    assert "run the same command again" in away.trouble
    assert away.num_open == 4
    server.faults["reason"].clear()
    before = len(server.answered)
    assert len(Judge(config(server), tmp_path).ask(QUESTIONS)) == 6
    assert len(server.answered) - before == 4
    server.stop()
    gone = Judge(config(server, patience=0.2), tmp_path)
    assert gone.ask(["Item 9: another?"]) == {}
    assert "ConnectError" in gone.trouble


def test_a_key_that_is_refused(server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-another-key-0123")
    asking = Judge(config(server, concurrency=1), tmp_path)
    assert asking.ask(QUESTIONS) == {}
    assert len(server.requests) == 1
    assert "answered 401 (" in asking.trouble
    assert "environment variable JUDGE_KEY" in asking.trouble
    assert "another-key" not in asking.trouble
    assert "another-key" not in json.dumps(asking.report)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="JUDGE_KEY is not set"):
        Judge(config(server), tmp_path)


def test_a_question_that_is_too_long_is_left(server: ScriptedServer, tmp_path: Path) -> None:
    server.refusals["reason", 3] = (400, "maximum context length is 4096 tokens")
    asking = Judge(config(server, concurrency=1), tmp_path)
    assert asking.ask(QUESTIONS).keys() == set(QUESTIONS) - {QUESTIONS[3]}
    assert "maximum context length" in asking.trouble


def test_settings_that_hold_for_no_question(server: ScriptedServer, tmp_path: Path) -> None:
    for item in range(6):
        server.refusals["reason", item] = (400, "unknown field max_tokens")
    asking = Judge(config(server, concurrency=1), tmp_path)
    assert asking.ask(QUESTIONS) == {}
    assert len(server.requests) <= 4  # one more may be on its way
    assert asking.num_open == 6


def test_another_server_is_another_judge(server: ScriptedServer, tmp_path: Path) -> None:
    other = ScriptedServer(key=KEY)
    other.texts["reason", 0] = "something else"
    try:
        assert Judge(config(server), tmp_path).ask(QUESTIONS[:1])[QUESTIONS[0]].startswith(expected(0))
        assert Judge(config(other), tmp_path).ask(QUESTIONS[:1]) == {QUESTIONS[0]: "something else"}
    finally:
        other.stop()


def test_a_reply_that_was_cut_is_not_kept(server: ScriptedServer, tmp_path: Path) -> None:
    server.texts["reason", 0] = "There are 0 dots"
    server.faults["reason"].extend(["length", "content_filter"])
    asking = Judge(config(server, concurrency=1), tmp_path)
    assert asking.ask(QUESTIONS).keys() == set(QUESTIONS[2:])
    assert "did not end a reply (length)" in asking.trouble
    assert "raise judge.max_tokens (512)" in asking.trouble
    assert (asking.num_open, len(server.requests)) == (2, 6)  # it is not tried again either: temperature is 0
    again = Judge(config(server, concurrency=1), tmp_path)
    assert again.ask(QUESTIONS)[QUESTIONS[0]] == "There are 0 dots"
    assert (again.num_asked, again.num_cached) == (2, 4)


def test_a_judge_that_only_thinks_is_not_asked_everything(server: ScriptedServer, tmp_path: Path) -> None:
    """A server that takes thinking out of the reply has nothing left of one that was cut."""
    for item in range(6):
        server.texts["reason", item] = {"content": None, "reasoning_content": "Well, "}
    server.faults["reason"].extend(["length"] * 6)
    asking = Judge(config(server, concurrency=1), tmp_path)
    assert asking.ask(QUESTIONS) == {}
    assert "raise judge.max_tokens" in asking.trouble
    assert len(server.requests) <= 4


def test_a_reply_that_repeats_the_key_is_not_kept(server: ScriptedServer, tmp_path: Path) -> None:
    server.texts["reason", 0] = f"A, as {KEY} says"
    asking = Judge(config(server), tmp_path)
    assert len(asking.ask(QUESTIONS)) == 5
    assert "repeated its key" in asking.trouble
    assert KEY not in (tmp_path / "judge.jsonl").read_text()


def test_a_cache_that_was_left_half_written(server: ScriptedServer, tmp_path: Path) -> None:
    Judge(config(server, concurrency=1), tmp_path).ask(QUESTIONS[:2])
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"key": "ab')
    assert len(Judge(config(server), tmp_path).ask(QUESTIONS[:3])) == 3
    assert len(server.requests) == 3
    assert len([json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]) == 3


def test_only_what_rules_cannot_read_is_judged(server: ScriptedServer, tmp_path: Path) -> None:
    server.texts |= {("reason", 1): "b", ("reason", 2): "none", ("reason", 3): "a"}
    found = [("a", "rules", 1), (None, "nobody", 0), (None, "nobody", 0), (None, "nobody", 0)]
    rows = [
        {
            "benchmark": "letters",
            "response": "?",
            "columns": {"benchmark": "letters", "item": item, "answer": "abcb"[item]},
        }
        | dict(zip(("extracted", "extracted_by", "correct"), verdict, strict=True))
        for item, verdict in enumerate(found)
    ]
    ask_judge(Judge(config(server), tmp_path), rows)
    assert [(row["extracted"], row["extracted_by"], row["correct"]) for row in rows] == [
        ("a", "rules", 1),
        ("b", "judge", 1),
        (None, "nobody", 0),
        ("a", "judge", 0),
    ]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "demo"}, "judge.base_url is 'demo'"),
        ({"base_url": "http://user:word@host/v1"}, "a key or password in it"),
        ({"base_url": "localhost"}, "expected http"),
        ({"api_key_variable": "sk-123"}, "no name of an environment variable"),
        ({"extra": {"api_key": "x"}}, "expected no key there"),
        ({"concurrency": 0}, "judge.concurrency is 0"),
        ({"max_tokens": 0}, "judge.max_tokens is 0"),
        ({"extra": {"messages": [], "model": "z"}}, "judge.extra holds 'messages', expected none of"),
    ],
)
def test_settings_without_meaning(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        JudgeConfig("m", **options)
