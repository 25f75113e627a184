"""Records in JSON and CSV files, found in one pass over the bytes and read from their place by whoever needs them.

The process that finds records does not keep or parse them: it passes on where each stands, so that its memory does not
grow with the file and a record that is not JSON spoils no other.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from avar_lightning.conversion.rejecting import BadRecord, short

BLOCK = 1 << 20
MAX_RECORD = 1 << 28  # bytes; a longer one is an accident, and would have to be held in memory
_BOM = b"\xef\xbb\xbf"
_MARK = re.compile(rb'[][{},"]')
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)

Record = dict[str, Any] | BadRecord
Place = tuple[int, int, int]  # a record's first byte, its length, its line


@dataclass
class JsonFiles:
    """JSON files, each an object a line or one array of objects.

    Attributes:
        files: The files, in order.
        folder: Where relative paths of images begin.
    """

    files: list[Path]
    folder: Path
    total_records: int | None = None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def addresses(self) -> Iterator[tuple[int, ...]]:
        """Where every record stands: number of its file, first byte, length, line, and bytes up to its end."""
        before = 0
        for number, path in enumerate(self.files):
            with path.open("rb") as file:
                for start, length, line in find_records(file):
                    yield number, start, length, line, before + start + length
                before += os.fstat(file.fileno()).st_size

    def position(self, address: tuple[Any, ...]) -> int:
        """Bytes of the input up to the end of a record."""
        return address[4]

    def read(self, addresses: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, Record]]:
        """The records at some addresses, each with its file and line."""
        current, file = -1, None
        try:
            for number, start, length, line, _ in addresses:
                if number != current or file is None:
                    if file is not None:
                        file.close()
                    current, file = number, self.files[number].open("rb")
                yield f"{self.files[number]}:{line}", _read_record(file, start, length)
        finally:
            if file is not None:
                file.close()


@dataclass
class CsvFiles:
    """CSV files with a header line, as the ``metadata.csv`` of a folder of images."""

    files: list[Path]
    folder: Path
    total_records: int | None = None
    total_bytes: int | None = None

    def addresses(self) -> Iterator[tuple[Any, ...]]:
        """Number of the file, line, and the row itself: a CSV has no images in it, and quoted lines join rows."""
        for number, path in enumerate(self.files):
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows, line = csv.DictReader(file), 2
                try:
                    for row in rows:
                        yield number, line, row
                        line = rows.line_num + 1
                except (csv.Error, UnicodeDecodeError) as error:
                    raise ValueError(f"{path}:{line} cannot be read as CSV in UTF-8 ({error}); correct it") from error

    def position(self, address: tuple[Any, ...]) -> int:
        """Unknown."""
        return 0

    def read(self, addresses: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, Record]]:
        """The rows, each with its file and line."""
        for number, line, row in addresses:
            whole = None not in row and None not in row.values()
            bad = BadRecord("not CSV", "the row has not as many fields as the header line names; quote or add some")
            yield f"{self.files[number]}:{line}", row if whole else bad


def find_records(file: BinaryIO) -> Iterator[Place]:
    """Where the records of a JSON file stand: the elements of an array, or lines that are not blank."""
    start = file.read(BLOCK).removeprefix(_BOM).lstrip()[:1]
    file.seek(0)
    return _find_elements(file) if start == b"[" else _find_lines(file)


def _find_lines(file: BinaryIO) -> Iterator[Place]:
    start, end, line, blank = 0, 0, 1, True
    while piece := file.readline(BLOCK):
        end, blank = end + len(piece), blank and piece.isspace()
        if piece.endswith(b"\n"):
            if not blank:
                yield start, end - start, line
            start, line, blank = end, line + 1, True
    if not blank:
        yield start, end - start, line


def _find_elements(file: BinaryIO) -> Iterator[Place]:
    """Elements of an array stand between its commas; what is wrong inside of one is found when it is read."""
    depth, start, first, opened = 0, 0, 1, False  # `first` is the line that the element begins at
    for offset, mark, line in _marks(file):
        if mark in b"{[":
            depth += 1
            if depth == 1:
                start, first = offset + 1, line
            elif depth == 2 and not opened:
                opened, first = True, line
        elif depth == 1:  # a comma, or the end of the array
            if mark == b"," or opened or not _is_blank(file, start, offset):
                yield start, offset - start, first
            start, first, opened = offset + 1, line, False
            if mark != b",":
                depth = 0
                break
        elif mark != b",":
            depth -= 1
    size = file.seek(0, os.SEEK_END)
    if not _is_blank(file, start, size):  # half an element, or something after the array
        yield start, size - start, first
    if depth:
        yield size, 0, first


def _marks(file: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """Braces, brackets and commas outside strings, with their offsets and lines."""
    before, line, quoted, skip = 0, 1, False, 0
    while block := file.read(BLOCK):
        position, counted, skip = skip, 0, 0
        while True:
            if quoted:
                match = _STRING.match(block, position)
                assert match is not None  # it matches nothing as well
                position = match.end()
                if position >= len(block) or block[position : position + 1] == b"\\":
                    skip = len(block) - position  # an escape that goes on in the next block
                    break
                quoted, position = False, position + 1
            found = _MARK.search(block, position)
            if found is None:
                break
            position = found.end()
            if found[0] == b'"':
                quoted = True
                continue
            line, counted = line + block.count(b"\n", counted, position), position
            yield before + found.start(), found[0], line
        line += block.count(b"\n", counted)
        before += len(block)


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    here = file.tell()
    file.seek(start)
    text = file.read(min(end - start, BLOCK))
    file.seek(here)
    return not text.strip()


def _read_record(file: BinaryIO, start: int, length: int) -> Record:
    if length > MAX_RECORD:
        return BadRecord("record too long", f"it has {length} bytes; expected at most {MAX_RECORD}")
    file.seek(start)
    text = file.read(length)
    if not text.strip():
        return BadRecord("not JSON", "the array breaks off here or has a comma too many; expected an object and a ]")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRecord("not JSON", f"it is not JSON ({error}): {short(text.strip())}")
    if not isinstance(record, dict):
        return BadRecord("not an object", f"it is {short(record)}; expected a JSON object")
    return record
