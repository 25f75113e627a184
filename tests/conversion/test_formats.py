"""What records mean: placeholders, roles, options, columns; and that nothing but BadRecord comes of a strange one."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.conversion import ConvertConfig
from avar_lightning.conversion.formats import FORMATS, Draft, detect_format
from avar_lightning.conversion.rejecting import BadRecord
from avar_lightning.data.sample import check_messages

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def draft(format_: str, record: dict[str, Any], **options: Any) -> Draft:
    return FORMATS[format_](record, ConvertConfig("in", "out", **options))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("<image>", [IMAGE]),
        ("Is <image> it?", [text("Is "), IMAGE, text(" it?")]),
        ("<image>\n\nWhat?", [IMAGE, text("\nWhat?")]),
        (" <image> ", [text(" "), IMAGE, text(" ")]),
    ],
)
def test_placeholders_become_images_in_place(said: str, shown: list[Any]) -> None:
    made = draft("sharegpt", {"conversations": [{"from": "human", "value": said}], "images": ["a.png"]})
    assert made.messages == [user(shown)]
    assert made.images == ["a.png"]


def test_llava_and_llama_factory_and_messages_say_the_same() -> None:
    llava = {"conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Yo"}], "image": "a"}
    factory = {
        "messages": [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Yo"}],
        "images": ["a"],
        "videos": [],
        "system": "",
    }
    parts = {"messages": [user([{"type": "image", "image": "a"}, text("Hi")]), {"role": "assistant", "content": "Yo"}]}
    beside = {"messages": [user([IMAGE, text("Hi")]), {"role": "assistant", "content": "Yo"}], "images": ["a"]}
    made = [draft("sharegpt", llava), draft("sharegpt", factory), draft("messages", parts), draft("messages", beside)]
    assert made[0].messages == [user([IMAGE, text("Hi")]), {"role": "assistant", "content": "Yo"}]
    assert all(other == made[0] for other in made[1:3])
    assert made[3] == made[0]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a"},
        {"type": "image", "url": "a"},
        {"type": "image", "path": "a", "text": None},
        {"type": "image_url", "image_url": {"url": "a"}},
        {"type": "image_url", "image_url": "a"},
    ],
)
def test_image_parts_bring_their_file(part: dict[str, Any]) -> None:
    record = {"messages": [user([part, IMAGE, text("?")])], "images": ["b"]}
    assert draft("messages", record).images == ["a", "b"]
    assert draft("messages", record).messages == [user([IMAGE, IMAGE, text("?")])]


def test_system_prompts() -> None:
    turns = [{"from": "human", "value": "Hi"}]
    assert draft("sharegpt", {"conversations": turns, "system": "Own"}, system="Mine").messages[0]["content"] == "Own"
    assert draft("sharegpt", {"conversations": turns}, system="Mine").messages[0]["content"] == "Mine"
    own = [{"from": "system", "value": "Turn"}, *turns]
    assert [m["content"] for m in draft("sharegpt", {"conversations": own}, system="Mine").messages] == ["Turn", "Hi"]
    with pytest.raises(BadRecord, match="begin with a system prompt, and system is 'Own'"):
        draft("sharegpt", {"conversations": own, "system": "Own"})


def test_fields_are_carried() -> None:
    turns = [{"role": "user", "content": "Hi", "name": "Ann", "weight": None}]
    record = {"messages": turns, "id": 7, "source": "s", "answer": 3, "level": {"a": [1]}, "nan": float("nan")}
    record |= {"day": datetime.date(2026, 1, 2), "cost": decimal.Decimal("1.50")}
    made = draft("messages", record, source="other", drop=("cost",))
    assert (made.id, made.source, made.answer) == ("7", "s", 3)
    assert made.columns == {"level": {"a": [1]}, "nan": None, "day": "2026-01-02"}
    assert made.messages == [{"role": "user", "content": "Hi", "name": "Ann"}]
    assert draft("messages", {"messages": turns}, source="other").source == "other"


def test_alpaca() -> None:
    record = {"instruction": "Look.", "input": "<image>", "output": "A cat.", "images": ["a"], "system": "S"}
    made = draft("alpaca", record | {"history": [["Hi", "Yo"]]})
    assert made.messages == [
        {"role": "system", "content": "S"},
        user("Hi"),
        {"role": "assistant", "content": "Yo"},
        user([text("Look."), IMAGE]),
        {"role": "assistant", "content": "A cat."},
    ]
    assert made.columns == {}


def test_columns() -> None:
    record = {
        "problem": "Which?",
        "choices": ["cat", "dog"],
        "solution": "B",
        "image_1": b"x",
        "image_2": {"bytes": b"y", "path": None},
        "image_3": None,
        "rationale": "It barks. <answer>B</answer>",
        "level": 2,
    }
    made = draft("columns", record)
    assert made.messages[0] == user([IMAGE, IMAGE, text("Which?\nA. cat\nB. dog")])
    assert made.messages[1]["content"] == "It barks. <answer>B</answer>"
    assert made.images == [b"x", {"bytes": b"y", "path": None}]
    assert made.answer == "B"
    assert made.columns == {"level": 2, "options": ["cat", "dog"]}


def test_an_answer_inside_a_response_is_not_invented() -> None:
    made = draft("columns", {"question": "?", "response": "<answer>3</answer>"})
    assert made.answer is None


@pytest.mark.parametrize(
    ("options", "shown", "kept"),
    [
        ({"A": "x", "B": None}, "?\nA. x", {"A": "x"}),
        ("['x', 'y']", "?\nA. x\nB. y", ["x", "y"]),
        ('["x"]', "?\nA. x", ["x"]),
        (["A. x", "B. y"], "?\nA. x\nB. y", ["A. x", "B. y"]),
        ([1, 2.5], "?\nA. 1\nB. 2.5", [1, 2.5]),
        ([], "?", None),
        ("", "?", None),
    ],
)
def test_options(options: Any, shown: str, kept: Any) -> None:
    made = draft("columns", {"question": "?", "options": options})
    assert made.messages == [user(shown)]
    assert made.columns == ({"options": kept} if kept else {})


def test_long_options_are_kept() -> None:
    made = draft("columns", {"question": "?", "options": str(["x" * 9_995])})
    assert made.columns == {"options": ["x" * 9_995]}


def test_options_that_the_question_shows_are_not_shown_twice() -> None:
    made = draft("columns", {"question": "Which?\nA. x\nB. y", "options": ["x", "y"]})
    assert made.messages == [user("Which?\nA. x\nB. y")]


def test_placeholders_of_a_table_stay_in_place() -> None:
    made = draft("columns", {"question": "Is <image> it?", "image": "a"})
    assert made.messages == [user([text("Is "), IMAGE, text(" it?")])]


def test_names_of_columns_can_be_given() -> None:
    record = {"ask": "?", "gold": "x", "answer": "not this", "photo": "a", "image": "b.png", "pid": 9}
    names = {"question": "ask", "answer": "gold", "image": "photo", "id": "pid"}
    made = draft("columns", record, columns=names)
    assert (made.images, made.answer, made.id) == (["a"], "x", "9")
    assert made.columns == {"original_answer": "not this", "image": "b.png"}
    both = draft("columns", {"question": "?", "answer": "x"}, columns={"response": "answer"})
    assert (both.answer, both.messages[1]["content"]) == ("x", "x")


def turns(*values: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value} for value in values]}


@pytest.mark.parametrize(
    ("format_", "record", "kind", "says"),
    [
        ("sharegpt", turns("<image><image>") | {"image": "a"}, "wrong number of images", r"shows 2 .* record has 1"),
        ("sharegpt", turns("<image>"), "wrong number of images", r"shows 1 .* record has 0"),
        ("sharegpt", turns("Hi") | {"image": "a"}, "wrong number of images", r"pass --prepend-images"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "unknown role", "turn 0 is from 'bot'"),
        ("sharegpt", {"conversations": [{"from": ["x"], "value": "x"}]}, "unknown role", r"from \['x'\]"),
        ("sharegpt", {"conversations": [{"from": "observation", "value": "x"}]}, "tool turns", "'observation'"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "tool turns", "'tool'"),
        ("messages", {"messages": [user("x") | {"tool_calls": [{}]}]}, "tool turns", "with tools"),
        ("sharegpt", turns("x") | {"tools": "[{}]"}, "tools", "it has tools"),
        ("sharegpt", turns("x") | {"videos": ["a.mp4"]}, "video or audio", "it has videos"),
        ("columns", {"question": "x", "audio": {"path": "a"}}, "video or audio", "it has audio"),
        ("messages", {"messages": [user([{"type": "video"}])]}, "bad part", "'video'"),
        ("messages", {"messages": [user(None)]}, "bad turn", "turn 0 says None"),
        ("messages", {"messages": ["x"]}, "bad turn", "turn 0 is 'x'"),
        ("messages", {"messages": "x"}, "no conversation", "messages or conversations is 'x'"),
        ("sharegpt", {"conversations": []}, "no conversation", "expected a list of turns"),
        ("sharegpt", turns("x") | {"thumbnail": b"x"}, "bytes in a column", "--drop thumbnail"),
        ("alpaca", {"instruction": "", "output": "x"}, "no question", "expected text in one"),
        ("alpaca", {"instruction": "x", "output": ["a", "b"]}, "not text", r"output is \['a', 'b'\]"),
        ("alpaca", {"instruction": "x", "output": " "}, "empty response", "expected text, or null"),
        ("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]}, "bad history", "pairs"),
        ("columns", {"question": None}, "no question", "--column question=NAME"),
        ("columns", {"question": "x", "options": list(range(27))}, "bad options", "at most 26"),
        ("columns", {"question": "x", "options": "x or y"}, "bad options", "expected a list"),
        ("columns", {"question": "x", "options": '"x or y"'}, "bad options", "expected a list"),
        ("columns", {"question": "x", "options": str(["x" * 9_996])}, "bad options", "are 10000 characters of text"),
    ],
)
def test_what_cannot_be_a_sample(format_: str, record: dict[str, Any], kind: str, says: str) -> None:
    with pytest.raises(BadRecord, match=says) as caught:
        draft(format_, record)
    assert caught.value.kind == kind


def test_images_are_shown_first_where_that_is_asked_for() -> None:
    record = {"conversations": [{"from": "system", "value": "S"}, *turns("Hi")["conversations"]], "images": ["a", "b"]}
    made = draft("sharegpt", record, prepend_images=True)
    assert made.messages[1] == user([IMAGE, IMAGE, text("Hi")])
    with pytest.raises(BadRecord, match="shows 1 "):
        draft("sharegpt", turns("<image>") | {"images": ["a", "b"]}, prepend_images=True)


@pytest.mark.parametrize(
    ("names", "format_"),
    [
        (["conversations", "image"], "sharegpt"),
        (["messages", "question"], "messages"),
        (["instruction", "input", "output"], "alpaca"),
        (["problem", "image"], "columns"),
        (["instruction", "response"], "columns"),
    ],
)
def test_the_format_is_told_by_the_fields(names: list[str], format_: str) -> None:
    assert detect_format(names, ConvertConfig("in", "out")) == format_


def test_a_format_that_cannot_be_told() -> None:
    with pytest.raises(ValueError, match=r"have the fields label, text, which fit no format; .*--format"):
        detect_format(["text", "label"], ConvertConfig("in", "out"))
    assert detect_format(["text"], ConvertConfig("in", "out", columns={"question": "text"})) == "columns"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=3) | st.text(max_size=3)
    | st.sampled_from(["human", "user", "tool", "<image>", "image", "text", "a.png"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "type", "image", "text", "x"]), inner),
    max_leaves=12,
)  # fmt: skip
fields = ["conversations", "messages", "question", "options", "images", "image_1", "instruction", "output", "history"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    format_=st.sampled_from(list(FORMATS)),
    record=st.dictionaries(st.sampled_from([*fields, "system", "id", "answer", "videos", "x"]), anything),
    prepend=st.booleans(),
)
def test_no_record_breaks_a_conversion(format_: str, record: dict[str, Any], prepend: bool) -> None:
    """Whatever a record holds, there is a sample whose images match its messages, or one reason why not."""
    with contextlib.suppress(BadRecord):
        made = draft(format_, record, prepend_images=prepend)
        parts = [
            part for message in made.messages if isinstance(message["content"], list) for part in message["content"]
        ]
        assert sum(part == IMAGE for part in parts) == len(made.images)
        json.dumps([made.messages, made.answer, made.columns], allow_nan=False)
        with contextlib.suppress(ValueError):
            check_messages(made.messages, len(made.images))
