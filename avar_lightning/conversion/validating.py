"""Check an existing set of shards: every sample, every file that its manifest lists, and no key twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import webdataset as wds
from tqdm.auto import tqdm

from avar_lightning.conversion.processes import open_pool
from avar_lightning.conversion.workfolder import UNFINISHED
from avar_lightning.data.sample import SampleError, parse_sample
from avar_lightning.data.shards import MANIFEST, find_shards

REMOTE = ("pipe:", "://")


@dataclass
class ShardCheck:
    """What one shard holds.

    Attributes:
        url: Where it is.
        samples: Samples that it shows, good or bad.
        bytes: Its size.
        sha256: Its checksum.
        keys: A hash of each key, 8 bytes a sample.
        problems: A sentence for every bad sample and for the shard.
    """

    url: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    problems: list[str] = field(default_factory=list)


@dataclass
class ValidationReport:
    """What a set of shards holds.

    Attributes:
        shards: Shards that were read.
        samples: Samples that they show, good or bad.
        num_problems: Bad samples, bad shards, and entries of a manifest that are wrong.
        manifest: Whether there was a manifest to check the files by.
    """

    shards: int = 0
    samples: int = 0
    num_problems: int = 0
    manifest: bool = False


def validate(
    spec: str | Path, *, workers: int = 1, progress: bool = True, tell: Callable[[str], None] = print
) -> ValidationReport:
    """Read every sample of a set of shards as training will, and compare the files with their manifest.

    Args:
        spec: Whatever :func:`~avar_lightning.data.shards.find_shards` takes.
        workers: Processes, each of which reads a shard at a time.
        progress: Show a progress bar.
        tell: Called with a sentence for every problem, as soon as it is found.

    Raises:
        FileNotFoundError: When there is no such shard.
        ValueError: When a manifest cannot be read.
    """
    report, checks = ValidationReport(), []

    def found(problems: Iterator[str] | list[str]) -> None:
        for problem in problems:
            report.num_problems += 1
            tell(problem)

    entries = _manifest_entries(Path(spec))  # before its reader meets it
    urls = [shard.url for shard in find_shards(spec, count=False)]
    report.manifest = entries is not None
    with open_pool(min(workers, len(urls))) as run:
        for check in tqdm(run(check_shard, urls), total=len(urls), unit="shard", disable=not progress):
            found(check.problems)
            report.shards += 1
            report.samples += check.samples
            checks.append(check)
    found(_compare(entries or {}, checks, Path(spec)))
    found(_repeated_keys(checks))
    return report


def check_shard(url: str) -> ShardCheck:
    """Read one shard, wherever it is."""
    check = ShardCheck(url)
    try:
        with _local(url) as path:
            with path.open("rb") as file:
                check.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            check.bytes = path.stat().st_size
            keys = list(_check_samples(path, check))
    except (OSError, tarfile.TarError) as error:
        check.problems.append(f"{url}: the shard cannot be read ({error})")
        return check
    check.keys = np.array(keys, dtype=np.uint64)
    return check


def _check_samples(path: Path, check: ShardCheck) -> Iterator[int]:
    """Check the samples of a tar; yields the hash of every key."""
    seen: set[str] = set()
    for raw in _samples(path, check):
        key = raw["__key__"]
        check.samples += 1
        if key in seen:
            check.problems.append(f"{check.url}: sample {key!r}: its key was used before in this shard")
        else:
            yield _hash(key)
        seen.add(key)
        try:
            if "__twice__" in raw:
                raise SampleError(f"{check.url}: sample {key!r}: it has two files {raw['__twice__']}")
            parse_sample(raw)
        except SampleError as error:
            check.problems.append(str(error))


def _samples(path: Path, check: ShardCheck) -> Iterator[dict[str, Any]]:
    """The files of each sample: neighbours with the same key, as webdataset groups them."""
    raw: dict[str, Any] | None = None
    reason = ""
    with tarfile.open(path) as tar:
        try:
            for member in tar:
                key, suffix = wds.tariterators.base_plus_ext(member.name)
                if not member.isfile() or key is None or member.name.startswith("__"):
                    continue
                if raw is None or raw["__key__"] != key:
                    if raw is not None:
                        yield raw
                    raw = {"__key__": key, "__url__": check.url}
                if suffix.lower() in raw:
                    raw["__twice__"] = member.name
                content = tar.extractfile(member)
                raw[suffix.lower()] = content.read() if content is not None else b""
            if not _ends_well(tar):
                reason = "its end is missing or a header is damaged"
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = str(error)
    if reason:
        last = "" if raw is None else f", in or after sample {raw['__key__']!r}"
        check.problems.append(f"{check.url}: the shard breaks off{last} ({reason})")
    if raw is not None:
        yield raw


def _ends_well(tar: tarfile.TarFile) -> bool:
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    return tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


@contextmanager
def _local(url: str) -> Iterator[Path]:
    """The shard as a file: itself, or a copy of what a pipe or URL gives."""
    if not any(mark in url for mark in REMOTE):
        yield Path(url)
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        stream: IO[bytes] = wds.gopen(url)
        shutil.copyfileobj(stream, copy)
        stream.close()
        copy.flush()
        yield Path(copy.name)


def _manifest_entries(spec: Path) -> dict[str, dict[str, Any]] | None:
    """Entries of the manifest of a folder, or of a manifest itself, by the shard that each is about."""
    path = spec if spec.name == MANIFEST else (spec if spec.is_dir() else spec.parent) / MANIFEST
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text())["shards"]
        return {_place(path.parent, entry["name"]): {**entry, "samples": int(entry["samples"])} for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); expected "
            '{"shards": [{"name": …, "samples": …}]}: write the shards again, or remove it'
        ) from error


def _place(folder: Path, name: str) -> str:
    return name if any(mark in name for mark in REMOTE) else str(folder / name)


def _compare(entries: dict[str, dict[str, Any]], checks: list[ShardCheck], spec: Path) -> Iterator[str]:
    """What the manifest says otherwise than the files."""
    folder = spec.parent if spec.name == MANIFEST else spec
    whole = folder.is_dir()  # and not one shard or a pattern of some
    if whole and (folder / UNFINISHED / "plan.json").exists():
        yield f"{folder}: a conversion into it was interrupted; call it again to go on"
    by_url = {check.url: check for check in checks}
    for url, entry in entries.items():
        check = by_url.get(url)
        if check is None and whole:
            yield f"{url}: {MANIFEST} lists it, but there is no such file"
        for name in ("samples", "bytes", "sha256") if check is not None else ():
            value = getattr(check, name)
            if value and entry.get(name) not in (None, value):
                yield f"{url}: {MANIFEST} says {name} {entry[name]}, but it is {value}"
    if entries and whole:
        listed = {Path(url) for url in entries}
        yield from (
            f"{path}: {MANIFEST} does not list it" for path in sorted(folder.glob("*.tar")) if path not in listed
        )


def _repeated_keys(checks: list[ShardCheck]) -> Iterator[str]:
    """Keys that several shards use, found by their hashes: names of millions would not fit in memory."""
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *(check.keys for check in checks)]))
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    users: dict[str, str] = {}
    for check in checks if repeated else ():
        if repeated & set(check.keys.tolist()):
            with _local(check.url) as path:
                names = dict.fromkeys(raw["__key__"] for raw in _samples(path, ShardCheck(check.url)))
            for key in (name for name in names if _hash(name) in repeated):
                if users.setdefault(key, check.url) != check.url:
                    yield f"{check.url}: sample {key!r}: its key is used in {users[key]} as well"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
