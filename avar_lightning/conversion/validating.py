"""Check an existing set of shards: every sample, every file that its manifest lists, and no key twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm.auto import tqdm

from avar_lightning.conversion.processes import open_pool
from avar_lightning.data.fetching import ShardCache
from avar_lightning.data.sample import SampleError, parse_sample
from avar_lightning.data.shards import MANIFEST, UNFINISHED, Shard, find_shards, is_remote, read_manifest
from avar_lightning.data.tars import LocalShard


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
    """Read every sample of a set of shards, and compare the files with their manifest.

    What is bad by itself is found: JSON, turns, images, keys. Whether a model's chat template takes the turns, or its
    context their length, is not asked.

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

    def found(problems: Iterable[str]) -> None:
        for problem in problems:
            report.num_problems += 1
            tell(problem)

    listed = _manifest(str(spec))
    urls = [shard.url for shard in find_shards(spec, count=False)]
    report.manifest = listed is not None
    with open_pool(min(workers, len(urls))) as run:
        for check in tqdm(run(check_shard, urls), total=len(urls), unit="shard", disable=not progress):
            found(check.problems)
            report.shards += 1
            report.samples += check.samples
            checks.append(check)
    found(_compare(listed or {}, checks, Path(spec).expanduser()))
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
            _check_samples(LocalShard(path, url), check)
    except (OSError, ValueError) as error:
        check.problems.append(f"{url}: the shard cannot be read ({error})")
    return check


def _check_samples(shard: LocalShard, check: ShardCheck) -> None:
    seen: set[str] = set()
    check.samples = len(shard.index.samples)
    for number, (key, _) in enumerate(shard.index.samples):
        if key in seen:
            check.problems.append(f"{check.url}: sample {key!r}: its key was used before in this shard")
        seen.add(key)
        raw = shard.read(number)
        try:
            if isinstance(raw, SampleError):
                raise raw
            parse_sample(raw)
        except SampleError as error:
            check.problems.append(str(error))
    if shard.index.problem:
        check.problems.append(str(shard.read(len(shard.index.samples))))
    check.keys = np.array([_hash(key) for key in seen], dtype=np.uint64)


@contextmanager
def _local(url: str) -> Iterator[Path]:
    """The shard as a file: itself, or what a pipe or URL gives, for as long as it is needed."""
    if not is_remote(url):
        yield Path(url)
        return
    with TemporaryDirectory() as folder:
        yield ShardCache(folder).path(Shard(url))


def _manifest(spec: str) -> dict[str, Shard] | None:
    """What the manifest of a folder, of the folder of some shards, or a manifest itself says of every shard."""
    if not is_remote(spec) and not spec.endswith(MANIFEST):
        path = Path(spec).expanduser()
        spec = str((path if path.is_dir() else path.parent) / MANIFEST)
    if not spec.endswith(MANIFEST) or not (is_remote(spec) or Path(spec).is_file()):
        return None
    return {shard.url: shard for shard in read_manifest(spec)}


def _compare(listed: dict[str, Shard], checks: list[ShardCheck], spec: Path) -> Iterator[str]:
    """What the manifest says otherwise than the files."""
    folder = spec.parent if spec.name == MANIFEST else spec
    whole = folder.is_dir()  # and not one shard or a pattern of some
    if whole and (folder / UNFINISHED / "plan.json").exists():
        yield f"{folder}: a conversion into it was interrupted; call it again to go on"
    by_url = {check.url: check for check in checks}
    for url, entry in listed.items():
        check = by_url.get(url)
        if check is None and whole:
            yield f"{url}: {MANIFEST} lists it, but there is no such file"
        for name in ("samples", "bytes", "sha256") if check is not None and check.sha256 else ():
            said, value = getattr(entry, name), getattr(check, name)
            if said not in (None, value):
                yield f"{url}: {MANIFEST} says {name} {said}, but it is {value}"
    if listed and whole:
        others = (str(path) for path in sorted(folder.glob("*.tar")) if str(path) not in listed)
        yield from (f"{path}: {MANIFEST} does not list it" for path in others)


def _repeated_keys(checks: list[ShardCheck]) -> Iterator[str]:
    """Keys that several shards use, found by their hashes: names of millions would not fit in memory."""
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *(check.keys for check in checks)]))
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    users: dict[str, str] = {}
    for check in checks if repeated else ():
        if repeated.isdisjoint(check.keys.tolist()):
            continue
        with _local(check.url) as path:
            keys = dict.fromkeys(key for key, _ in LocalShard(path).index.samples)
        for key in (key for key in keys if _hash(key) in repeated):
            if users.setdefault(key, check.url) != check.url:
                yield f"{check.url}: sample {key!r}: its key is used in {users[key]} as well"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
