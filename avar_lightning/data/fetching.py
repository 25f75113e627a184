"""Shards that are somewhere else: fetched once a machine, whole, into a folder of its own."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential
from webdataset.gopen import gopen

from avar_lightning.data.shards import Shard, is_remote

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "~/.cache/avar_lightning/shards"
_CHUNK = 1 << 20


class FetchTrouble(Exception):
    """It did not come, or not whole: worth another try."""


class ShardCache:
    """Where remote shards lie once they have been fetched.

    Processes of one machine share it: one fetches a shard, those that need it meanwhile wait. A broken HTTP transfer
    goes on where it broke off. What is not whole has another name until it is.

    Args:
        folder: Of the fetched shards, on a local disk.
        limit: Most bytes that they may take; the ones that were used longest ago go first. None for no limit.
        patience: Seconds for which a fetch is tried again.
    """

    def __init__(self, folder: str | Path = DEFAULT_FOLDER, *, limit: float | None = None, patience: float = 300.0):
        self.folder, self.limit, self.patience = Path(folder).expanduser(), limit, patience

    def path(self, shard: Shard) -> Path:
        """The shard's local file, fetched first if need be.

        Raises:
            OSError: It could not be fetched, or is not what its manifest says.
        """
        if not is_remote(shard.url):
            return Path(shard.url)
        path = self._place(shard)
        with self._lock(path):
            if not path.exists():
                self._fetch(shard, path)
        path.touch()  # used now
        return path

    def fetch_ahead(self, shards: Sequence[Shard]) -> None:
        """Begin to fetch shards that will be needed soon, but for those that somebody else is at already."""

        def work() -> None:
            for shard in shards:
                path = self._place(shard)
                try:
                    with self._lock(path, wait=False) as free:
                        if free and not path.exists():
                            self._fetch(shard, path)
                except OSError as error:  # whoever needs it will try again, and say so
                    log.debug("%s", error)

        missing = [shard for shard in shards if is_remote(shard.url) and not self._place(shard).exists()]
        if missing:
            threading.Thread(target=work, name="fetching shards", daemon=True).start()

    def _place(self, shard: Shard) -> Path:
        return self.folder / f"{hashlib.sha256(shard.url.encode()).hexdigest()[:32]}.tar"

    @contextmanager
    def _lock(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def _fetch(self, shard: Shard, path: Path) -> None:
        self._make_room(shard.bytes or 0)
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        tries = Retrying(
            retry=retry_if_exception_type(FetchTrouble),
            stop=stop_after_delay(self.patience),
            wait=wait_random_exponential(multiplier=0.2, max=30),
            reraise=True,
        )
        count = 0
        try:
            for attempt in tries:
                with attempt:
                    count += 1
                    (_download if shard.url.startswith(("http://", "https://")) else _copy)(shard.url, part)
                    _check(shard, part)
        except FetchTrouble as error:
            part.unlink(missing_ok=True)
            raise OSError(
                f"{shard.url} could not be fetched in {count} tries over {self.patience:g} s ({error}); check that it "
                "is there and complete"
            ) from error
        os.replace(part, path)

    def _make_room(self, needed: int) -> None:
        if self.limit is None:
            return
        found = [(item.stat(), item) for item in self.folder.glob("*.tar")]
        total = sum(stat.st_size for stat, _ in found) + needed
        for stat, item in sorted(found, key=lambda pair: pair[0].st_mtime):
            if total <= self.limit:
                return
            item.unlink(missing_ok=True)  # those who read it still have it open
            total -= stat.st_size


def _download(url: str, part: Path) -> None:
    """Fetch over HTTP, from where an earlier try broke off if the server can do that."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with httpx2.stream("GET", url, headers=headers, timeout=60, follow_redirects=True) as answer:
            if answer.status_code == 416:  # nothing is left, or another file is there now
                part.unlink()
                raise FetchTrouble(f"status 416 after {have} bytes")
            if answer.status_code >= 400:
                passing = answer.status_code >= 500 or answer.status_code in (408, 425, 429)
                if not passing:
                    raise OSError(
                        f"{url} answered with status {answer.status_code}; check the address and who may read it"
                    )
                raise FetchTrouble(f"status {answer.status_code}")
            goes_on = answer.status_code == 206
            length = answer.headers.get("Content-Length")
            with part.open("ab" if goes_on else "wb") as file:
                for chunk in answer.iter_raw():  # as it comes: what came before a break is kept
                    file.write(chunk)
                size = file.tell()
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise FetchTrouble(f"{type(error).__name__}: {error}") from error
    if length is not None and size != int(length) + (have if goes_on else 0):
        raise FetchTrouble(f"{size} bytes came, and more were announced")


def _copy(url: str, part: Path) -> None:
    """Fetch with a `pipe:` command or one of WebDataset's other schemes."""
    try:
        with gopen(url, "rb") as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
    except (OSError, ValueError) as error:
        raise FetchTrouble(f"{type(error).__name__}: {error}") from error


def _check(shard: Shard, part: Path) -> None:
    """Compare with the manifest; what differs is fetched anew."""
    size = part.stat().st_size
    problem = None
    if shard.bytes is not None and size != shard.bytes:
        problem = f"{size} bytes, where its manifest says {shard.bytes}"
    elif shard.sha256 is not None:
        with part.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                problem = "another checksum than its manifest says"
    if problem is not None:
        part.unlink()
        raise FetchTrouble(problem)
