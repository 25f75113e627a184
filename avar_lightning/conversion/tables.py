"""Records in Parquet files and in the Arrow streams of ``datasets.save_to_disk``. The only importer of pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from avar_lightning.conversion.rejecting import BadRecord

BATCH = 16  # rows that are decoded together: with an image each, still little memory

Record = dict[str, Any] | BadRecord
Address = tuple[
    int, int, int, int
]  # number of the file, row group or first byte of a batch, row in it, row in the file


@dataclass
class TableFiles:
    """Parquet files, or files that each hold an Arrow stream.

    Attributes:
        files: The files, in order.
        folder: Where relative paths of images begin.
        total_records: Rows of all files.
    """

    files: list[Path]
    folder: Path
    total_records: int | None = None
    total_bytes: int | None = None
    _groups: list[tuple[int, int, int]] = field(default_factory=list, repr=False)  # file, group, rows
    _cursor: tuple[int, int, int, Iterator[Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _pyarrow()
        for number, path in enumerate(self.files):
            sizes = _parquet_groups(path) if path.suffix == ".parquet" else _arrow_batches(path)
            self._groups += [(number, group, rows) for group, rows in sizes]
        self.total_records = sum(rows for _, _, rows in self._groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None, "_groups": []}  # another process opens the files for itself

    def addresses(self) -> Iterator[Address]:
        """Where every row stands."""
        current, before = -1, 0
        for number, group, rows in self._groups:
            before = before if number == current else 0
            current = number
            yield from ((number, group, row, before + row) for row in range(rows))
            before += rows

    def position(self, address: tuple[Any, ...]) -> int:
        """Rows are counted, not bytes."""
        return 0

    def read(self, addresses: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, Record]]:
        """The rows at some addresses, each with its file and row."""
        for (number, group), wanted in groupby(addresses, key=lambda address: address[:2]):
            path, problem = self.files[number], ""
            for _, _, row, in_file in wanted:
                record: Record | None = None
                if not problem:
                    try:
                        record = self._row(number, group, row)
                    except (_pyarrow().ArrowException, OSError, StopIteration) as error:
                        problem, self._cursor = f"{type(error).__name__}: {error}", None
                yield (
                    f"{path}:row {in_file}",
                    record or BadRecord("damaged file", f"the row cannot be read from the file ({problem})"),
                )

    def _row(self, number: int, group: int, row: int) -> dict[str, Any]:
        """One row; a process that asks for rows in order decodes each of a group once."""
        if self._cursor is None or self._cursor[:2] != (number, group) or self._cursor[2] > row:
            self._cursor = (number, group, 0, _open_rows(self.files[number], group))
        _, _, reached, rows = self._cursor
        while reached < row:
            next(rows)
            reached += 1
        found = next(rows)
        self._cursor = (number, group, row + 1, rows)
        return found()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError(
            "Parquet files and folders of datasets are read by pyarrow, which is not installed; "
            "run: pip install 'avar-lightning[convert]'"
        ) from error
    return pyarrow


def _parquet_groups(path: Path) -> list[tuple[int, int]]:
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return [(group, file.metadata.row_group(group).num_rows) for group in range(file.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); expected a whole .parquet file") from error


def _arrow_batches(path: Path) -> list[tuple[int, int]]:
    """First byte and number of rows of every batch, by the headers alone: the file is mapped, not read."""
    pyarrow, batches = _pyarrow(), []
    try:
        with pyarrow.memory_map(str(path)) as file:
            schema = pyarrow.ipc.read_schema(file)
            with contextlib.suppress(EOFError):  # how the end of a stream is said
                while True:
                    start = file.tell()
                    batch = pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(file), schema)
                    batches.append((start, batch.num_rows))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as an Arrow stream ({error}); expected a whole file of datasets.save_to_disk"
        ) from error
    return batches


def _open_rows(path: Path, group: int) -> Iterator[Any]:
    """A callable for each row of a group, which makes it a dictionary: rows that are skipped are not made."""
    pyarrow = _pyarrow()
    if path.suffix == ".parquet":
        # Buffered, so that a row group of any size is read piece by piece.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BATCH << 16, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], use_threads=False):
                yield from _rows(batch)
        return
    with pyarrow.memory_map(str(path)) as file:
        schema = pyarrow.ipc.read_schema(file)
        file.seek(group)
        yield from _rows(pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(file), schema))


def _rows(batch: Any) -> Iterator[Any]:
    for row in range(batch.num_rows):
        yield lambda row=row: batch.slice(row, 1).to_pylist()[0]
