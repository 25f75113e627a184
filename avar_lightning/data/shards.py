"""Find shards and count what they hold.

A shard is a WebDataset tar. Beside the shards that `ShardWriter` writes lies ``manifest.json`` with the
number of samples in each, which gives a data loader its length and every rank its share. Without one, local
shards are counted by their tar headers; pipes and URLs need a manifest to be counted.
"""

import glob
import json
import logging
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import webdataset as wds

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+]*://")


@dataclass(frozen=True)
class Shard:
    """One shard: where it is, and how many samples it holds (``None``: unknown until it is read)."""

    url: str
    samples: int | None = None


def expand_urls(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """List the shards that a specification means, in a fixed order.

    Args:
        spec: A tar, a folder of tars, a glob, a ``{000..009}`` brace pattern, a ``manifest.json``, a
            ``pipe:`` command or a URL (both passed through), or a list of these.

    Raises:
        FileNotFoundError: When nothing is there; the message names the pattern and what to do.

    >>> expand_urls("https://host/train-{00..02}.tar")
    ['https://host/train-00.tar', 'https://host/train-01.tar', 'https://host/train-02.tar']
    """
    return [shard.url for shard in find_shards(spec, count=False)]


def find_shards(spec: str | Path | Sequence[str | Path], *, count: bool = True) -> list[Shard]:
    """As :func:`expand_urls`, with the number of samples in each shard where it can be known.

    Counts come from a manifest, or else from the tar headers of local files. A tar that breaks off counts one
    sample more than it shows, so that its reader misses that sample and reports it.
    """
    if not isinstance(spec, str | Path):
        return [shard for item in spec for shard in find_shards(item, count=count)]
    text = str(spec)
    if text.endswith(MANIFEST) and Path(text).is_file():
        return _shards_of_manifest(Path(text))
    urls = [url for pattern in braceexpand.braceexpand(text) for url in _expand_pattern(pattern, spec=text)]
    if not count:
        return [Shard(url) for url in urls]
    manifests: dict[Path, dict[str, Any]] = {}
    return [Shard(url, _count_samples(url, manifests)) for url in urls]


def _expand_pattern(pattern: str, *, spec: str) -> list[str]:
    if _REMOTE.match(pattern):
        return [pattern]
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [str(item) for item in sorted(path.glob("*.tar"))]
        if not found:
            raise FileNotFoundError(f"no shard in the folder {spec}; expected .tar files there: write them first")
        return found
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path)))
    if not found:
        raise FileNotFoundError(
            f"no such shard: {pattern}" + (f" (of {spec})" if pattern != spec else "") + "; expected an existing "
            ".tar file, a folder or pattern of them, a pipe: or a URL: correct the path or write the shards"
        )
    return found


def _shards_of_manifest(path: Path) -> list[Shard]:
    entries = json.loads(path.read_text())["shards"]
    names = [(entry["name"], int(entry["samples"])) for entry in entries]
    return [Shard(n if _REMOTE.match(n) else str(path.parent / n), samples) for n, samples in names]


def _count_samples(url: str, manifests: dict[Path, dict[str, Any]]) -> int | None:
    if _REMOTE.match(url):
        return None
    path = Path(url)
    if path.parent not in manifests:
        manifest = path.parent / MANIFEST
        entries = json.loads(manifest.read_text())["shards"] if manifest.is_file() else []
        manifests[path.parent] = {entry["name"]: entry for entry in entries}
    entry = manifests[path.parent].get(path.name)
    if entry is not None:
        if entry.get("bytes") in (None, path.stat().st_size):
            return int(entry["samples"])
        log.warning("%s is not the file that its %s lists; counting its samples again", url, MANIFEST)
    return _count_headers(path)


def _count_headers(path: Path) -> int:
    """Count samples by tar headers, grouped as the reader groups them."""
    count, previous = 0, None
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = wds.tariterators.base_plus_ext(member.name)
                if member.isfile() and suffix is not None and not member.name.startswith("__"):
                    count, previous = count + (key != previous), key
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            ends_well = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, OSError):
        ends_well = False
    return count if ends_well else count + 1
