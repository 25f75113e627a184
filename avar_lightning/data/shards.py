"""Find shards and count what they hold.

A shard is a WebDataset tar. Beside the shards that `ShardWriter` writes lies ``manifest.json`` with the
number of samples in each, which gives a data loader its length and every rank its share. Without one, local
shards are counted by their tar headers; pipes and URLs need a manifest to be counted.
"""

import glob
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import braceexpand
import httpx2
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from avar_lightning.data.tars import index_tar

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
"""Folder beside shards in which others are being made."""
PUBLICATION = f"{UNFINISHED}/publish.json"
"""There while shards are moved out of it: what lies beside it may be a part of them."""
_REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+]*://")


@dataclass(frozen=True)
class Shard:
    """One shard: where it is, how many samples it holds, its size and its checksum.

    ``None`` for what nobody said; the samples of such a shard are counted when it is opened.
    """

    url: str
    samples: int | None = None
    bytes: int | None = None
    sha256: str | None = None


def is_remote(url: str) -> bool:
    """Whether a shard has to be fetched before any sample of it can be read."""
    return _REMOTE.match(url) is not None


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
    if _is_manifest(text):
        return _shards_of_manifest(text)
    urls = [url for pattern in braceexpand.braceexpand(text) for url in _expand_pattern(pattern, spec=text)]
    if not count:
        return [Shard(url) for url in urls]
    manifests: dict[Path, dict[str, Any]] = {}
    return [Shard(url, _count_samples(url, manifests)) for url in urls]


def _expand_pattern(pattern: str, *, spec: str) -> list[str]:
    if is_remote(pattern):
        return [pattern]
    path = Path(pattern).expanduser()
    if path.is_dir():
        _refuse_moving(path)
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
    for folder in {Path(item).parent for item in found}:
        _refuse_moving(folder)
    return found


def _refuse_moving(folder: Path) -> None:
    if (folder / PUBLICATION).exists():
        raise FileNotFoundError(
            f"shards were being moved into {folder} when it was interrupted; call what writes them again to end it"
        )


def _is_manifest(text: str) -> bool:
    if is_remote(text):
        return text.startswith(("http://", "https://")) and urlsplit(text).path.endswith(f"/{MANIFEST}")
    return text.endswith(MANIFEST) and Path(text).is_file()


def _shards_of_manifest(name: str) -> list[Shard]:
    """Shards beside a manifest, or where it says."""
    text = _download(name) if is_remote(name) else Path(name).read_text()
    try:
        entries = [(str(entry["name"]), int(entry["samples"]), entry) for entry in json.loads(text)["shards"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is no manifest ({type(error).__name__}: {error}), expected "
            '{"shards": [{"name": …, "samples": …}, …]}; write it again with avar convert or ShardWriter'
        ) from error
    if not is_remote(name):
        _refuse_moving(Path(name).parent)
    return [_listed(name, own, samples, entry) for own, samples, entry in entries]


def _listed(manifest: str, name: str, samples: int, entry: dict[str, Any]) -> Shard:
    known = entry.get("bytes"), entry.get("sha256")
    if is_remote(manifest):
        url = urljoin(manifest, name)
        if not url.startswith(("http://", "https://")):  # a pipe: would run a stranger's command
            raise ValueError(f"{manifest} lists {name!r}, expected a file beside it or http(s); name others yourself")
        return Shard(url, samples, *known)
    if is_remote(name):
        return Shard(name, samples, *known)
    path = Path(manifest).parent / name
    return Shard(str(path), _believed(path, samples, known[0]))


def _believed(path: Path, samples: int, size: int | None) -> int:
    """What a manifest says of a shard, unless the file is another one."""
    if size is None or not path.exists() or path.stat().st_size == size:
        return samples
    log.warning("%s is not the file that its %s lists; counting its samples again", path, MANIFEST)
    index = index_tar(path)
    # What is cut off still counts, so that its reader misses and reports it.
    return max(samples, len(index.samples) + 1) if index.problem else len(index.samples)


def _download(url: str) -> str:
    tries = Retrying(
        retry=retry_if_exception_type((httpx2.TransportError, _Busy)),
        stop=stop_after_attempt(6),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        reraise=True,
    )
    try:
        return str(tries(_download_once, url))
    except httpx2.TransportError as error:
        raise ConnectionError(f"{url} cannot be reached ({error}); check the address, and that it is served") from error


class _Busy(OSError):
    """A server that may answer later."""


def _download_once(url: str) -> str:
    answer = httpx2.get(url, follow_redirects=True)
    if answer.status_code >= 500 or answer.status_code in (408, 425, 429):
        raise _Busy(f"{url} answered with status {answer.status_code}; try again when the server is well")
    if answer.status_code >= 400:
        raise FileNotFoundError(f"{url} answered with status {answer.status_code}; expected a {MANIFEST}")
    return answer.text


def _count_samples(url: str, manifests: dict[Path, dict[str, Any]]) -> int | None:
    if is_remote(url):
        return None
    path = Path(url)
    if path.parent not in manifests:
        manifest = path.parent / MANIFEST
        entries = json.loads(manifest.read_text())["shards"] if manifest.is_file() else []
        manifests[path.parent] = {entry["name"]: entry for entry in entries}
    entry = manifests[path.parent].get(path.name)
    return _count(path) if entry is None else _believed(path, int(entry["samples"]), entry.get("bytes"))


def _count(path: Path) -> int:
    index = index_tar(path)
    return len(index.samples) + bool(index.problem)
