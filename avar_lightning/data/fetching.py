"""Shards that are somewhere else: fetched once a machine, whole, into a folder of its own."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential
from webdataset.gopen import gopen

from avar_lightning.data.shards import Shard, is_remote, may_pass
from avar_lightning.data.tars import index_tar

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "~/.cache/avar_lightning/shards"
_CHUNK = 1 << 20


class FetchError(OSError):
    """A remote shard is not to be had."""


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

    def open(self, shard: Shard) -> int:
        """Descriptor of the shard's local file, fetched first if need be; the caller closes it.

        Raises:
            FetchError: It could not be fetched, or is not what its manifest says.
            OSError: The local file cannot be opened.
        """
        if not is_remote(shard.url):
            return os.open(shard.url, os.O_RDONLY)
        path = self._place(shard)
        with self._lock(path):
            if not path.exists():
                self._fetch(shard, path)
            file = os.open(path, os.O_RDONLY)  # under the lock: nobody makes room with it meanwhile
            os.utime(file)  # used now
        return file

    def path(self, shard: Shard) -> Path:
        """The same as a path, which holds while no limit makes room with it."""
        os.close(self.open(shard))
        return self._place(shard) if is_remote(shard.url) else Path(shard.url)

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
        # What a manifest says of it is part of its name: another version is another file.
        name = f"{shard.url} {shard.bytes} {shard.sha256}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.tar"

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
        transfer = _Transfer(shard.url, part)
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
                    try:
                        transfer.go_on()
                        _check(shard, part)
                    except FetchTrouble as trouble:
                        if count == 1:  # who waits should know what for
                            log.warning("%s: %s; trying again for %g s", shard.url, trouble, self.patience)
                        raise
        except FetchTrouble as error:
            part.unlink(missing_ok=True)
            raise FetchError(
                f"{shard.url} could not be fetched in {count} tries over {self.patience:g} s ({error}); check that it "
                "is there and complete"
            ) from error
        os.replace(part, path)

    def _make_room(self, needed: int) -> None:
        if self.limit is None:
            return
        found = []
        for item in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process has made room with it since
                found.append((item.stat(), item))
        total = sum(stat.st_size for stat, _ in found) + needed
        for stat, item in sorted(found, key=lambda pair: pair[0].st_mtime):
            if total <= self.limit:
                return
            with self._lock(item, wait=False) as free:
                if not free:
                    continue
                item.unlink(missing_ok=True)  # those who read it have it open
            total -= stat.st_size


class _Transfer:
    """One file on its way, perhaps in several pieces.

    Args:
        url: Where it comes from.
        part: Where it goes.
    """

    def __init__(self, url: str, part: Path) -> None:
        self.url, self.part = url, part
        self._version: str | None = None  # what the server calls the version that we have a part of

    def go_on(self) -> None:
        """Fetch what is missing, or all where the source cannot go on in the middle.

        Raises:
            FetchTrouble: It broke off, or was not answered.
            FetchError: The server will not hand it out.
        """
        if self.url.startswith(("http://", "https://")):
            try:
                self._download()
            except (httpx2.HTTPError, httpx2.StreamError) as error:
                raise FetchTrouble(f"{type(error).__name__}: {error}") from error
        else:
            self._copy()

    def _download(self) -> None:
        have = self.part.stat().st_size if self.part.exists() and self._version else 0
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": str(self._version)}  # else the whole of a newer version
        with httpx2.stream("GET", self.url, headers=headers, timeout=60, follow_redirects=True) as answer:
            self._refuse(answer.status_code)
            begins = f"bytes {have}-"
            goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(begins)
            if answer.status_code == 206 and not goes_on:
                self._version = None
                raise FetchTrouble(f"another range than {begins} came")
            validator = answer.headers.get("ETag", answer.headers.get("Last-Modified", ""))
            self._version = None if validator.startswith("W/") else validator or None
            length = answer.headers.get("Content-Length")
            with self.part.open("ab" if goes_on else "wb") as file:
                for chunk in answer.iter_raw():  # as it comes: what came before a break is kept
                    file.write(chunk)
                size = file.tell()
        if length is not None and size != int(length) + (have if goes_on else 0):
            raise FetchTrouble(f"{size} bytes came, and more were announced")

    def _refuse(self, status: int) -> None:
        if status == 416:  # nothing is left, or another file is there now
            self._version = None
        if status == 416 or may_pass(status):
            raise FetchTrouble(f"status {status}")
        if status >= 400:
            raise FetchError(f"{self.url} answered with status {status}; check the address and who may read it")

    def _copy(self) -> None:
        """With a `pipe:` command or one of WebDataset's other schemes."""
        try:
            with gopen(self.url, "rb") as source, self.part.open("wb") as target:
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
    else:
        problem = index_tar(part).problem  # a command may end well before the tar does
    if problem is not None:
        part.unlink()
        raise FetchTrouble(problem)
