"""Find out what an input is: which files hold its records, and where its images are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from avar_lightning.conversion.rejecting import BadRecord
from avar_lightning.conversion.tables import TableFiles
from avar_lightning.conversion.textfiles import CsvFiles, JsonFiles

JSON = (".json", ".jsonl")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "manifest.json", "rejected.jsonl", "state.json"}
_SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # as in train-00000-of-00003


class Source(Protocol):
    """Files that hold records, which can be read from anywhere in them by any process."""

    files: list[Path]
    folder: Path
    total_records: int | None

    @property
    def total_bytes(self) -> int | None:
        """Size of the input, where positions are bytes."""

    def addresses(self) -> Iterator[tuple[Any, ...]]:
        """Where every record stands, in order."""

    def position(self, address: tuple[Any, ...]) -> int:
        """Bytes of the input up to the end of a record."""

    def read(self, addresses: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, dict[str, Any] | BadRecord]]:
        """The records at some addresses: where each stands in words, and its fields or why it has none."""


def find_source(src: str | Path, split: str | None = None) -> Source:
    """The records of a file or folder.

    Args:
        src: A ``.json``, ``.jsonl`` or ``.parquet`` file; or a folder that holds one of them, Parquet files as a hub
            repository has them, a data set (or several splits) of ``datasets.save_to_disk``, or images with a
            ``metadata.jsonl`` or ``metadata.csv``.
        split: The split, where there are several.

    Raises:
        FileNotFoundError: When nothing is there.
        ValueError: When it is none of these, or the split is missing, ambiguous or unknown.
    """
    src = Path(src)
    if src.is_file():
        return _of_file(src, split)
    if not src.is_dir():
        raise FileNotFoundError(f"no such file or folder: {src}; expected the data set that is to be converted")
    for find in (_saved, _image_folder, _parquet_folder, _json_folder):
        source = find(src, split)
        if source is not None:
            return source
    raise ValueError(
        f"{src} holds nothing that can be converted; expected .parquet files, a .json or .jsonl file, a folder of "
        "datasets.save_to_disk, or images with a metadata.jsonl or metadata.csv"
    )


def _of_file(path: Path, split: str | None) -> Source:
    readers: dict[str, Callable[..., Source]] = {
        ".parquet": TableFiles, ".arrow": TableFiles, ".csv": CsvFiles, **dict.fromkeys(JSON, JsonFiles)
    }  # fmt: skip
    if path.suffix not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'!r}; expected one of {', '.join(readers)}, or a folder"
            + ("; unpack it first" if path.suffix in (".gz", ".zip", ".zst", ".tgz", ".tar") else "")
        )
    if split is not None:
        raise ValueError(
            f"split is {split!r}, but {path} is one file; leave split out or name the folder of the splits"
        )
    return readers[path.suffix]([path], path.parent)


def _saved(folder: Path, split: str | None) -> Source | None:
    """What ``datasets.save_to_disk`` wrote, one split or several."""
    several = folder / "dataset_dict.json"
    if several.is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        folder = folder / _choose(splits, split, folder)
    elif (folder / "state.json").is_file() and split is not None:
        raise ValueError(f"split is {split!r}, but {folder} holds one data set; leave split out")
    state = folder / "state.json"
    if state.is_file():
        try:
            names = [Path(item["filename"]).name for item in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{state} is not a state.json of datasets.save_to_disk; save the data set again"
            ) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its state.json lists; copy the whole folder")
        return TableFiles([folder / name for name in names], folder)
    arrow = sorted(folder.glob("*.arrow"))
    return TableFiles(_of_split(arrow, split, folder), folder) if arrow else None


def _image_folder(folder: Path, split: str | None) -> Source | None:
    """Images with a table of what belongs to them, in the folder or one for each split."""

    def tables(place: Path) -> list[Path]:
        return [place / name for name in ("metadata.jsonl", "metadata.csv") if (place / name).is_file()]

    found = tables(folder)
    if not found:
        splits = {path.name: tables(path) for path in sorted(folder.iterdir()) if path.is_dir() and tables(path)}
        if not splits:
            return None
        found, split = splits[_choose(list(splits), split, folder)], None
    if len(found) > 1:
        raise ValueError(f"{folder} has both {found[0].name} and {found[1].name}; name one of the files")
    return _of_file(found[0], split)


def _parquet_folder(folder: Path, split: str | None) -> Source | None:
    files = sorted(path for path in folder.rglob("*.parquet") if not _is_hidden(path, folder))
    return TableFiles(_of_split(files, split, folder), folder) if files else None


def _json_folder(folder: Path, split: str | None) -> Source | None:
    files = sorted(path for path in folder.iterdir() if path.suffix in JSON and path.name not in _NOT_DATA)
    files = [path for path in files if path.is_file() and not path.name.startswith(".")]
    files = _of_split(files, split, folder) if files else []
    if len({path.suffix for path in files}) > 1:
        raise ValueError(f"{folder} holds {', '.join(path.name for path in files)}; name the file that is meant")
    return JsonFiles(files, folder) if files else None


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _of_split(files: list[Path], split: str | None, folder: Path) -> list[Path]:
    """The files of one split, by their names without numbers; where these are all numbers, by their folders'."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(_SHARD_NUMBER.sub("", path.stem) or path.parent.name, []).append(path)
    chosen = groups[_choose(list(groups), split, folder)]
    places = sorted({str(path.parent) for path in chosen})
    if len(places) > 1:
        raise ValueError(f"{folder} holds several data sets, {', '.join(places)}; name the folder of one")
    return chosen


def _choose(splits: list[str], split: str | None, folder: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise ValueError(f"{folder} holds {', '.join(splits) or 'no split'}; say which one with --split (split=)")
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}; expected one of {', '.join(splits)}")
    return split
