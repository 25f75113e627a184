"""Records in JSON files: the same as `json.load` finds, each with its line, whatever stands around a bad one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_lightning.conversion import textfiles
from avar_lightning.conversion.rejecting import BadRecord
from avar_lightning.conversion.textfiles import CsvFiles, JsonFiles, find_records

text = st.text(st.sampled_from('ab"\\{}[],:\n é€'), max_size=12)
values = st.recursive(
    st.none() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def read(path: Path) -> list[tuple[int, Any]]:
    source = JsonFiles([path], path.parent)
    return [(int(where.rpartition(":")[2]), found) for where, found in source.read(list(source.addresses()))]


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.dictionaries(text, values, max_size=4), max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_=st.booleans(),
    block=st.integers(1, 40),
    around=st.sampled_from(["", "\n", " \n\n"]),
)
def test_elements_of_an_array_are_what_json_finds(
    records: list[dict[str, Any]], indent: int | None, ascii_: bool, block: int, around: str
) -> None:
    """At any size of the blocks that are read, so that each may end in a string, an escape or a character."""
    whole = (around + json.dumps(records, indent=indent, ensure_ascii=ascii_) + around).encode()
    before = textfiles.BLOCK
    textfiles.BLOCK = max(block, len(around) + 1)
    try:
        places = list(find_records(io.BytesIO(whole)))
    finally:
        textfiles.BLOCK = before
    assert [json.loads(whole[start : start + length]) for start, length, _ in places] == records
    starts = [start + whole[start : start + length].index(b"{") for start, length, _ in places]
    assert [line for _, _, line in places] == [1 + whole[:start].count(b"\n") for start in starts]


def test_lines_and_what_is_wrong_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"a": 1}', "", "   ", '{"a": ', "[1]", "7", '{"a": "\\ud800"}', "\xff", '{"a": 2}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode("latin-1"))
    found = read(path)
    assert [line for line, _ in found] == [1, 4, 5, 6, 7, 8, 9]
    kinds = [item.kind if isinstance(item, BadRecord) else item["a"] for _, item in found]
    assert kinds == [1, "not JSON", "not an object", "not an object", "\ud800", "not JSON", 2]


def test_a_bad_element_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n {"a": tru},\n "x,y",\n {"a": [1, 2,]},\n {"a": "]},"}\n]\n')
    found = read(path)
    assert [line for line, item in found if isinstance(item, BadRecord)] == [3, 3, 5]
    assert [(line, item["a"]) for line, item in found if isinstance(item, dict)] == [(2, 1), (6, "]},")]


@pytest.mark.parametrize(
    ("end", "kept", "says"),
    [
        ('{"a": "b', 1, ["not JSON", "breaks off"]),
        ('{"a": 2}', 2, ["breaks off"]),
        ('{"a": 2},\n', 2, ["breaks off"]),
        ('{"a": 2}] x', 2, ["not JSON"]),
        ('{"a": 2}][{"a": 3}]', 2, ["expected a JSON object"]),
    ],
)
def test_an_array_that_does_not_end_well_is_noticed(tmp_path: Path, end: str, kept: int, says: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n' + end)
    found = [item for _, item in read(path)]
    assert found[:kept] == [{"a": number + 1} for number in range(kept)]
    assert len(found) == kept + len(says)
    for item, reason in zip(found[kept:], says):
        assert isinstance(item, BadRecord)
        assert reason in str(item)


@pytest.mark.parametrize("whole", ["", "  \n", "[]", "[ \n ]\n"])
def test_no_record(tmp_path: Path, whole: str) -> None:
    (tmp_path / "a.json").write_text(whole)
    assert read(tmp_path / "a.json") == []


def test_a_record_beyond_all_measure_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_RECORD", 50)
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": "x" * 99}) + '\n{"a": 1}\n')
    (_, long), (line, good) = read(tmp_path / "a.jsonl")
    assert "expected at most 50" in str(long)
    assert (line, good) == (2, {"a": 1})


def test_nesting_beyond_all_measure_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": ' + "[" * 100_000 + '\n{"a": 1}\n')
    (_, deep), (_, good) = read(tmp_path / "a.jsonl")
    assert isinstance(deep, BadRecord)
    assert good == {"a": 1}


def test_rows_of_a_csv_have_the_line_they_begin_at(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('file_name,text\na.png,"two\nlines"\nb.png\nc.png,z\n')
    source = CsvFiles([path], tmp_path)
    found = [(where, item) for where, item in source.read(source.addresses())]
    assert [where for where, _ in found] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert found[0][1] == {"file_name": "a.png", "text": "two\nlines"}
    assert isinstance(found[1][1], BadRecord)
