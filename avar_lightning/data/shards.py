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
        if not is_remote(text):
            _refuse_moving(Path(text).parent)
        return [_believed(shard) for shard in read_manifest(text)]
    urls = [url for pattern in braceexpand.braceexpand(text) for url in _expand_pattern(pattern, spec=text)]
    if not count:
        return [Shard(url) for url in urls]
    folders = {Path(url).parent for url in urls if not is_remote(url)}
    manifests = [folder / MANIFEST for folder in folders if (folder / MANIFEST).is_file()]
    listed = {shard.url: shard for manifest in manifests for shard in read_manifest(manifest)}
    return [_believed(listed[url]) if url in listed else Shard(url, _count(url)) for url in urls]


def read_manifest(name: str | Path) -> list[Shard]:
    """The shards that a manifest lists, with what it says of them, whatever their files are.

    Args:
        name: Its path or its http(s) URL.

    Raises:
        ValueError: It is no manifest; or it was fetched, and lists what is neither beside it nor behind http(s).
    """
    text = _download(str(name)) if is_remote(str(name)) else Path(name).read_text()
    try:
        entries = [(str(entry["name"]), int(entry["samples"]), entry) for entry in json.loads(text)["shards"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is no manifest ({type(error).__name__}: {error}), expected "
            '{"shards": [{"name": …, "samples": …}, …]}; write it again with avar convert or ShardWriter'
        ) from error
    return [
        Shard(_url_of(own, str(name)), samples, entry.get("bytes"), entry.get("sha256"))
        for own, samples, entry in entries
    ]


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


def _url_of(name: str, manifest: str) -> str:
    if not is_remote(manifest):
        return name if is_remote(name) else str(Path(manifest).parent / name)
    url = urljoin(manifest, name)
    if not url.startswith(("http://", "https://")):  # a pipe: would run a stranger's command
        raise ValueError(f"{manifest} lists {name!r}, expected a file beside it or http(s); name others yourself")
    return url


def _believed(shard: Shard) -> Shard:
    """What a manifest says of a shard, unless the local file is another one."""
    if is_remote(shard.url):
        return shard
    path = Path(shard.url)
    if shard.bytes is None or not path.exists() or path.stat().st_size == shard.bytes:
        return Shard(shard.url, shard.samples)
    log.warning("%s is not the file that its %s lists; counting its samples again", path, MANIFEST)
    index = index_tar(path)
    # What is cut off still counts, so that its reader misses and reports it.
    found = len(index.samples)
    return Shard(shard.url, max(shard.samples or 0, found + 1) if index.problem else found)


def may_pass(status: int) -> bool:
    """Whether a server that answers with such a status may answer otherwise later."""
    return status >= 500 or status in (408, 425, 429)


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
    if may_pass(answer.status_code):
        raise _Busy(f"{url} answered with status {answer.status_code}; try again when the server is well")
    if answer.status_code >= 400:
        raise FileNotFoundError(f"{url} answered with status {answer.status_code}; expected a {MANIFEST}")
    return answer.text


def _count(url: str) -> int | None:
    if is_remote(url):
        return None
    index = index_tar(url)
    return len(index.samples) + bool(index.problem)
