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
from urllib.parse import urljoin

import braceexpand
import httpx2
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

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
    if text.endswith(MANIFEST) and (is_remote(text) or Path(text).is_file()):
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
        if (path / PUBLICATION).exists():
            raise FileNotFoundError(
                f"the conversion into the folder {spec} was interrupted; call the same avar convert again to end it"
            )
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


def _shards_of_manifest(name: str) -> list[Shard]:
    """Shards beside a manifest, or where it says."""
    text = _download(name) if is_remote(name) else Path(name).read_text()
    try:
        entries = json.loads(text)["shards"]
        return [
            Shard(_beside(name, entry["name"]), int(entry["samples"]), entry.get("bytes"), entry.get("sha256"))
            for entry in entries
        ]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is no manifest ({type(error).__name__}: {error}), expected "
            '{"shards": [{"name": …, "samples": …}, …]}; write it again with avar convert or ShardWriter'
        ) from error


def _beside(manifest: str, name: str) -> str:
    if is_remote(name):
        return name
    return urljoin(manifest, name) if is_remote(manifest) else str(Path(manifest).parent / name)


@retry(
    retry=retry_if_exception_type(httpx2.TransportError),
    stop=stop_after_attempt(5),
    wait=wait_random_exponential(multiplier=0.2, max=10),
    reraise=True,
)
def _download(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: a manifest is read from a folder, http:// or https://; copy it to one of these")
    answer = httpx2.get(url, follow_redirects=True)
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
    if entry is not None:
        if entry.get("bytes") in (None, path.stat().st_size):
            return int(entry["samples"])
        log.warning("%s is not the file that its %s lists; counting its samples again", url, MANIFEST)
    index = index_tar(path)
    return len(index.samples) + bool(index.problem)
