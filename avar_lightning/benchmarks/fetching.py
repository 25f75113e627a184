"""The files of a benchmark: in a folder, one of them alone, or from the Hugging Face Hub."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path, PurePosixPath

from avar_lightning.benchmarks.benchmark import Benchmark
from avar_lightning.conversion.tables import TableFiles

FIRST_RECORDS = 20  # by which files of another part are told
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_records(benchmark: Benchmark, src: str | Path) -> TableFiles:
    """The records of a benchmark's reported split.

    Args:
        benchmark: Which one.
        src: A folder with the files that the Hub serves, one such .parquet file, or the name of the dataset on the Hub.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The folder holds none of the files, or those of another part, or the Hub cannot give them.
    """
    source = _find(benchmark, src)
    read = source.read(islice(source.addresses(), FIRST_RECORDS))
    doubt = benchmark.doubt([record for _, record in read if isinstance(record, dict)])
    if doubt:
        raise ValueError(f"{src} is not of {benchmark.title}: {doubt}; expected {' and '.join(benchmark.files)}")
    return source


def hub_commit(source: TableFiles) -> str | None:
    """The commit of the Hub that all files are of, where its cache or `hf download --local-dir` says so; else None."""
    commits = {_commit_of(path) for path in source.files}
    return commits.pop() if len(commits) == 1 else None


def _commit_of(path: Path) -> str | None:
    path = path.absolute()
    for folder in path.parents:
        if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
            return folder.name
        said = folder / ".cache/huggingface/download" / f"{path.relative_to(folder)}.metadata"
        if said.is_file():
            commit = said.read_text().partition("\n")[0].strip()
            return commit if _COMMIT.fullmatch(commit) else None
    return None


def _find(benchmark: Benchmark, src: str | Path) -> TableFiles:
    path = Path(src)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is no .parquet file; expected one of {benchmark.hub}, or the folder of them")
        return TableFiles([path], path.parent)
    if not path.is_dir():
        if not _HUB_NAME.fullmatch(str(src)):
            raise FileNotFoundError(
                f"no such file or folder: {src}; expected the files of {benchmark.hub}, or that name to fetch them"
            )
        path = _fetch(benchmark, str(src))
    files = find_files(benchmark, path)
    if not files:
        raise ValueError(
            f"{path} holds none of the files of {benchmark.title}; expected {' and '.join(benchmark.files)} as in "
            f"https://huggingface.co/datasets/{benchmark.hub}"
        )
    return TableFiles(files, path)


def find_files(benchmark: Benchmark, folder: Path) -> list[Path]:
    """The files of the reported split in a checkout, or beside each other in a flat folder; empty where none is there.

    Raises:
        ValueError: Some of several kinds of files are missing, as of HallusionBench's questions without an image.
    """
    for patterns in (benchmark.files, [PurePosixPath(pattern).name for pattern in benchmark.files]):
        found = {pattern: sorted(folder.glob(pattern)) for pattern in patterns}
        if any(found.values()):
            missing = [pattern for pattern, files in found.items() if not files]
            if missing:
                raise ValueError(
                    f"{folder} holds files of {benchmark.title}, but no {missing[0]}; fetch all of {benchmark.hub}, or "
                    "name one file to convert it alone"
                )
            return list(dict.fromkeys(path for files in found.values() for path in files))
    return []


def _fetch(benchmark: Benchmark, name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=list(benchmark.files)))
    except Exception as error:  # of HTTP, of the cache, of names: each library below has its own
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(
            f"there is no folder {name}, and {name} could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check name and network, or name a folder with the files of "
            f"{benchmark.hub}"
        ) from error
